"""``offramp bench --against`` an engine that generates: the same prompt, in turns, each engine in a process of its own.

Two engines in one process would share or fight over ONNX Runtime's one environment and its threads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.cli import _against, _common, _depths, _engines
from offramp.cli._engines import Made
from offramp.errors import ExecutionError, InputError
from offramp.runtime import Never
from offramp.runtime.engine.cores import physical_cores

if TYPE_CHECKING:
    from offramp.runtime import Chain, Policy

ROUNDS = 5
_REQUIREMENT = {"genai": "onnxruntime-genai", "ctranslate2": "ctranslate2"}


def run(chain: Chain, args: argparse.Namespace) -> int:
    """Measure and print."""
    ids, new = chain.generates, args.repeat or 32
    if ids is None:
        raise InputError("--against: this bundle generates nothing", hint='offramp export -p "insert-cache"')
    inputs = _depths.given(chain, args, new, "--against")
    if chain.manifest.generation.prompt and not args.text and not any(i.startswith(f"{ids}=") for i in args.input):
        inputs[ids] = np.array([chain.manifest.generation.prompt])
    prompt, others = np.asarray(inputs[ids])[0].tolist(), [array for name, array in inputs.items() if name != ids]
    to_the_end = any(other.engine == "ctranslate2" for other in args.against)
    options = {} if to_the_end else {"max_new_tokens": new, "suppress": (), "suppress_first": (), **_depths.ALONE}
    policies: dict[str, Policy] = {"full depth": Never()}
    if chain.manifest.policy is not None:
        policies["the bundle's policy"] = chain.policy
    ways: dict[str, Callable[[], Made]] = {
        name: partial(_by_chain, chain, inputs, policy, options) for name, policy in policies.items()
    }
    with ExitStack() as opened:
        for other in args.against:
            process = opened.enter_context(_Process(other, args.threads))
            ways[str(other)] = partial(process.ask, _engines.generate, prompt, others, new)
        found = _turns(ways)
    sizes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in inputs.items())
    print(f"{sizes} {'and all that follows' if to_the_end else f'and {new} tokens'}\n\n{report(found)}")
    return 0


def _turns(ways: Mapping[str, Callable[[], Made]]) -> dict[str, list[Made]]:
    """What each made in `ROUNDS` alternating runs, after one that does not count."""
    found: dict[str, list[Made]] = {name: [] for name in ways}
    for round_ in range(-1, ROUNDS):
        for name, way in ways.items():
            sleep(_against.PAUSE)
            made = way()
            if round_ >= 0:
                found[name].append(made)
    return found


def report(found: Mapping[str, list[Made]]) -> str:
    """The table; how much quicker than full depth, and how many tokens are the same before the first other one."""
    full, rows = found["full depth"], []
    for name, runs in found.items():
        tokens = runs[0].tokens
        first = [made.first for made in runs if made.first is not None]
        total = statistics.median(made.total for made in runs)
        speed = statistics.median(ours.total / theirs.total for ours, theirs in zip(full, runs, strict=True))
        pairs = enumerate(zip(tokens, full[0].tokens, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(tokens), len(full[0].tokens)))
        rows.append(
            (
                name,
                statistics.median(first) if first else "",
                total,
                len(tokens),
                1e3 * len(tokens) / total,
                speed,
                same,
            )
        )
    return _common.table(("way", "first ms", "all ms", "tokens", "tokens/s", "speed-up", "same tokens"), rows)


def _by_chain(chain: Chain, inputs: Mapping[str, Any], policy: Policy, options: Mapping[str, Any]) -> Made:
    started = perf_counter()
    tokens, first = [], None
    for step in chain.stream(inputs, policy, **options):
        tokens.append(step.token)
        first = first or (perf_counter() - started) * 1e3
    return Made(tokens, first, (perf_counter() - started) * 1e3)


class _Process:
    """An engine in a process of its own, with its model loaded."""

    def __init__(self, other: _against.Other, threads: int | None) -> None:
        if not Path(other.path).is_dir():
            raise InputError(f"--against {other}: there is no such directory", hint=f"{other.engine}=DIR")
        self._other, self._threads = other, threads or physical_cores()
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> _Process:
        try:
            self.ask(_engines.load, self._other.engine, self._other.path, self._threads)
        except BaseException:
            self._pool.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns there; ExecutionError where it raises."""
        try:
            return self._pool.submit(function, *arguments).result()
        except ModuleNotFoundError as error:
            hint = f"pip install {_REQUIREMENT[self._other.engine]}"
            raise ExecutionError(f"--against {self._other}: {error}", hint=hint) from error
        except Exception as error:
            raise ExecutionError(f"--against {self._other}: {error}") from error

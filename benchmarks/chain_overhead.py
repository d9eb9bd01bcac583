"""What does cutting a model into segments cost? The chain at full depth against one session, and eager torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch

import offramp
from benchmarks._common import BUILD, alternate, one_session, report
from offramp import zoo
from offramp.runtime.engine import sessions

Inputs = Mapping[str, Any]
CASES = {"minilm": [(1, 32), (1, 128), (8, 32), (8, 128)], "vit": [(1, 0), (8, 0)]}
SEGMENTS = {"minilm": (1, 2, 3, 6), "vit": (1, 2, 3, 6, 12)}
POOL_SEGMENTS = 6


def inputs_of(name: str, batch: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs: images, or token ids without padding."""
    random = np.random.default_rng(0)
    if name == "vit":
        return {"pixel_values": random.standard_normal((batch, 3, 224, 224), np.float32)}
    ids = random.integers(1000, 20000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def bundles(name: str, program: offramp.Program) -> dict[int, Path]:
    """One bundle for each number of segments."""
    found = {}
    for count in SEGMENTS[name]:
        found[count] = BUILD / f"{name}-{count}.offramp"
        offramp.save(program, found[count], segments=count)
    return found


def main() -> None:
    """Print one table: milliseconds, and ratios to one session on the same pool."""
    prepared = {}
    own_pools = {}
    for name in CASES:  # sessions with pools of their own must exist before the process gets its one pool
        module, example = zoo.load(name)
        program = offramp.capture(module, example)
        with mock.patch.object(sessions, "session_options", return_value=ort.SessionOptions()):
            paths = bundles(name, program)
            own_pools[name] = offramp.load(paths[POOL_SEGMENTS])
        prepared[name] = (module, program, paths)
    rows = {
        (name, *case): {"model": name, "batch": case[0], "tokens": case[1] or 257}
        for name in CASES
        for case in CASES[name]
    }
    singles = {
        name: one_session(program, BUILD / f"{name}-one", sessions.session_options())
        for name, (_, program, _) in prepared.items()
    }
    for name, (_, _, paths) in prepared.items():
        chains = {count: offramp.load(path) for count, path in paths.items()}
        pieces = len(chains[POOL_SEGMENTS].manifest.segments)
        for case in CASES[name]:
            inputs = inputs_of(name, *case)
            runs: dict[str, Callable[[], object]] = {"one": functools.partial(singles[name], inputs)}
            runs |= {str(count): functools.partial(chain.run, inputs) for count, chain in chains.items()}
            found = alternate(runs, seconds=3.0)
            row: dict[str, Any] = rows[(name, *case)]
            row["one session ms"] = found["one"]
            for count in SEGMENTS["vit"]:
                row[f"x{count}"] = round(found[str(count)] / found["one"], 3) if count in chains else ""
            row["us a segment at 6"] = round((found[str(POOL_SEGMENTS)] - found["one"]) * 1e3 / pieces, 1)
    # threads that spin disturb whatever else runs, so these take turns with one session after the rest, and pause
    for name in CASES:
        for case in CASES[name]:
            ratio = _against(singles[name], own_pools[name].run, inputs_of(name, *case))
            rows[(name, *case)]["own pools, x6"] = ratio
    own_pools.clear()
    for name, (module, _, _) in prepared.items():
        for case in CASES[name]:
            ratio = _against(singles[name], functools.partial(_eager, module), inputs_of(name, *case))
            rows[(name, *case)]["eager torch"] = ratio
    report("chain_overhead", "chain at full depth / one session, by segments a stack", list(rows.values()))


def _against(single: Callable[[Inputs], Any], other: Callable[[Inputs], Any], inputs: Inputs) -> float:
    runs = {"one": functools.partial(single, inputs), "other": functools.partial(other, inputs)}
    found = alternate(runs, seconds=3.0, pause=0.1)
    return round(found["other"] / found["one"], 2)


def _eager(module: torch.nn.Module, inputs: Inputs) -> None:
    with torch.inference_mode():
        module(**{name: torch.from_numpy(value) for name, value in inputs.items()})


if __name__ == "__main__":
    main()

"""``offramp bench --against ENGINE=PATH``: another engine on the same inputs, in turns with the bundle.

``ort`` and ``torch`` run one pass, and are ways beside the exits. What generates is in ``_against_generation``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from offramp.cli import _common
from offramp.errors import ExecutionError, InputError

Arrays: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Callable[[], Arrays]

PASS, GENERATION = ("ort", "torch"), ("genai", "ctranslate2")
HELP = (
    "another engine, in turns with the bundle; may be repeated. One pass: ort=FILE.onnx, torch=MODEL (a name as "
    "offramp export takes it). Generation: genai=DIR, which the builder of onnxruntime-genai wrote; ctranslate2=DIR, "
    "a converted Whisper"
)
PAUSE = 0.1  # seconds, in which the threads of one engine stop spinning before another one runs


class Other(NamedTuple):
    """An engine, and what it is to load."""

    engine: str
    path: str

    def __str__(self) -> str:
        return f"{self.engine} {self.path}"


def parsed(text: str) -> Other:
    """ENGINE=PATH, for argparse."""
    engine, sign, path = text.partition("=")
    if engine not in (*PASS, *GENERATION) or not sign or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(f'{e}=...' for e in (*PASS, *GENERATION))}"
        )
    return Other(engine, path)


def generates(others: Sequence[Other]) -> bool:
    """Whether they generate; InputError where some do and some run one pass."""
    found = {other.engine in GENERATION for other in others}
    if len(found) > 1:
        raise InputError(
            f"--against: {', '.join(PASS)} run one pass, {', '.join(GENERATION)} generate",
            hint="one kind in a run",
        )
    return True in found


def runs(others: Sequence[Other], inputs: Arrays, args: argparse.Namespace) -> dict[str, Run]:
    """What runs one pass of each over the inputs and gives its outputs by name.

    Raises:
        InputError: there is no such file, or it takes other inputs.
        ExecutionError: ONNX Runtime cannot load it, or the engine cannot run it.
        ModelError: the name of a model leads nowhere.
    """
    make = {"ort": _ort, "torch": _torch}
    return {str(other): make[other.engine](other, inputs, args) for other in others}


def differences(expected: Arrays, found: Mapping[str, Arrays]) -> list[str]:
    """A sentence for each engine: how far its outputs are from the bundle's, relative to their scale."""
    return [f"{name}: {_difference(expected, outputs)}" for name, outputs in found.items()]


def _difference(expected: Arrays, outputs: Arrays) -> str:
    import numpy as np

    if len(expected) == len(outputs) == 1:
        outputs = dict(zip(expected, outputs.values(), strict=True))
    both = [name for name in expected if name in outputs]
    if not both:
        return f"its outputs are {', '.join(outputs)}, and the bundle's {', '.join(expected)}"
    errors = {}
    for name in both:
        ours, theirs = np.asarray(expected[name]), np.asarray(outputs[name])
        if ours.shape != theirs.shape:
            return f"outputs are of another shape: {name} {list(theirs.shape)}, expected {list(ours.shape)}"
        scale = float(np.abs(ours).max(initial=0)) or 1.0
        errors[name] = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0)) / scale
    worst = max(errors, key=errors.__getitem__)
    return f"outputs differ by up to {errors[worst]:.1e} of their scale ({worst})"


def _fed(names: Sequence[str], inputs: Arrays, other: Other) -> dict[str, Any]:
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(
            f"--against {other}: it takes {', '.join(names)}, and the bundle {', '.join(inputs)}",
            hint="a file of the same model whose inputs have the names of its forward's parameters",
        )
    return {name: inputs[name] for name in names}


def _ort(other: Other, inputs: Arrays, args: argparse.Namespace) -> Run:
    import onnxruntime as ort

    from offramp.runtime.engine.sessions import session_options

    if not Path(other.path).is_file():
        raise InputError(f"--against {other}: there is no such file", hint="ort=FILE.onnx")
    providers = args.provider or ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(other.path, session_options(args.threads), providers=providers)
    except Exception as error:
        raise ExecutionError(f"--against {other}: ONNX Runtime cannot load it: {error}") from error
    feed = _fed([node.name for node in session.get_inputs()], inputs, other)
    names = [node.name for node in session.get_outputs()]

    def run() -> Arrays:
        try:
            return dict(zip(names, session.run(names, feed), strict=True))
        except Exception as error:
            raise ExecutionError(f"--against {other}: {error}") from error

    return run


def _torch(other: Other, inputs: Arrays, args: argparse.Namespace) -> Run:
    loaded, example = _common.loaded(other.path)  # which says what to install where there is no torch
    import torch

    from offramp.program.forward import named_inputs
    from offramp.program.of_mapping import by_names
    from offramp.program.unwrap import plain
    from offramp.runtime.engine.cores import physical_cores

    module, example = by_names(plain(loaded).eval(), example)
    torch.set_num_threads(args.threads or physical_cores())
    known = list(named_inputs(module, example))
    feed = {name: torch.from_numpy(array) for name, array in inputs.items() if name in known}
    if not feed:
        _fed(known, inputs, other)

    def run() -> Arrays:
        try:
            with torch.inference_mode():
                return _tensors(module(**feed))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ExecutionError(f"--against {other}: {error}") from error

    return run


def _tensors(found: Any) -> Arrays:
    """The tensors of a forward's result by name; a cache, say, is left out."""
    import torch

    if isinstance(found, torch.Tensor):
        return {"output": found.numpy()}
    items = found.items() if isinstance(found, Mapping) else ((f"output{i}", item) for i, item in enumerate(found))
    return {name: item.numpy() for name, item in items if isinstance(item, torch.Tensor)}

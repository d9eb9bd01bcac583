"""The options of ``fit``, checked before anything runs."""

from __future__ import annotations

import math
import os
import timeit
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from offramp.errors import SpecError

PRECISIONS = ("no", "auto", "bf16", "fp16")
_GAIN = 0.6  # of the time in fp32: the casts of a training step cost something, too
_LEAST = {"steps": 1, "warmup": 0, "accumulate": 1, "every": 1, "log_every": 1}  # of whole numbers


def check_options(
    *,
    train: str,
    precision: str,
    epochs: float,
    rate: float,
    clip: float,
    seed: int,
    optimizer: object,
    folder: str | os.PathLike[str] | None,
    **counts: int | None,
) -> None:
    """Raise a SpecError that names every option with a value that makes no sense."""
    problems = []
    if train not in ("added", "all"):
        problems.append(f"train={train!r}: there are added and all")
    if precision not in PRECISIONS:
        problems.append(f"precision={precision!r}: there are {', '.join(PRECISIONS)}")
    for name, value in {"epochs": epochs, "rate": rate, "clip": clip}.items():
        if not _number(value) or not value > 0 or (name != "clip" and math.isinf(value)):
            problems.append(f"{name}={value!r}: a number greater than 0")
    if not _whole(seed):
        problems.append(f"seed={seed!r}: a whole number")
    for name, count in counts.items():
        least = _LEAST[name]
        if (count is not None or name != "steps") and (not _whole(count) or count < least):  # type: ignore[operator]
            problems.append(f"{name}={count!r}: a whole number, at least {least}")
    if optimizer is not None and not callable(optimizer):
        problems.append(f"optimizer={type(optimizer).__name__}(...): a function of the weights that are trained")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        problems.append(f"folder={os.fspath(folder)!r}: it is a file")
    if problems:
        made = "optimizer=lambda weights: torch.optim.SGD(weights, 1e-2)"
        raise SpecError("\n  ".join(problems), hint=made if problems[0].startswith("optimizer") else None)


def computes_bf16(device: torch.device | str) -> bool:
    """Whether a device gains by products in bf16.

    A CPU is measured, once in a process: what its instructions are called does not say it. A product in bf16 took .36
    of fp32's time by AVX512 on one processor, where a training step took half the time, and ten times as long without
    any instruction for it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and _product_seconds(torch.bfloat16) < _GAIN * _product_seconds(torch.float32)


@cache
def _product_seconds(dtype: torch.dtype) -> float:
    """How long this CPU takes for a product of 1 GFLOP."""
    rows, weight = torch.zeros(2048, 512, dtype=dtype), torch.zeros(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: rows @ weight, number=1, repeat=4))


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)

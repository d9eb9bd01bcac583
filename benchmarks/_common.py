"""What benchmarks share: alternating timing, progress on stderr, a table, a JSON file with versions and sizes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

import offramp
from examples import train_language_adapters as recipe
from offramp.bundle.manifest import Exit
from offramp.export.partition import whole
from offramp.export.translations import Translations
from offramp.export.write import Writer
from offramp.program import Program
from offramp.runtime.engine.cores import physical_cores
from offramp.runtime.policies.base import Rows

BUILD = Path("build/benchmarks")
TEXT = 4096  # tokens
Row = dict[str, Any]
T = TypeVar("T")
_EVERY = 10.0  # seconds between lines of progress


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def steps(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one; says how many are done, and how long the others may take, every ten seconds."""
    started = told = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - told >= _EVERY:
            left = (now - started) / done * (len(items) - done)
            say(f"{what}: {done} of {len(items)}, about {left:.0f} s left")
            told = now
        yield item
    say(f"{what}: {len(items)} in {time.perf_counter() - started:.0f} s")


def shown(row: Row) -> Row:
    """The row, printed as soon as it is there."""
    say(", ".join(f"{column} {_text(value)}" if column else _text(value) for column, value in row.items()))
    return row


def rounds(parser: argparse.ArgumentParser) -> None:
    """Declare ``--rounds``."""
    parser.add_argument("--rounds", metavar="N", type=int, default=1, help="measure so often, and show the spread (1)")


def spread(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several runs as one: of numbers that differ the median, the least and the greatest."""
    together = zip(*runs, strict=True)
    return [{column: _together([row[column] for row in rows]) for column in rows[0]} for rows in together]


def _together(values: Sequence[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    if not all(isinstance(value, int | float) for value in values):
        return " / ".join(map(str, dict.fromkeys(values)))
    return f"{_text(statistics.median(values))} ({_text(min(values))} to {_text(max(values))})"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def alternate(
    runs: Mapping[str, Callable[[], object]], seconds: float = 4.0, least: int = 9, pause: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of each, run in turns (A B C A B C ...) until each has had ``seconds`` in all.

    ``pause`` seconds before each run let the threads of the one before stop spinning.
    """
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds * len(runs) or min(map(len, times.values())) < least:
        for name, run in runs.items():
            time.sleep(pause)
            begun = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begun) * 1e3)
    return {name: float(np.median(found)) for name, found in times.items()}


def one_session(program: Program, directory: Path, options: ort.SessionOptions) -> Callable[[Mapping[str, Any]], Any]:
    """The same model, lowered the same way, as one file in one session."""
    directory.mkdir(parents=True, exist_ok=True)
    writer = Writer(directory, program.graph_module)
    function = Translations().of(whole(program))
    file = writer.segment(function, "model")
    writer.close()
    session = ort.InferenceSession(directory / file, options)
    names = [node.name for node in function.inputs]
    outputs = [f"out{i}" for i in range(len(function.outputs))]
    return lambda inputs: session.run(outputs, {f"in{i}": inputs[name] for i, name in enumerate(names)})


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table and write ``build/benchmarks/NAME.json``."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*map(_text, row.values()))
    Console(width=160).print(table)
    BUILD.mkdir(parents=True, exist_ok=True)
    about = {
        "versions": {package: version(package) for package in ("torch", "onnxruntime", "numpy", "onnx")},
        "machine": platform.machine(),
        "threads": physical_cores(),
        "load": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
    }
    (BUILD / f"{name}.json").write_text(json.dumps({"title": title, "about": about, "rows": rows}, indent=1) + "\n")


def rounded_by(precision: str, name: str = "smollm2") -> list[dict[str, Any]] | None:
    """What SmolLM2's weights of 4 bits are rounded by: `TEXT` tokens of WikiText-2's validation text."""
    if (precision, name) != ("int4", "smollm2"):
        return None
    return [{key: item.numpy() for key, item in batch.items()} for batch in recipe.batches("valid", TEXT)]


def data(folder: str) -> Path:
    """The benchmark data in ``folder``: under ``$OFFRAMP_DATA``, or ``../shared/data`` beside the checkout."""
    root = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    if not (root / folder).exists():
        raise SystemExit(
            f"no {root / folder}: set OFFRAMP_DATA to a directory that holds {folder} (SST-2 is part of GLUE; "
            "tsv files train, dev and test with the columns sentence and label)"
        )
    return root / folder


@dataclass(frozen=True)
class Known(offramp.Policy):
    """The perfect gate: the step's first exit of those that are right, by a table; it asks for no score."""

    right: Sequence[int | None]

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return () if stack == "decoder" else None

    def leave(self, state: offramp.State) -> Rows:
        assert state.steps is not None
        return np.array([self.right[step] == state.after for step in state.steps])

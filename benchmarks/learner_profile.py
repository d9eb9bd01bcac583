"""What becomes of the FLOPs that learners save? The operators of a model with learners, beside those of it without.

ONNX Runtime's own profile of the graphs of `learner_forms`, at half the width: milliseconds of a run by operator, on
the CPU.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import offramp
from benchmarks._common import BUILD, Row, report, shown
from benchmarks.learner_forms import chains, inputs, place
from offramp.bundle.manifest import WIDTH
from offramp.runtime.engine.sessions import session_options

CASES = {"minilm": (8, 128), "vit": (8, 257)}
RUNS, WARM_UP = 12, 3


def profiled(chain: offramp.Chain, root: Path, given: Mapping[str, np.ndarray[Any, Any]]) -> Counter[str]:
    """Milliseconds of a run of a bundle without exits, by operator."""
    options = session_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(BUILD / "profile")
    segments = chain.manifest.segments
    sessions = {
        key: ort.InferenceSession(root / segment.file, options, providers=["CPUExecutionProvider"])
        for key, segment in segments.items()
    }
    for _ in range(WARM_UP + RUNS):
        values = dict(given)
        for key, segment in segments.items():  # in the order that they run in
            found = sessions[key].run(
                list(segment.outputs), {port: values[value] for port, value in segment.inputs.items()}
            )
            values |= zip(segment.outputs.values(), found, strict=True)
    spent: Counter[str] = Counter()
    for session in sessions.values():
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [event for event in events if event["name"].endswith("_kernel_time")]
        for event in kernels[len(kernels) * WARM_UP // (WARM_UP + RUNS) :]:
            spent[event["args"]["op_name"]] += event["dur"] / 1e3 / RUNS
    return spent


def _row(model: str, operator: str, without: float, having: float) -> Row:
    return shown({"model": model, "operator": operator, "without": round(without, 3), "with": round(having, 3)})


def main() -> None:
    """Print one table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows: list[Row] = []
    for name, (batch, tokens) in CASES.items():
        ways, given = chains(name), inputs(name, batch, tokens)
        result = ways["grouped"].run(given, offramp.Width(0.5))
        given[WIDTH] = np.array([0.5], np.float32)
        before, after = (profiled(ways[form], place(name, form), given) for form in ("none", "grouped"))
        most = before | after
        for operator in sorted(most, key=lambda each: -most[each]):
            if most[operator] > 0.01 * before.total():
                rows.append(_row(name, operator, before[operator], after[operator]))
        rows.append(_row(name, f"all, width {result.width:.2f}", before.total(), after.total()))
    report("learner_profile", "Milliseconds of a run by operator, without learners and with them", rows)


if __name__ == "__main__":
    main()

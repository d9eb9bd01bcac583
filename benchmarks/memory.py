"""How much memory does a run take? A process that runs the chain, against one that runs one session.

The peak is while it is loaded, or runs; ``held`` is what the process has after five runs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import offramp
from benchmarks._common import BUILD, one_session, report
from benchmarks.chain_overhead import CASES
from offramp import zoo
from offramp.runtime.engine.sessions import session_options

_RUN = """
import sys
import numpy as np
sys.path.insert(0, "src")
kind, path, name, batch, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
random = np.random.default_rng(0)
if name == "vit":
    inputs = {"pixel_values": random.standard_normal((batch, 3, 224, 224), np.float32)}
else:
    ids = random.integers(1000, 20000, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
import offramp
from offramp.runtime.engine.sessions import session_options
if kind == "chain":
    chain = offramp.load(path)
    run = lambda: chain.run(inputs)
else:
    import onnxruntime as ort
    session = ort.InferenceSession(path, session_options())
    feed = {f"in{i}": value for i, value in enumerate(inputs.values())}
    run = lambda: session.run(None, feed)
for _ in range(5):
    run()
sizes = dict(line.split(":") for line in open("/proc/self/status"))
print(*(int(sizes[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS")))
"""


def resident(kind: str, path: str, name: str, batch: int, tokens: int) -> tuple[float, float]:
    """Peak and final resident memory in MiB of a fresh process that loads and runs; the medians of three."""
    command = [sys.executable, "-c", _RUN, kind, path, name, str(batch), str(tokens)]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
    peak, held = (statistics.median(map(float, values)) for values in zip(*said, strict=True))
    return peak, held


def main() -> None:
    """Print one table."""
    rows = []
    for name, cases in CASES.items():
        program = offramp.capture(*zoo.load(name))
        one_session(program, BUILD / f"{name}-one", session_options())
        path = BUILD / f"{name}-blocks.offramp"
        offramp.save(program, path)
        for batch, tokens in (cases[0], cases[-1]):
            one = resident("one", str(BUILD / f"{name}-one" / "model.onnx"), name, batch, tokens)
            chain = resident("chain", str(path), name, batch, tokens)
            row = {"model": name, "batch": batch, "tokens": tokens or 257}
            for what, theirs, ours in zip(("peak", "held"), one, chain, strict=True):
                row |= {
                    f"one session, {what}": theirs,
                    f"chain, {what}": ours,
                    f"of it, {what}": round(ours / theirs, 3),
                }
            rows.append(row)
    report("memory", "MiB of a process: every block a segment, against one session", rows)


if __name__ == "__main__":
    main()

"""How much memory does a run take? Peak of a process that runs the chain, against one session's."""

from __future__ import annotations

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
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


def peak(kind: str, path: str, name: str, batch: int, tokens: int) -> float:
    """Peak resident memory in MiB of a fresh process that loads and runs; the median of three."""
    command = [sys.executable, "-c", _RUN, kind, path, name, str(batch), str(tokens)]
    found = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    return sorted(found)[1]


def main() -> None:
    """Print one table."""
    rows = []
    for name, cases in CASES.items():
        program = offramp.capture(*zoo.load(name))
        one_session(program, BUILD / f"{name}-one", session_options())
        path = BUILD / f"{name}-blocks.offramp"
        offramp.save(program, path)
        for batch, tokens in (cases[0], cases[-1]):
            one = peak("one", str(BUILD / f"{name}-one" / "model.onnx"), name, batch, tokens)
            chain = peak("chain", str(path), name, batch, tokens)
            size = {"model": name, "batch": batch, "tokens": tokens or 257}
            rows.append({**size, "one session MiB": one, "chain MiB": chain, "ratio": round(chain / one, 3)})
    report("memory", "peak memory of a process: every block a segment, against one session", rows)


if __name__ == "__main__":
    main()

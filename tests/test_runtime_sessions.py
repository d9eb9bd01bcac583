"""Threads and providers. A process sets up its pool once, so each case has a process of its own."""

from __future__ import annotations

import logging
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bundles
import pytest

import offramp
from offramp.errors import ExecutionError
from offramp.runtime.engine import cores

START = """
import os, sys, time
import numpy as np
import onnxruntime as ort
import offramp
from offramp.errors import ExecutionError

root, other = sys.argv[1], sys.argv[1] + "/tail.onnx"
ids = {"ids": np.zeros((2, 3), np.int64)}

def tasks():
    time.sleep(0.1)  # the system counts a thread for a moment after it was joined
    return len(os.listdir("/proc/self/task"))

def plain(per_session):
    options = ort.SessionOptions()
    options.use_per_session_threads = per_session
    return ort.InferenceSession(other, options, enable_fallback=0)

def refused(act, text):
    try:
        act()
    except ExecutionError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError("not refused")
"""

CASES = {
    "one pool for all chains": """
before = tasks()
chains = [offramp.load(root, threads=3) for _ in range(3)]
assert tasks() - before == 2, tasks() - before
offramp.load(root).run(ids)
assert tasks() - before == 2
plain(False)
""",
    "another number of threads": """
offramp.load(root, threads=2).run(ids)
refused(lambda: offramp.load(root, threads=3), "this process has a thread pool of 2")
refused(lambda: offramp.load(root, threads=1), "this process has a thread pool of 2")
offramp.load(root, threads=2).run(ids)
""",
    "sessions made before": """
session = plain(True)
offramp.load(root, threads=2).run(ids)
session.run(["top1"], {"hidden": np.zeros((1, 2, 8), np.float32)})
""",
    "somebody else's pool": """
ort.set_global_thread_pool_sizes(2, 1)
refused(lambda: offramp.load(root, threads=2), "a thread pool of unknown size, made outside offramp")
refused(lambda: offramp.load(root, threads=1), "made outside offramp")
offramp.load(root).run(ids)
""",
    "somebody else's pool and one thread": """
ort.set_global_thread_pool_sizes(2, 1)
refused(lambda: offramp.load(root, threads=1), "made outside offramp")
offramp.load(root).run(ids)
""",
    "somebody else's pool and one core": """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
ort.set_global_thread_pool_sizes(2, 1)
offramp.load(root).run(ids)
refused(lambda: offramp.load(root, threads=1), "made outside offramp")
offramp.load(root).run(ids)
""",
    "one thread leaves the process alone": """
before = tasks()
offramp.load(root, threads=1).run(ids)
assert tasks() == before
plain(True)
offramp.load(root, threads=2).run(ids)
""",
    "nothing but numpy and onnxruntime": """
offramp.load(root).run(ids, offramp.Confidence(0.5))
for name in ("torch", "onnx", "networkx", "transformers"):
    assert name not in sys.modules, name
""",
    "errors and manifests need not even that": """
import subprocess
text = "import sys, offramp.errors, offramp.bundle.manifest, offramp.runtime.policies.builtin; " \\
    "assert 'onnxruntime' not in sys.modules"
subprocess.run([sys.executable, "-c", text], check=True)
""",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.classifier(tmp_path_factory.mktemp("bundle") / "b")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("case", CASES)
def test_in_a_process_of_its_own(root: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + CASES[case], str(root)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_providers(root: Path) -> None:
    offramp.load(root, providers=["CPUExecutionProvider"])
    offramp.load(root, providers=[("CPUExecutionProvider", {})])
    with pytest.raises(ExecutionError, match=r"no provider Nonsense here; available: .*CPUExecutionProvider"):
        offramp.load(root, providers=["Nonsense", "CPUExecutionProvider"])
    for threads in (0, 2.5, "2"):
        with pytest.raises(ExecutionError, match=f"threads={threads!r}: at least 1"):
            offramp.load(root, threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["CPUExecutionProvider", {"CPUExecutionProvider": {}}, [("a", {}, {})], [()], [None]])
def test_providers_that_are_no_list_of_names_are_refused(root: Path, given: Any) -> None:
    with pytest.raises(ExecutionError, match="not a list of names, or of pairs of a name and its options"):
        offramp.load(root, providers=given)


def test_a_chain_cannot_be_sent_to_another_process(root: Path) -> None:
    with pytest.raises(TypeError, match="load it in each"):
        pickle.dumps(offramp.load(root))


def test_what_is_loaded_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "offramp.runtime"):
        offramp.load(root)
    assert re.search(rf"read {re.escape(str(root.resolve()))} \(\d+ files\) in", caplog.text)
    assert re.search(r"opened \d+ sessions on CPUExecutionProvider in", caplog.text)


def test_one_session_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp.runtime.engine import sessions

    opened: list[str] = []
    make = sessions._open

    def spy(path: Path, *rest: Any) -> Any:
        opened.append(path.name)
        return make(path, *rest)

    monkeypatch.setattr(sessions, "_open", spy)
    offramp.load(bundles.classifier(tmp_path / "b", shared=True))
    assert sorted(opened) == ["block1.onnx", "prologue.onnx", "tail.onnx"]


@pytest.mark.parametrize(("threads", "at_once"), [(2, 2), (1, 1)])
def test_sessions_are_opened_side_by_side(
    threads: int, at_once: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offramp.runtime.engine import sessions

    opening, most = set[str](), 0

    def slow(path: Path, *rest: Any) -> str:
        nonlocal most
        opening.add(path.name)
        time.sleep(0.1)
        most = max(most, len(opening))
        opening.remove(path.name)
        return path.name

    monkeypatch.setattr(sessions, "_open", slow)
    monkeypatch.setattr(sessions, "session_options", lambda threads: None)
    files = [path.name for path in sorted(root.glob("*.onnx"))]
    assert len(files) > 2
    assert sessions.open_sessions(root, files, None, threads) == {name: name for name in files}
    assert most == at_once


def test_physical_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores.physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "none")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    assert cores.physical_cores() == 8
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert cores.physical_cores() == 4
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "v1")
    (tmp_path / "v1/cpu").mkdir(parents=True)
    (tmp_path / "v1/cpu/cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "v1/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cores.physical_cores() == 3
    (tmp_path / "v1/cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert cores.physical_cores() == 4
    (tmp_path / "v1/cpu.max").write_text("max 100000\n")
    assert cores.physical_cores() == 4
    (tmp_path / "v1/cpu.max").write_text("120000 100000\n")
    assert cores.physical_cores() == 2

"""ONNX Runtime sessions: one per file, all on one thread pool and one arena of memory.

A session of its own per segment with ONNX Runtime's default options is several times slower than one session
for the whole model, because each spins a thread pool; and each would keep an arena for its activations. So
the process gets one pool and one arena, both of which ONNX Runtime lets a process set up once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import onnxruntime as ort

from offramp.errors import BundleError, ExecutionError
from offramp.runtime.engine.cores import physical_cores
from offramp.runtime.engine.overflow import EXACT, overflows

Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]

log = logging.getLogger(__name__)

_ERRORS_ONLY = 3
CPU = "CPUExecutionProvider"
_OTHERS_POOL = "use_per_session_threads must be false"  # in the error of a session that would have a pool of its own
_SLOWER = ["SkipLayerNormFusion"]  # on the CPU its operator takes several times as long as the sum and the norm apart
_lock = threading.Lock()
_pool: int | None = None  # threads of the process's pool; None: there is none yet, 0: it is somebody else's


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options that let sessions of one process share a thread pool and an arena.

    ``threads=None`` takes what the first call took, at first the physical cores that this process may use.
    With ``threads=1``, before any pool was made, there will be none and sessions stay independent of the
    rest of the process. Otherwise ONNX Runtime refuses, from then on, sessions with a pool of their own:
    other code in the process has to set ``use_per_session_threads = False`` or use these options.

    Raises:
        ExecutionError: the process has a pool with another number of threads already.
    """
    global _pool
    if threads is not None and (not isinstance(threads, Integral) or threads < 1):
        raise ExecutionError(f"threads={threads!r}: at least 1 thread is needed, or None for one per core")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.use_env_allocators", "1")
    with _lock:
        wanted = threads or _pool or physical_cores()
        if _pool is None:
            _share_arena()
            if wanted == 1:
                options.intra_op_num_threads = options.inter_op_num_threads = 1
                return _exact(options)
            _pool = _make_pool(wanted)
        if threads not in (None, _pool):
            whose = f"of {_pool}" if _pool else "of unknown size, made outside offramp"
            raise ExecutionError(
                f"threads={threads}: this process has a thread pool {whose}, and cannot replace it",
                hint="threads=None to use that pool; or load with the wanted number first, in a new process",
            )
    options.use_per_session_threads = False
    return _exact(options)


def _exact(options: ort.SessionOptions) -> ort.SessionOptions:
    """The options, with sums of products in 8 bits that do not overflow."""
    try:
        wrong = overflows(options)
    except Exception as error:
        if _OTHERS_POOL not in str(error):
            raise
        return options  # nothing opens with these: `_open` says why
    if wrong:
        options.add_session_config_entry(EXACT, "1")
    return options


def _make_pool(threads: int) -> int:
    try:
        ort.set_global_thread_pool_sizes(threads, 1)
    except Exception as error:
        if "already been created" in str(error):
            log.info("the process has a thread pool that was made outside offramp")
            return 0
        raise ExecutionError(f"ONNX Runtime made no pool of {threads} threads: {error}") from error
    log.info("made the process's thread pool of %d threads", threads)
    return threads


def _share_arena() -> None:
    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT), None)


def open_sessions(
    root: Path, files: Iterable[str], providers: Providers | None, threads: int | None
) -> dict[str, ort.InferenceSession]:
    """One session for each of the bundle's ``files``; ``providers=None`` means the CPU, which opens several at a time.

    Raises:
        ExecutionError: a provider is not available or could not be set up, or see `session_options`.
        BundleError: ONNX Runtime cannot load a file.
    """
    wanted = list(providers or [CPU])
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    available = ort.get_available_providers()
    missing = [name for name in names if name not in available]
    if missing:
        raise ExecutionError(f"no provider {', '.join(missing)} here; available: {', '.join(available)}")
    files, started = list(files), perf_counter()
    cores = threads or physical_cores() if names == [CPU] else 1  # a device's memory is for one after the other

    def opened(options: ort.SessionOptions) -> dict[str, ort.InferenceSession]:
        with ThreadPoolExecutor(cores) as pool:
            found = pool.map(lambda file: _open(root / file, options, wanted, names[0]), files)
            return dict(zip(files, found, strict=True))

    try:
        sessions = opened(session_options(threads))
    except _OtherPoolError:
        if threads is not None:
            raise
        sessions = opened(_of_other_pool())
    _trim()
    log.info("opened %d sessions on %s in %.2f s", len(sessions), ", ".join(names), perf_counter() - started)
    return sessions


def checked(providers: Any) -> Providers | None:
    """What `open_sessions` takes; ExecutionError where it is something else."""
    if providers is None:
        return None
    for item in providers if _is_list(providers) else [None]:
        pair: Any = (item, {}) if isinstance(item, str) else item
        if not (_is_list(pair) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping)):
            raise ExecutionError(
                f"providers={providers!r}: not a list of names, or of pairs of a name and its options",
                hint='["CPUExecutionProvider"], or [("CUDAExecutionProvider", {"device_id": 0})]',
            )
    return list(providers)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def failed(segment: str, shapes: str, error: Exception) -> ExecutionError:
    """What is to be raised where ONNX Runtime raised an error in a segment."""
    beyond = any(text in str(error) for text in ("out of data bounds", "invalid index found"))
    hint = (
        "ids that the model has, in each row as many ids that stand for features as there are of these, no more places "
        "than it has positions for, and no row that it drops (padding images)"
    )
    return ExecutionError(f"segment {segment!r} failed with {shapes}: {error}", hint=hint if beyond else None)


class _OtherPoolError(ExecutionError):
    """The process has a pool that was made outside offramp, and sessions have to use it."""


def _of_other_pool() -> ort.SessionOptions:
    """Options for the pool that somebody else has made."""
    global _pool
    with _lock:
        _pool = 0
    return session_options()


def _trim() -> None:
    """Give memory back that loading sessions freed: they leave holes that what comes next does not fill (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _open(path: Path, options: ort.SessionOptions, providers: list[Any], first: str) -> ort.InferenceSession:
    without = _SLOWER if first == CPU else None
    try:
        session = ort.InferenceSession(
            path, options, providers=providers, disabled_optimizers=without, enable_fallback=0
        )
    except Exception as error:
        if _OTHERS_POOL in str(error):
            raise _OtherPoolError(
                "threads=1: this process has a global thread pool, made outside offramp",
                hint="threads=None to use that pool",
            ) from error
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {path.name}: {error}") from error
    if session.get_providers()[0] != first:
        raise ExecutionError(
            f"ONNX Runtime could not set up {first}, only {', '.join(session.get_providers())}",
            hint="its log on stderr says which library is missing",
        )
    return session


def check_bindings(
    where: str,
    session: ort.InferenceSession,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
) -> list[str]:
    """What is wrong with a segment's bindings.

    ``inputs`` and ``outputs`` map the file's names to ONNX Runtime's types ("tensor(float)") of the values
    bound to them. All inputs have to be bound; outputs need not be.
    """
    has_inputs = {node.name: node.type for node in session.get_inputs()}
    has_outputs = {node.name: node.type for node in session.get_outputs()}
    problems = [f"{where} does not bind the input {name!r}" for name in has_inputs if name not in inputs]
    for kind, bound, has in (("input", inputs, has_inputs), ("output", outputs, has_outputs)):
        for name, wanted in bound.items():
            if name not in has:
                problems.append(f"{where} has no {kind} {name!r}; there are {', '.join(has) or 'none'}")
            elif has[name] != wanted:
                problems.append(f"{where}, {kind} {name!r} is {has[name]}, but its value is {wanted}")
    return problems

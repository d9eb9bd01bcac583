"""A bundle's files in sessions: by parts, for runs whose rows may leave, and whole, for those that go to full depth."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offramp.bundle.manifest import WEIGHTS_FILE, Manifest
from offramp.bundle.whole import divided, undivided
from offramp.errors import BundleError
from offramp.runtime.engine.binding import bind_takers
from offramp.runtime.engine.engine import Engine
from offramp.runtime.engine.memory import Device, Host, Memory, device_of, read_back
from offramp.runtime.engine.sessions import Providers, checked, open_sessions
from offramp.runtime.generation.plan import GenerationPlan

log = logging.getLogger(__name__)

AGAIN = "offramp.load the bundle again"


class Loaded(NamedTuple):
    """What runs a bundle; ``plan`` is that of generations, where it has caches."""

    engine: Engine
    plan: GenerationPlan | None


class Loader:
    """Opens sessions when a run needs them first. Threads may share one."""

    def __init__(
        self,
        manifest: Manifest,
        root: Path,
        providers: Providers | None,
        threads: int | None,
        device: tuple[str, int] | None,
        sessions: Mapping[str, Any] | None,
    ) -> None:
        self._views = {True: divided(manifest), False: undivided(manifest)}
        self._root, self._providers, self._threads = root, checked(providers), threads
        self._device = device or device_of(self._providers)
        self._sessions = dict(sessions or {})
        self._loaded: dict[bool, Loaded] = {}
        self._written = {file: _written(root / file) for file in manifest.files}
        self._lock = threading.Lock()

    def loaded(self, leaves: bool) -> Loaded:
        """What runs the bundle where rows may leave before full depth, and where they may not.

        Raises:
            BundleError, ExecutionError: see `open_sessions` and `Engine`.
        """
        with self._lock:
            found = self._loaded.get(leaves)
            if found is None:
                found = self._loaded[leaves] = self._load(leaves)
        return found

    def _load(self, leaves: bool) -> Loaded:
        manifest, other = self._views[leaves], self._loaded.get(not leaves)
        if other is not None and manifest is self._views[not leaves]:
            return other
        files = dict.fromkeys(segment.file for segment in manifest.segments.values())
        if self._device:
            files |= dict.fromkeys(manifest.take.values())
        lacking = [file for file in files if file not in self._sessions]
        try:
            self._unchanged(lacking)
            self._sessions |= open_sessions(self._root, lacking, self._providers, self._threads)
        except BundleError as error:
            if other is None or leaves:
                raise
            log.warning("%s: full depth runs by parts, which takes longer", error.reason)
            return other
        memory: Memory = Host(manifest.values, manifest.batch)
        if self._device:
            takers = bind_takers(manifest, self._sessions)
            memory = Device(manifest.values, manifest.batch, self._device, read_back(manifest), takers)
        engine = Engine(manifest, self._sessions, memory)
        plan = GenerationPlan(manifest, engine, self._sessions, self._device) if manifest.cache else None
        return Loaded(engine, plan)

    def _unchanged(self, files: Sequence[str]) -> None:
        """BundleError where a file, or the weights that it reads, is not the one that the manifest told of."""
        for file in (*files, WEIGHTS_FILE) if files else ():
            if file in self._written and _written(self._root / file) != self._written[file]:
                raise BundleError(f"{self._root}: {file} has gone or changed since the bundle was loaded", hint=AGAIN)


def _written(path: Path) -> tuple[int, int] | None:
    """What tells one writing of a file from another; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns

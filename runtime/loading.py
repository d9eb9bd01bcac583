"""A bundle's files in sessions: by parts, for runs whose rows may leave, and whole, for those that go to full depth."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from offramp.bundle.manifest import Manifest
from offramp.bundle.whole import divided, undivided
from offramp.errors import BundleError
from offramp.runtime.engine.binding import bind_takers
from offramp.runtime.engine.engine import Engine
from offramp.runtime.engine.memory import Device, Host, Memory, device_of, read_back
from offramp.runtime.engine.sessions import Providers, open_sessions
from offramp.runtime.generation.plan import GenerationPlan

log = logging.getLogger(__name__)


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
        providers = [providers] if isinstance(providers, str) else providers
        self._root, self._providers, self._threads = root, providers, threads
        self._device = device or device_of(providers)
        self._sessions = dict(sessions or {})
        self._loaded: dict[bool, Loaded] = {}
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
            self._sessions |= open_sessions(self._root, lacking, self._providers, self._threads)
        except BundleError:
            if other is None or leaves:
                raise
            log.warning("the bundle's files are not there any more: full depth runs by parts, which takes longer")
            return other
        memory: Memory = Host(manifest.values, manifest.batch)
        if self._device:
            takers = bind_takers(manifest, self._sessions)
            memory = Device(manifest.values, manifest.batch, self._device, read_back(manifest), takers)
        engine = Engine(manifest, self._sessions, memory)
        plan = GenerationPlan(manifest, engine, self._sessions, self._device) if manifest.cache else None
        return Loaded(engine, plan)

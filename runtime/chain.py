"""A loaded bundle: `load` prepares everything, `Chain.run` walks the stages and lets rows leave early."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offramp.runtime import bundle, policies
from offramp.runtime.caches import fresh
from offramp.runtime.inputs import Inputs
from offramp.runtime.manifest import Manifest, Stack, Value
from offramp.runtime.memory import DEVICES, Device, Host, Index, Memory
from offramp.runtime.plan import Call, prepare, ready_takers
from offramp.runtime.policy import Asker, Function, Policy, State, listing
from offramp.runtime.result import Result, Timing
from offramp.runtime.sessions import Providers, open_sessions
from offramp.runtime.walk import depths, execute, join, walk


def load(
    path: str | os.PathLike[str],
    providers: Providers | None = None,
    threads: int | None = None,
    verify: bool = True,
) -> Chain:
    """Load the bundle in directory ``path``.

    Args:
        path: The directory that ``offramp.save`` wrote.
        providers: ONNX Runtime's names, or (name, options), best first; None is the CPU.
        threads: Size of the process's one thread pool, None for the cores there are (see `session_options`).
        verify: Whether to compare every file's sha256 with the manifest's (about 0.6 s per GB).

    Raises:
        BundleError: the bundle is incomplete, altered, unsafe, too new, or contradicts itself.
        PolicyError: its default policy asks for exits or scores that it does not have.
        ExecutionError: a provider or a number of threads cannot be had.
    """
    manifest, root = bundle.read(path, verify=verify)
    return Chain(manifest, root, providers, threads)


class Chain:
    """A bundle's segments and the control flow between them. Threads may share one.

    Attributes:
        manifest: What the bundle says about itself.
        inputs: What `run` takes, by name.
        outputs: What it gives back.
        policy: The one that ``run(policy=None)`` uses.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: os.PathLike[str],
        providers: Providers | None = None,
        threads: int | None = None,
        *,
        _device: tuple[str, int] | None = None,
    ) -> None:
        self.manifest = manifest
        self.inputs: Mapping[str, Value] = {name: manifest.values[name] for name in manifest.inputs}
        self.outputs: Mapping[str, Value] = {k: manifest.values[v] for k, v in manifest.outputs.items()}
        self.policy = policies.from_dict(manifest.policy) if manifest.policy else policies.Never()
        self.policy.check(manifest.stacks)
        device = _device or _device_of(providers)
        files = dict.fromkeys(segment.file for segment in manifest.segments.values())
        if device:
            files |= dict.fromkeys(manifest.take.values())
        sessions = open_sessions(Path(root), files, providers, threads)
        self._memory: Memory = Host(manifest.values)
        if device:
            takers = ready_takers(manifest, sessions)
            self._memory = Device(manifest.values, device, _read_back(manifest), takers)
        self._steps = prepare(manifest, sessions, self._memory)
        self._inputs = Inputs(manifest)

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks that rows can leave early, by name."""
        return self.manifest.stacks

    def run(self, inputs: Mapping[str, Any], policy: Policy | Callable[[State], Any] | None = None) -> Result:
        """Run the model on a batch.

        Args:
            inputs: Arrays by name, as in ``self.inputs``; Python lists are converted.
            policy: Who decides which rows leave where: a policy, a function of a `State` that returns bool
                [rows], or None for ``self.policy``.

        Raises:
            InputError: the inputs do not fit.
            PolicyError: the policy asks for what is not there, or returns something else than bool [rows].
            ExecutionError: ONNX Runtime failed in a segment.
        """
        if policy is None:
            policy = self.policy
        elif not isinstance(policy, Policy):
            policy = Function(policy)  # which checks that it can be called
        policy.check(self.stacks)
        arrays, batch = self._inputs.check(inputs)
        askers = {name: Asker(policy, stack, batch) for name, stack in self.stacks.items()}
        memory, rows = self._memory, np.arange(batch)
        arrays |= fresh(self.manifest, arrays, batch)
        env = {name: memory.put(name, array) for name, array in arrays.items()}
        exits: dict[str, Index] = {}
        trace: list[Timing] = []
        for step in self._steps:
            if isinstance(step.run, Call):
                execute((step.run,), env, batch, trace)
            else:
                name = step.run.stack.name
                inner = memory.take(env, step.run.reads, None)
                left = walk(step.run, inner, rows, askers[name], memory, trace)
                env |= join(left, self.manifest.values, batch, memory)
                exits[name] = depths(left, batch)
            env = memory.take(env, step.live, None)
        outputs = {name: memory.get(env[value]) for name, value in self.manifest.outputs.items()}
        scores = {name: asker.record for name, asker in askers.items()}
        return Result(outputs, exits, scores, tuple(trace))

    def __repr__(self) -> str:
        manifest = self.manifest
        size = sum(file.bytes for file in manifest.files.values())
        files = len({segment.file for segment in manifest.segments.values()})
        lines = [
            f"<offramp.Chain {manifest.model!r}, {manifest.precision}, {size:,} bytes",
            f"  inputs {_listed(self.inputs)}; outputs {_listed(self.outputs)}",
            listing(manifest.stacks),
            f"  {len(manifest.segments)} segments of {files} files; policy {self.policy!r}>",
        ]
        return "\n".join(line for line in lines if line)


def _listed(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _device_of(providers: Providers | None) -> tuple[str, int] | None:
    """The device whose memory the first provider works in: ("cuda", its id); None for the host."""
    if not providers:
        return None
    first = providers[0]
    name, options = (first, {}) if isinstance(first, str) else first
    return (DEVICES[name], int(options.get("device_id", 0))) if name in DEVICES else None


def _read_back(manifest: Manifest) -> frozenset[str]:
    """The values that only the host needs: scores and outputs that no segment reads."""
    exits = [exit_ for stack in manifest.stacks.values() for exit_ in stack.exits]
    found = set(manifest.outputs.values())
    for exit_ in exits:
        found.update(exit_.scores.values(), exit_.outputs.values())
    return frozenset(found).difference(*(segment.inputs.values() for segment in manifest.segments.values()))

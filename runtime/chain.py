"""A loaded bundle: `load` prepares everything, `Chain.run` walks the stages and lets rows leave early."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from offramp.bundle import directory
from offramp.bundle.manifest import WEIGHTS_FILE, Manifest, Stack, Value
from offramp.bundle.options import Sampling
from offramp.bundle.precision import against_fp32
from offramp.errors import InputError
from offramp.runtime.engine import widths
from offramp.runtime.engine.inputs import Inputs, present
from offramp.runtime.engine.sessions import Providers
from offramp.runtime.generation.beams import search
from offramp.runtime.generation.cache_memory import fresh
from offramp.runtime.generation.generator import Generator, stream
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.speculation import in_last, refuse, verified
from offramp.runtime.generation.stopping import Ends, own_tokenizer
from offramp.runtime.generation.tokens import Generated, Token
from offramp.runtime.loading import Loader
from offramp.runtime.policies import builtin
from offramp.runtime.policies.base import Policy, State, as_policy, listing
from offramp.runtime.policies.group_policy import asked_at
from offramp.runtime.policies.width import parted
from offramp.runtime.preprocess.image_text import completed
from offramp.runtime.result import Result

log = logging.getLogger(__name__)

_LARGE = 1 << 24  # bytes of weights: fewer are verified before a thread has started


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
    started = perf_counter()
    manifest, root = directory.read(path, verify=False)
    unverified = set(manifest.files if verify else ())
    large = {name for name in unverified if name == WEIGHTS_FILE and manifest.files[name].bytes >= _LARGE}
    directory.verified(path, manifest, root, unverified - large)
    log.info("read %s (%d files) in %.2f s", root, len(manifest.files), perf_counter() - started)
    if not large:
        return Chain(manifest, root, providers, threads)
    with ThreadPoolExecutor(1) as beside:  # ONNX Runtime copies weights, which are numbers alone, in the meantime
        weights = beside.submit(directory.verified, path, manifest, root, large)
        try:
            return Chain(manifest, root, providers, threads)
        finally:
            weights.result()


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
        _sessions: Mapping[str, Any] | None = None,
    ) -> None:
        self.manifest = manifest
        self._root = Path(root)
        self.inputs: Mapping[str, Value] = {name: manifest.values[name] for name in manifest.inputs}
        self.outputs: Mapping[str, Value] = {k: manifest.values[v] for k, v in manifest.outputs.items()}
        self.policy = builtin.from_dict(manifest.policy) if manifest.policy else builtin.Never()
        policy, _ = self._asked(None)
        self._inputs = Inputs(manifest)
        self._loader = Loader(manifest, self._root, providers, threads, _device, _sessions)
        early = any(len(stack.exits) > 1 for stack in manifest.stacks.values())
        self._loaded = self._loader.loaded(early if manifest.policy is None else self._leaves(policy))

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks that rows can leave early, by name; ``STACK.GROUP`` where tokens leave in groups."""
        return self.manifest.leaving

    def run(self, inputs: Mapping[str, Any], policy: Policy | Callable[[State], Any] | None = None) -> Result:
        """Run the model on a batch.

        Args:
            inputs: Arrays by name, as in ``self.inputs``; Python lists are converted. Inputs that ``insert-cache`` made
                part of the graph (``manifest.cache.implied``: padding masks, positions) may be given as they are made
                there: nothing is padding. None is as if it were left out.
            policy: Who decides which rows leave where: a policy, a function of a `State` that returns bool
                [rows], or None for ``self.policy``.

        Raises:
            InputError: the inputs do not fit.
            PolicyError: the policy asks for what is not there, or returns something else than bool [rows].
            ExecutionError: ONNX Runtime failed in a segment.
        """
        policy, width = self._asked(policy)
        refuse(policy, "run() generates nothing")
        inputs = present(self.manifest, inputs)
        arrays, batch, sizes = self._inputs.check(completed(self.manifest, inputs))
        arrays |= {**fresh(self.manifest, arrays, batch), **width}
        engine = self._loader.loaded(self._leaves(policy)).engine
        policies, memory = asked_at(self.manifest.stacks, policy, batch, sizes), engine.memory
        ran = engine.run({name: memory.put(name, array) for name, array in arrays.items()}, batch, policies)
        outputs = {name: memory.get(ran.values[value]) for name, value in self.manifest.outputs.items()}
        for name in self.manifest.cut:
            axis = self.outputs[name].shape.index(self.manifest.cache.chunk)  # type: ignore[union-attr]
            outputs[name] = outputs[name][(slice(None),) * axis + (slice(self._inputs.ahead(inputs), None),)]
        return Result(outputs, ran.exits, ran.scores, tuple(ran.trace), ran.widths.by_row(batch), ran.widths.share)

    def stream(
        self,
        inputs: Mapping[str, Any],
        policy: Policy | Callable[[State], Any] | None = None,
        *,
        propagate: str = "defer",
        max_pending: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Iterator[Token]:
        """Generate token by token; nothing is shared with other runs, so it may be left at any point.

        Args:
            inputs: Arrays by name, as in ``self.inputs``. Token ids may be rows of different lengths; without
                them the bundle's own prompt is used. A padding mask that is part of the graph
                (``manifest.cache.implied``) may be given: what it hides at the ends of a row is dropped, so that
                positions count the others, as in transformers' ``generate``.
            policy: Who decides which rows leave where, for each token: see `run`. A prompt of more than one token
                runs to full depth.
            propagate: "defer" computes the deeper blocks of tokens that left early when a later token goes deep
                (exact); "hidden" computes them from the hidden state at the exit (CALM); "kv" takes the keys and
                values of the block before the exit for theirs, which loses most (as MuE's code does, to compare with).
            max_pending: Compute deeper blocks as soon as so many tokens of a row wait for them.
            tokenizer: What tells where ``stop_strings`` end a row, as tokenizers and transformers have it; None for
                the bundle's own.
            options: Fields of `Sampling`: ``temperature``, ``top_k``, ``max_new_tokens``, ``stop``, ... Those that are
                left out are the bundle's own (``manifest.generation``), else `Sampling`'s; None is the latter.

        Yields:
            A `Token` for each row and step, rows in order. With `Verify` those that full depth has checked: of some
            rows none in a step, of others several.

        Raises:
            InputError: the bundle has no cache, or inputs and options do not fit it.
            PolicyError, ExecutionError: as for `run`.
        """
        session = self._session(inputs, policy, options, tokenizer, propagate=propagate, max_pending=max_pending)
        if session.sampling.beams > 1:
            whose = "" if "beams" in options else "the bundle's own "
            raise InputError(
                f"{whose}beams={session.sampling.beams}: beam search knows a row's tokens at its end, not one by one",
                hint="beams=1; or generate",
            )
        return _tokens(session)

    def generate(
        self,
        inputs: Mapping[str, Any],
        policy: Policy | Callable[[State], Any] | None = None,
        *,
        propagate: str = "defer",
        max_pending: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Generated:
        """All tokens of all rows, and the depth of each; arguments and errors as for `stream`.

        With ``beams`` the text that beam search finds: by its log-probability over ``length ** length_penalty``, the
        best of those that ended. Each beam has its own depth.
        """
        session = self._session(inputs, policy, options, tokenizer, propagate=propagate, max_pending=max_pending)
        if session.sampling.beams > 1:
            found = search(session)
            session.end()
            return replace(found, width=session.decoder.widths.share, encoders=session.exits)
        tokens: list[list[int]] = [[] for _ in session.prompts]
        exits: list[list[int]] = [[] for _ in session.prompts]
        for step in _tokens(session):
            tokens[step.row].append(step.token)
            exits[step.row].append(step.exit)
        return Generated(
            tuple(np.array(row, np.int64) for row in tokens),
            tuple(np.array(row, np.int64) for row in exits),
            width=session.decoder.widths.share,
            encoders=session.exits,
        )

    def rows_of(self, name: str) -> tuple[int, int] | None:
        """Where rows lie in an input or output: the dimension, and how many places each has; None where it has none."""
        return {**self.inputs, **self.outputs}[name].place(self.manifest.batch)

    @property
    def generates(self) -> str | None:
        """The input of token ids that `stream` and `generate` extend; None for a bundle that does not generate."""
        try:
            return self._loaded.plan.tokens_input() if self._loaded.plan else None
        except InputError:
            return None

    def generator(
        self,
        inputs: Mapping[str, Any],
        policy: Policy | Callable[[State], Any] | None = None,
        *,
        propagate: str = "defer",
        max_pending: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Generator:
        """A generation step by step: tokens appended by hand, or chosen, and taken back; arguments as for `stream`.

        Raises:
            InputError: the bundle has no cache, or inputs and options do not fit it, beams among them.
            PolicyError: `Verify` checks what it has generated, so it cannot be stopped between.
        """
        refuse(self._asked(policy)[0], "a generation by hand")
        session = self._session(inputs, policy, options, tokenizer, propagate=propagate, max_pending=max_pending)
        if session.sampling.beams > 1:
            raise InputError(f"beams={session.sampling.beams}: a generator has one text of each row", hint="beams=1")
        return Generator(session)

    def session(self, inputs: Mapping[str, Any], policy: Any = None) -> Session:
        """A generation to be fed by hand, in which nobody chooses tokens; of it has run what runs once."""
        refuse(self._asked(policy)[0], "a generation by hand")
        return self._session(inputs, policy, None)

    def _session(
        self,
        inputs: Mapping[str, Any],
        policy: Any,
        options: Mapping[str, Any] | None,
        tokenizer: Any = None,
        **deferral: Any,
    ) -> Session:
        """A generation, nothing of it run but what runs once; without ``options`` nobody chooses tokens."""
        if self.manifest.cache is None:
            raise InputError("this bundle has no caches, so it does not generate", hint="insert-cache before export")
        policy, width = self._asked(policy)
        plan = self._loader.loaded(self._leaves(policy)).plan
        assert plan is not None
        policy, drafts = in_last(policy, plan.stacks[-1])
        inputs = present(self.manifest, inputs)
        prompts = plan.prompts(inputs)
        sampling = (
            Sampling()
            if options is None
            else plan.sampling(max(row.size for row in prompts), options, plan.ahead(inputs))
        )
        if drafts and sampling.beams > 1:
            refuse(policy, "beam search keeps several texts of a row (beams=1 keeps one)")
        if drafts and any(value not in ("defer", None) for value in deferral.values()):
            raise InputError("drafts are checked by full depth, and bounded by their number", hint="Verify(drafts=...)")
        if sampling.stop_strings and tokenizer is None:
            tokenizer = self._tokenizer
        ends = Ends(sampling.stop, sampling.stop_strings, tokenizer)
        return Session(plan, inputs, prompts, policy, sampling, ends, width, **deferral)

    @cached_property
    def _tokenizer(self) -> Any:
        return own_tokenizer(self.manifest, self._root)

    def _leaves(self, policy: Policy) -> bool:
        """Whether a policy is asked anywhere: before full depth, or there about a token of a short list."""
        exits = [(name, exit_) for name, stack in self.stacks.items() for exit_ in stack.asking]
        return any(
            (policy.picks if exit_.after == self.stacks[name].blocks else policy.measures)(name, exit_) is not None
            for name, exit_ in exits
        )

    def _asked(self, policy: Policy | Callable[[State], Any] | None) -> tuple[Policy, Mapping[str, Any]]:
        """The policy of exits, and the width as a value, where the bundle has learners."""
        if policy is None:
            policy = self.policy
        policy, width = parted(as_policy(policy), self.manifest)
        policy.check(self.stacks)
        return policy, width

    def __reduce__(self) -> Any:
        raise TypeError("a Chain holds sessions of ONNX Runtime, which no other process can have: load it in each")

    def __repr__(self) -> str:
        manifest = self.manifest
        size = sum(file.bytes for file in manifest.files.values())
        files = len({segment.file for segment in manifest.segments.values()})
        lines = [
            f"<offramp.Chain {manifest.model!r}, {manifest.precision}, {size:,} bytes",
            f"  inputs {_listed(self.inputs)}; outputs {_listed(self.outputs)}",
            listing(manifest.leaving),
            widths.listing(manifest),
            f"  {text}" if (text := against_fp32(manifest)) else "",
            f"  {len(manifest.segments)} segments of {files} files; policy {self.policy!r}>",
        ]
        return "\n".join(line for line in lines if line)


def _tokens(session: Session) -> Iterator[Token]:
    _, drafts = in_last(session.policy, session.plan.stacks[-1])
    yield from verified(session, drafts) if drafts else stream(session)
    session.end()


def _listed(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())

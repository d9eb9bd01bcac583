"""``check``: will this model work? Every block gets an exit; then export, run, and compare with torch."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from offramp import models
from offramp.bundle import directory
from offramp.bundle.precision import ANSWERS, ERROR, EXITS
from offramp.bundle.whole import exported
from offramp.errors import ExportError, OfframpError
from offramp.export import save
from offramp.export.encode import Precision, precisions
from offramp.export.fewer_bits import in_fewer_bits
from offramp.export.validation import Arrays, eager, given, worst
from offramp.passes import InsertExits, Truncate, apply
from offramp.passes.caches.chunks import cached_stacks, check_chunks
from offramp.passes.caches.fully_masked import comparable_outputs
from offramp.passes.default import with_caches
from offramp.passes.infra.spec import as_passes
from offramp.program import Program, capture
from offramp.program.compare import TOLERANCE
from offramp.program.forward import ExampleInputs, named_outputs
from offramp.program.of_mapping import by_names
from offramp.program.sizes import at_other_sizes
from offramp.program.unwrap import as_captured, plain, unchanged
from offramp.runtime import Chain, Never, load

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StackReport:
    """A stack that was found: its name, role, number of blocks, and whether it keeps a cache."""

    name: str
    role: str
    blocks: int
    cached: bool


@dataclass
class Report:
    """What a check found. What it did not reach is None.

    Attributes:
        model: What the caller calls the model.
        ok: Whether the model works, with every figure of ``max_error`` within the tolerance. A causal model that
            cannot have caches (a classifier, say) works without: it has exits, and generates nothing.
        stage: Where it failed: model, capture, structure, rewrite, export, load, run or precision.
        reason: What failed, and what to try; of a model that works, why it has no caches (None where it has, and
            where no stack is causal).
        stacks: The stacks, in the order in which they run.
        segments: How many segments the bundle has.
        exits: How many exits before full depth.
        max_error: Largest errors, relative to the scale of what was expected: ``graph`` (eager against
            captured), ``chain`` (eager against the chain at full depth), ``exits`` (every forced exit against
            the same truncation in torch), ``cache`` (step by step against one pass), ``other_shapes`` (batch
            sizes and lengths that were not captured), and where a precision was asked for ``precision`` (the
            chain in that against the one in fp32, by the root of mean squares, on all of these inputs).
        precision: The precision that was asked for.
        agreement: Where that is not fp32, the shares of ``answers`` and of ``exits`` taken that are the same.
        seconds: Wall time by step.
        bytes: Sizes of the model's parameters and of the bundle, in that precision.
    """

    model: str
    ok: bool = False
    stage: str | None = None
    reason: str | None = None
    stacks: list[StackReport] = field(default_factory=list)
    segments: int | None = None
    exits: int | None = None
    max_error: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("graph", "chain", "exits", "cache", "other_shapes"))
    )
    precision: Precision = "fp32"
    agreement: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("capture", "rewrite", "export", "run"))
    )
    bytes: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(("parameters", "bundle")))

    def to_json(self) -> str:
        """One line of JSON. An error that is no number (shapes differ, say) is null; ``reason`` has it.

        It has precision and agreement where a precision was asked for.
        """
        fields = asdict(self)
        if self.precision == "fp32":
            del fields["precision"], fields["agreement"]
        fields["max_error"] = {name: _rounded(error) for name, error in self.max_error.items()}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def check(
    model: str | nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    pipeline: str | None = None,
    precision: Precision = "fp32",
    loss: float | None = None,
    ignore_generation: Collection[str] = (),
    name: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Take a model through capture, rewriting, export and the runtime, and compare at every step.

    Args:
        model: a name that `offramp.models.resolve` knows, or a module.
        example_inputs: for a module, as ``offramp.capture`` takes them.
        pipeline: passes instead of caches, where the model can generate with them, and an exit with a shared head
            after every block of every stack; "" for none.
        precision: as for ``offramp.save``: once the bundle in fp32 is checked, it is compared with one in this.
        loss: as for ``offramp.save``.
        ignore_generation: settings of an ``hf:`` model's generation_config that count as not set; others that a bundle
            cannot say are refused.
        name: what the report calls the model; its name or class if None.
        progress: as for ``offramp.save``.

    What offramp refuses, and what differs from torch, is in the report. An exception other than OfframpError
    passes through: it is a fault of the model's own code or of offramp.
    """
    checker = Check(
        model,
        example_inputs,
        pipeline=pipeline,
        precision=precision,
        loss=loss,
        ignore_generation=ignore_generation,
        name=name,
        progress=progress,
    )
    return checker.run()


class Check:
    """A check that keeps what it knows: after an exception ``report`` has it, and ``stage`` says where."""

    def __init__(
        self,
        model: str | nn.Module,
        example_inputs: ExampleInputs | None = None,
        *,
        pipeline: str | None = None,
        precision: Precision = "fp32",
        loss: float | None = None,
        ignore_generation: Collection[str] = (),
        name: str | None = None,
        progress: Progress | None = None,
        note: Callable[[str], None] = models.log.warning,
    ) -> None:
        self._note = note
        self._model, self._inputs, self._pipeline, self._progress = model, example_inputs, pipeline, progress
        self._precision, self._loss, self._ignore_generation = precision, loss, ignore_generation
        self.report = Report(name or (model if isinstance(model, str) else type(model).__name__), precision=precision)
        self.stage = "model"
        self._wrong: list[str] = []

    def run(self) -> Report:
        """All steps; see `check`."""
        try:
            with tempfile.TemporaryDirectory(prefix="offramp-check-") as folder:
                self._steps(Path(folder) / "model.offramp")
        except OfframpError as error:
            self._failed_by(error, error.stage)
        return self.report

    def _failed_by(self, error: OfframpError, stage: str) -> None:
        self.failed(stage, error.reason if error.hint is None else f"{error.reason}; try: {error.hint}")

    def failed(self, stage: str, reason: str) -> None:
        """Note in the report that the model does not work."""
        self.report.ok, self.report.stage = False, stage
        self.report.reason = " ".join(reason.split())

    def _captured(self, module: nn.Module, inputs: ExampleInputs) -> Program:
        if isinstance(self._model, str) and isinstance(inputs, dict | tuple):
            return models.captured(self._model, module, inputs, capture, self._note)[0]
        return capture(module, inputs)

    def _steps(self, path: Path) -> None:
        report = self.report
        passes = None if self._pipeline is None else as_passes(self._pipeline)  # before anything that takes long
        encodes = precisions(self._precision) != {"fp32"}
        module, inputs = (
            models.resolve(self._model, self._note)() if isinstance(self._model, str) else (self._model, self._inputs)
        )
        module, inputs = by_names(plain(module), inputs)
        if isinstance(self._model, str):
            models.check_generation(self._model, module, self._ignore_generation)
        report.bytes["parameters"] = sum(weight.nbytes for weight in module.parameters())
        with self._timed("capture"):
            program = self._captured(module, inputs if inputs is not None else {})
            stacks = program.require_stacks().values()
        report.stacks = [StackReport(stack.name, stack.role, stack.blocks, cached=False) for stack in stacks]
        captured = program
        with self._timed("rewrite"):
            if passes is None:
                everywhere = [InsertExits(stack.name, after="all", head="shared") for stack in stacks]
                program, uncached = with_caches(program)
                report.reason = uncached and f"no caches: {' '.join(uncached.split())}"
                program = apply(program, everywhere)
            else:
                program = apply(program, passes)
        cached = cached_stacks(program)
        report.stacks = [replace(stack, cached=stack.name in cached) for stack in report.stacks]
        report.exits = len(_forced(program))
        with self._timed("export"):
            validated = save(program, path, name=report.model, progress=self._progress)
        report.bytes["bundle"] = sum(file.stat().st_size for file in path.iterdir())
        with self._timed("run"):
            chain = load(path)
            report.segments = len(exported(chain.manifest).segments)
            with as_captured(module), torch.no_grad():
                self._compare(module, captured, program, chain)
                if _forced(program):
                    report.max_error["exits"] = validated["exits"]
                if program.cache is not None:
                    report.max_error["cache"] = max(check_chunks(captured, program), validated["cache"])
        if encodes and not self._wrong:
            with self._timed("precision"):
                try:
                    self._encode(program, path)
                except ExportError as error:
                    self._failed_by(error, self.stage)
                    return
        if self._wrong:
            self.failed("run", "; ".join(self._wrong))
        report.ok = not self._wrong

    def _encode(self, program: Program, path: Path) -> None:
        """The bundle in fewer bits, on the example and at other sizes."""
        manifest = exported(directory.read(path)[0])
        sizes = [program.example_inputs, *(inputs for inputs, _ in at_other_sizes(program))]
        samples = [given(program, inputs) for inputs in sizes]
        found = in_fewer_bits(manifest, path, self._precision, samples, self._loss)
        self.report.bytes["bundle"] = sum(file.stat().st_size for file in path.iterdir())
        self.report.max_error["precision"] = found.validation[ERROR]
        shares = {"answers": found.validation.get(ANSWERS), "exits": found.validation.get(EXITS)}
        self.report.agreement = {name: round(share, 4) for name, share in shares.items() if share is not None}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self.stage = step
        started = perf_counter()
        try:
            yield
        finally:
            self.report.seconds[step] = round(perf_counter() - started, 2)

    def _compare(self, module: nn.Module, captured: Program, program: Program, chain: Chain) -> None:
        inputs = {name: program.example_inputs[name] for name in program.inputs}
        whole = program.as_captured({**inputs, **program.implied(inputs)})
        expected, rewritten = _outputs(module, whole, program), eager(program, inputs)
        if other := _computes_something_else(program):
            self._figure("graph", "the captured graph", _arrays(eager(captured, whole)), expected)
            by = worst(_arrays(rewritten), expected)
            self.report.reason = f"{other} the model, by {by:.1e} of its scale: the chain is compared with the program"
            expected = rewritten
        else:
            settled = _settled(captured, program, whole, _arrays(rewritten), expected)
            self._figure("graph", "the captured graph", *settled)
        settled = _settled(captured, program, whole, _run(program, chain, inputs), expected)
        self._figure("chain", "the chain at full depth", *settled)
        for others, made in at_other_sizes(program):
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in others.items())
            whole = program.as_captured({**others, **program.implied(others)})
            try:
                expected = made if other else _outputs(module, whole, program)
            except Exception:  # noqa: BLE001 - sizes that the model's own code does not take
                expected = made
            found = _run(program, chain, others)
            self._figure("other_shapes", f"the chain on {sizes}", *_settled(captured, program, whole, found, expected))

    def _figure(self, key: str, what: str, found: Arrays, expected: Mapping[str, Tensor]) -> None:
        error = worst(found, expected)
        self.report.max_error[key] = max(error, self.report.max_error[key] or 0.0)
        if not error <= TOLERANCE:
            self._wrong.append(f"{what} differs from torch: relative error {error:.1e}, allowed {TOLERANCE:.0e}")


def _outputs(module: nn.Module, inputs: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    """The model's own outputs that the program has too."""
    with unchanged(module):
        return {name: value for name, value in named_outputs(module(**inputs)).items() if name in program.outputs}


def _computes_something_else(program: Program) -> str | None:
    """Which passes have made another function of the model, as they are meant to; None where none has."""
    if any(item.site != "mlp" for item in program.learners):
        return "insert-acm has split projections, which until they are trained change"
    cut = any(step.partition("{")[0] == Truncate.name for step in program.history)
    return "truncate has changed" if cut else None


def _settled(
    captured: Program, program: Program, inputs: Mapping[str, Tensor], found: Arrays, expected: Mapping[str, Tensor]
) -> tuple[Arrays, Mapping[str, Tensor]]:
    """What is compared: of tokens that see nothing as in `comparable_outputs`, where a program with caches differs."""
    if program.cache is None or worst(found, expected) <= TOLERANCE:
        return found, expected
    tensors = {name: torch.tensor(value) for name, value in found.items()}
    for behind in (True, False):
        pair = comparable_outputs(captured, inputs, expected, tensors, behind=behind)
        if pair is not None and worst(_arrays(pair[1]), pair[0]) <= TOLERANCE:
            return _arrays(pair[1]), pair[0]
    return found, expected


def _forced(program: Program) -> list[tuple[str, int]]:
    """The exits before full depth: stack and number of blocks."""
    return [(item.stack, item.after) for item in program.exits if item.after < program.stacks[item.stack].blocks]


def _run(program: Program, chain: Chain, inputs: Mapping[str, Tensor]) -> Arrays:
    return chain.run(given(program, inputs), Never()).outputs


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in tensors.items()}


def _rounded(error: float | None) -> float | None:
    return None if error is None or not math.isfinite(error) else float(f"{error:.2g}")

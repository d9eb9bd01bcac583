"""What training minimises: deep supervision, distillation between depths, gates.

An objective names what it wants of the program (outputs, or values of nodes) and makes losses of it. Batches hold
the program's inputs, and ``labels``: class indices (whole numbers) for each place of the logits, ``IGNORED`` (-100)
where nothing counts. They are compared as they stand: those of a language model are its ids, shifted to the left.
Objectives that need no labels count every place, or those where ``labels`` is not `IGNORED` if given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import SpecError
from offramp.passes.infra.contract import stack_named
from offramp.program.exit import Exit
from offramp.program.graph import results, sizes_of
from offramp.program.program import Program
from offramp.training.losses import IGNORED, Values, aligned, counted, cross_entropy

if TYPE_CHECKING:
    from offramp.training.objective_module import ObjectiveModule


class Objective:
    """Base of all: stateless, and the same for every process of a run.

    ``wants`` and ``losses`` do for one run of the program on the batch's inputs. Where values of nodes are to be given,
    or a ``teacher`` is asked, ``compute`` says what runs. Where ``learners`` is True, ``train="added"`` trains those of
    ``insert-acm`` and their gates, too; to other objectives they are part of the model.
    """

    teacher: Program | None = None  # frozen
    learners: ClassVar[bool] = False

    def check(self, program: Program) -> None:
        """Raise a SpecError where the program lacks what this needs."""

    def wants(self, program: Program, step: int) -> Sequence[str]:
        """The outputs of the program, or names of its nodes, that this step needs."""
        raise NotImplementedError

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        """Scalars by name, whose sum is minimised; ``values`` holds what `wants` named."""
        raise NotImplementedError

    def compute(self, model: ObjectiveModule, batch: Values, step: int) -> dict[str, Tensor]:
        """The losses of a batch, of what ``model`` computes."""
        return self.losses(model.program, model.values(self.wants(model.program, step), batch), batch)


def require_objective(objective: Any) -> None:
    """Raise a SpecError where this is no objective."""
    if isinstance(objective, Objective):
        made = type(objective)
        lacking = [name for name in ("wants", "losses") if getattr(made, name) is getattr(Objective, name)]
        if lacking and made.compute is Objective.compute:
            raise SpecError(f"{made.__name__} does not say {' and '.join(lacking)}", hint="see Objective")
        return
    if isinstance(objective, type) and issubclass(objective, Objective):
        raise SpecError(
            f"{objective.__name__} is a class: an objective of it is needed", hint=f"{objective.__name__}()"
        )
    many = isinstance(objective, list | tuple)
    raise SpecError(
        f"a {type(objective).__name__} is no objective",
        hint="Together((..., ...)) for several" if many else "DeepSupervision(), or your own class of Objective",
    )


def require_one_run(objective: Objective) -> None:
    """Raise a SpecError where an objective decides what runs: its losses cannot be those of another's run."""
    require_objective(objective)
    if type(objective).compute is not Objective.compute:
        raise SpecError(f"{type(objective).__name__} cannot be part of another objective", hint="train with it alone")


def require_classes(program: Program, output: str, hint: str = "an Objective of your own for such answers") -> None:
    """Raise a SpecError where an output has one number for each answer: as logits of one class, none would be wrong.

    Places of a text are classes too, those of a question's answer.
    """
    node = results(program.graph).get(output) or program.nodes[output]
    sizes = sizes_of(node)
    if not sizes or sizes[-1] in (1, program.axes.batch):
        described = [program.axes.describe(size) for size in sizes]
        raise SpecError(f"output {output!r} of shape {described} has no classes on its last axis", hint=hint)


def require_next(program: Program, batch: Values) -> None:
    """Raise a SpecError where a model of causal blocks alone is to say the tokens that it is given."""
    labels = batch.get("labels")
    if (
        not isinstance(labels, Tensor)
        or labels.dim() < 2
        or any(stack.role != "decoder" for stack in program.stacks.values())
    ):
        return
    counts = labels != IGNORED
    for name in program.inputs:
        ids = batch.get(name)
        if (
            ids is None
            or ids.shape != labels.shape
            or ids.is_floating_point()
            or not torch.equal(ids[counts], labels[counts])
        ):
            continue
        if not torch.equal(ids[:, 1:][counts[:, :-1]], labels[:, :-1][counts[:, :-1]]):
            raise SpecError(
                f"the labels are the tokens of {name!r} in their own places, which each position sees",
                hint=f"those that follow: labels[:, :-1] = {name}[:, 1:], and labels[:, -1] = {IGNORED}",
            )


def require_numbers(**numbers: tuple[float, float, float]) -> None:
    """Raise a SpecError where one of these is no finite number between its limits."""
    for name, (value, least, most) in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value) or not least <= value <= most:
            upwards = "finite" if least == -math.inf else f"at least {least:g}"
            limits = f"from {least:g} to {most:g}" if most < math.inf else upwards
            raise SpecError(f"{name}={value!r}: a number, {limits}")


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of one output of the program, which needs no exits."""

    output: str = "logits"
    smoothing: float = 0.0

    def check(self, program: Program) -> None:
        require_numbers(smoothing=(self.smoothing, 0, 1))
        if self.output not in program.outputs:
            raise SpecError(
                f"the program has no output {self.output!r}; there are {list(program.outputs)}",
                hint=f"output={program.outputs[0]!r}",
            )
        require_classes(program, self.output)

    def wants(self, program: Program, step: int) -> Sequence[str]:
        return [self.output]

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        require_next(program, batch)
        return {"final": cross_entropy(values[self.output], batch, self.smoothing)}


@dataclass(frozen=True)
class _AtExits(Objective):
    """What objectives over a stack's exits share.

    ``stack`` may be left out where one stack has exits with outputs, ``output`` where one is named logits or there is
    one. ``sample`` draws that many exits for each step, all if None; ``seed`` starts the draws.
    """

    stack: str | None = None
    output: str | None = None
    sample: int | None = None
    seed: int = 0

    def check(self, program: Program) -> None:
        self.exits(program)
        require_classes(program, self.final(program))
        if self.sample is not None and (not isinstance(self.sample, Integral) or self.sample < 1):
            raise SpecError(f"sample={self.sample}: at least one exit a step, a whole number")

    def _stack(self, program: Program) -> str:
        """The stack whose exits are meant."""
        having = list(dict.fromkeys(item.stack for item in program.exits if item.outputs))
        return having[0] if self.stack is None and len(having) == 1 else stack_named(program, self.stack)

    def exits(self, program: Program) -> list[Exit]:
        """The exits before full depth, shallowest first."""
        name = self._stack(program)
        found = [e for e in program.exits_of(name) if e.after < program.stacks[name].blocks and e.outputs]
        if not found:
            raise SpecError(f"stack {name!r} has no exits with outputs", hint=f"insert-exits{{stack={name}}} first")
        return found

    def final(self, program: Program) -> str:
        """The output that holds logits at full depth."""
        there = list(self.exits(program)[0].outputs)
        name = self.output or ("logits" if "logits" in there else there[0] if len(there) == 1 else None)
        if name not in there:
            others = ", and Together for several" if len(there) > 1 else ""
            raise SpecError(f"which output holds logits? The exits have {there}", hint=f"output={there[0]!r}{others}")
        return name

    def drawn(self, program: Program, step: int) -> list[Exit]:
        """The exits of this step."""
        there = self.exits(program)
        if self.sample is None or self.sample >= len(there):
            return there
        chosen = random.Random(f"{self.seed} {step}").sample(range(len(there)), self.sample)
        return [there[i] for i in sorted(chosen)]

    def wants(self, program: Program, step: int) -> Sequence[str]:
        output = self.final(program)
        return [output, *(item.outputs[output] for item in self.drawn(program, step))]

    def given(self, program: Program, values: Values) -> dict[int, Tensor]:
        """The logits of the exits that were computed, by ``after``."""
        output = self.final(program)
        return {e.after: values[e.outputs[output]] for e in self.exits(program) if e.outputs[output] in values}


@dataclass(frozen=True)
class DeepSupervision(_AtExits):
    """Cross-entropy at every exit and at full depth: ``L_avg + L_N`` (DEED, arXiv 2311.08623, sec. 3.2).

    ``weights`` by ``after`` (full depth is the number of blocks) replaces DEED's: ``1/N`` for each of N depths, and one
    more for the last. With ``sample`` the drawn exits stand for all, so the expected loss is the same.
    """

    weights: Mapping[int, float] | None = None
    smoothing: float = 0.0

    def check(self, program: Program) -> None:
        super().check(program)
        require_numbers(smoothing=(self.smoothing, 0, 1))
        known = {item.after for item in self.exits(program)} | {program.stacks[self._stack(program)].blocks}
        if self.weights is None:
            return
        if not isinstance(self.weights, Mapping):
            raise SpecError(
                f"weights={self.weights!r}: numbers by how many blocks were run",
                hint=f"weights={dict.fromkeys(known, 1.0)}",
            )
        if wrong := sorted(set(self.weights) - known):
            raise SpecError(f"weights for {wrong}: the stack has exits after {sorted(known)}")
        require_numbers(**{f"weights[{after}]": (weight, 0, math.inf) for after, weight in self.weights.items()})

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        require_next(program, batch)
        depth, count = program.stacks[self._stack(program)].blocks, len(self.exits(program)) + 1
        weights = self.weights
        if weights is None:
            weights = {e.after: 1 / count for e in self.exits(program)} | {depth: 1 + 1 / count}
        given = self.given(program, values)
        share = (count - 1) / len(given)
        found = {"final": weights.get(depth, 0.0) * cross_entropy(values[self.final(program)], batch, self.smoothing)}
        for after, logits in given.items():
            found[f"exit {after}"] = weights.get(after, 0.0) * share * cross_entropy(logits, batch, self.smoothing)
        return found


@dataclass(frozen=True)
class DepthWeighted(_AtExits):
    """Cross-entropy weighted by depth, and layer-wise distillation below the exit (FREE, arXiv 2310.05424, sec. 4.1).

    ``(sum_i i L_i) / sum_i i + alpha * MSE``: the hidden states of the blocks below the deepest exit follow those of
    as many blocks spread over the stack, which get no gradient from it. ``align`` pairs them: "last" the two last ones,
    "unif" one to one, "dyna" from the deepest on each teacher with the nearest student below the one taken before.
    """

    alpha: float = 0.5
    align: Literal["dyna", "unif", "last"] = "dyna"
    smoothing: float = 0.0

    def check(self, program: Program) -> None:
        super().check(program)
        require_numbers(smoothing=(self.smoothing, 0, 1), alpha=(self.alpha, 0, math.inf))
        if self.align not in ("dyna", "unif", "last"):
            raise SpecError(f"align={self.align!r}: there are dyna, unif and last")

    def wants(self, program: Program, step: int) -> Sequence[str]:
        students, teachers = self._layers(program)
        return [*super().wants(program, step), *students, *teachers]

    def _layers(self, program: Program) -> tuple[list[str], list[str]]:
        """The nodes of the students' and the teachers' hidden states."""
        stack = program.stacks[self._stack(program)]
        below = self.exits(program)[-1].after
        spread = [(i + 1) * stack.blocks // below for i in range(below)]
        return [stack.cuts[i + 1] for i in range(below)], [stack.cuts[i] for i in spread]

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        require_next(program, batch)
        depth = program.stacks[self._stack(program)].blocks
        by_depth = {**self.given(program, values), depth: values[self.final(program)]}
        total = sum(by_depth)
        found = {
            "final" if after == depth else f"exit {after}": after / total * cross_entropy(logits, batch, self.smoothing)
            for after, logits in by_depth.items()
        }
        students, teachers = ([values[name].float() for name in names] for names in self._layers(program))
        pairs = aligned(students, [teacher.detach() for teacher in teachers], self.align)
        found["layers"] = self.alpha * torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()
        return found


@dataclass(frozen=True)
class SelfDistillation(_AtExits):
    """Exits learn what full depth says, which learns nothing from it; needs no labels.

    ``KL(final || exit)`` at ``temperature``, times its square (Hinton et al., arXiv 1503.02531), and ``hard`` times the
    cross-entropy, at the same temperature, with the class that full depth prefers.
    """

    temperature: float = 1.0
    hard: float = 0.0

    def check(self, program: Program) -> None:
        super().check(program)
        require_numbers(temperature=(self.temperature, 1e-3, math.inf), hard=(self.hard, 0, math.inf))

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        final = values[self.final(program)].detach()
        given = self.given(program, values)
        counts = counted(final, batch)
        teacher = final[counts].float()
        soft = F.log_softmax(teacher / self.temperature, -1)
        found = {}
        for after, logits in given.items():
            student = F.log_softmax(logits[counts].float() / self.temperature, -1)
            loss = F.kl_div(student, soft, reduction="batchmean", log_target=True) * self.temperature**2
            if self.hard:
                loss = loss + self.hard * F.nll_loss(student, teacher.argmax(-1))
            found[f"exit {after}"] = loss / len(given)
        return found


@dataclass(frozen=True)
class LearnedGates(_AtExits):
    """The score "learned" tells whether an exit's prediction is that of full depth (CALM, arXiv 2207.07061, sec. 3.1).

    Binary cross-entropy in which both answers weigh the same, however rare one is. Train it apart from what it judges,
    with ``train="added"``.
    """

    def check(self, program: Program) -> None:
        super().check(program)
        if lacking := [item.after for item in self.exits(program) if "learned" not in item.scores]:
            raise SpecError(
                f"the exits after {lacking} have no learned gate", hint="insert-scores{measure=learned} first"
            )

    def wants(self, program: Program, step: int) -> Sequence[str]:
        return [*super().wants(program, step), *(item.scores["learned"] for item in self.drawn(program, step))]

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        final = values[self.final(program)]
        counts = counted(final, batch)
        given = self.given(program, values)
        found = {}
        for item in self.exits(program):
            if item.after not in given:
                continue
            right = (given[item.after].argmax(-1) == final.argmax(-1))[counts].float()
            score = values[item.scores["learned"]].reshape(counts.shape)[counts].float().clamp(1e-6, 1 - 1e-6)
            share = right.mean().clamp(1 / (2 * len(right)), 1 - 1 / (2 * len(right)))
            weight = torch.where(right == 1, 0.5 / share, 0.5 / (1 - share))
            found[f"gate {item.after}"] = F.binary_cross_entropy(score, right, weight) / len(given)
        return found


@dataclass(frozen=True)
class Together(Objective):
    """Several objectives at once: their losses are added up."""

    parts: tuple[Objective, ...]

    def check(self, program: Program) -> None:
        if not isinstance(self.parts, tuple | list) or not self.parts:
            raise SpecError(f"parts={self.parts!r}: several objectives are needed", hint="Together((..., ...))")
        for part in self.parts:
            require_one_run(part)
            part.check(program)

    def wants(self, program: Program, step: int) -> Sequence[str]:
        return [name for part in self.parts for name in part.wants(program, step)]

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        kinds = [type(part).__name__ for part in self.parts]
        names = [
            kind if kinds.count(kind) == 1 else f"{kind} {kinds[: i + 1].count(kind)}" for i, kind in enumerate(kinds)
        ]
        return {
            f"{kind}: {name}": loss
            for kind, part in zip(names, self.parts, strict=True)
            for name, loss in part.losses(program, values, batch).items()
        }

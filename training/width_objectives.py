"""What trains adaptive width: learners, then gates, then all for the task (ACM, arXiv 2312.10193, sec. 3.2).

One program is trained for a range of widths: a step draws the share of the learners that tokens are to take on average,
which the gates read. ``mask`` names what says in a batch which tokens count, where it has the tokens' shape.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import SpecError
from offramp.program.graph import expression, is_tensor, results, shape
from offramp.program.program import Program
from offramp.training.allocation import allocate
from offramp.training.learner_sites import (
    MASK,
    LearnerSite,
    arranged,
    by_row,
    check_teacher,
    counting,
    learner_sites,
    require_teacher,
    rest_of,
    token_names,
    width,
)
from offramp.training.losses import Values, counted, relative_error
from offramp.training.objectives import Objective, require_classes, require_numbers, require_one_run

if TYPE_CHECKING:
    from offramp.training.objective_module import ObjectiveModule


@dataclass(frozen=True)
class LearnerDistillation(Objective):
    """Any number of learners makes the best of what the MLP made (ACM, sec. 3.2, phase 1); needs no labels.

    The mean over sites, counts ``k`` from 1 and tokens of ``||h(z, k) - o||^2 / mean ||o||^2``, with what each site
    reads and makes in the frozen ``teacher`` (the program before ``insert-acm``) on the batch: sites do not depend on
    each other, and gates learn nothing.
    """

    learners: ClassVar[bool] = True
    teacher: Program = field(repr=False)
    mask: str | None = MASK

    def check(self, program: Program) -> None:
        check_teacher(program, self.teacher)

    def compute(self, model: ObjectiveModule, batch: Values, step: int) -> dict[str, Tensor]:
        sites = _sites(model)
        taught, values = _taught(model, batch, sites)
        errors = []
        for site in sites:
            wanted = taught[site.output].float()
            counts = counting(model.program, batch, self.mask, site.output, wanted)
            size = _mean(wanted.square().sum(-1), counts).clamp(min=1e-12)
            found = [_mean((made - wanted).square().sum(-1), counts) for k, made in site.outputs(values) if k]
            errors.append(torch.stack(found).mean() / size)
        return {"learners": torch.stack(errors).mean()}


@dataclass(frozen=True)
class GateDistillation(Objective):
    """Gates learn where learners are worth most, for each width (in the place of ACM, sec. 3.2, phase 2); no labels.

    An error ``e(k)`` is how far the hidden state behind the block moves where the site makes ``h(z, k)``, and all else
    is the teacher's, squared and over its squared norm; where attention follows the site, how far what it makes is off,
    over the same. For a width there is one price ``lambda`` for which the choices ``argmin_k e(k) + lambda cost(k)`` of
    all tokens and sites of the batch take that share of the learners' FLOPs: the allocation of least error. The loss is

    - what a gate's choice is expected to lose against that, ``sum_k p(k) (e(k) + lambda cost(k)) - min_k``, in units of
      what the allocation itself costs: a few tokens have most of the error, and labels alone do not say which;
    - ``labels`` times the cross-entropy with the allocation (the paper's loss);
    - ``budget`` times what the choices that are made cost more or less than the width, at the same price;

    the mean over ``draws`` widths a step between ``low`` and ``high``. Learners get no gradient.
    """

    learners: ClassVar[bool] = True
    teacher: Program = field(repr=False)
    low: float = 0.25
    high: float = 1.0
    draws: int = 4
    labels: float = 0.1
    budget: float = 1.0
    mask: str | None = MASK
    seed: int = 0

    def check(self, program: Program) -> None:
        _check_widths(self.low, self.high)
        require_numbers(labels=(self.labels, 0, math.inf), budget=(self.budget, 0, math.inf))
        if not isinstance(self.draws, Integral) or self.draws < 1:
            raise SpecError(f"draws={self.draws}: at least one width a step")
        check_teacher(program, self.teacher)

    def compute(self, model: ObjectiveModule, batch: Values, step: int) -> dict[str, Tensor]:
        program, sites = model.program, _sites(model)
        errors, counts, taught = self._errors(model, batch, sites)
        costs = [error.new_tensor(site.counts) * site.flops for error, site in zip(errors, sites, strict=True)]
        drawn, losses = random.Random(f"{self.seed} {step}").random(), list[Tensor]()
        for part in range(self.draws):
            share = self.low + (self.high - self.low) * (part + drawn) / self.draws
            given = {**taught, **width(program, share, errors[0])}
            choices = model.values([site.learners.choice for site in sites], batch, given)
            logits = [choices[site.learners.choice][at].float() for site, at in zip(sites, counts, strict=True)]
            losses.append(self._loss(logits, errors, costs, share))
        # an error that is not finite gives labels that mean nothing: the loss says so
        return {"gates": torch.stack(losses).mean() + 0 * torch.stack([error.sum() for error in errors]).sum()}

    def _loss(
        self, logits: Sequence[Tensor], errors: Sequence[Tensor], costs: Sequence[Tensor], share: float
    ) -> Tensor:
        """Of one width; all are ``[tokens, counts]`` for each site, costs ``[counts]``."""
        best, price = allocate(errors, costs, share)
        lost, least, spent, most, apart = (list[Tensor]() for _ in range(5))
        for logit, error, cost, label in zip(logits, errors, costs, best, strict=True):
            paid = error + price * cost
            lost.append((logit.softmax(-1) * (paid - paid.amin(-1, keepdim=True))).sum(-1))
            least.append(error.gather(1, label[:, None])[:, 0])
            spent.append(_made(logit) @ cost)
            most.append(cost.max().expand(len(error)))
            apart.append(F.cross_entropy(logit, label))
        allowed = share * torch.cat(most).mean()
        unit = (torch.cat(least).mean() + price.abs() * allowed).clamp(min=1e-12)
        beside = price.abs() * (torch.cat(spent).mean() - allowed).abs()
        return (torch.cat(lost).mean() + self.budget * beside) / unit + self.labels * torch.stack(apart).mean()

    def _errors(
        self, model: ObjectiveModule, batch: Values, sites: Sequence[LearnerSite]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """For each site the errors ``[tokens, counts]`` of tokens that count, which those are, and what it reads."""
        rests = model.known("rests", lambda: [rest_of(self.teacher, site) for site in sites])
        read = [name for rest in rests for name in (rest.end, *(rest.beside or ()))]
        with torch.no_grad():
            taught, values = _taught(model, batch, sites, read)
            errors, which = [], []
            for site, (end, beside) in zip(sites, rests, strict=True):
                wanted, state = taught[site.output], taught[end].float()
                counts = counting(model.program, batch, self.mask, site.output, wanted)
                lying, its = token_names(self.teacher, end), token_names(model.program, site.output)
                size = arranged(state.square().sum(-1), lying, its)
                same = size.shape == counts.shape or (counts.dim() == 1 and size.numel() == counts.numel())
                size = (size.reshape(counts.shape)[counts] if same else size.mean()).clamp(min=1e-12)
                found = []
                for _, made in site.outputs(values):
                    if same and beside is not None:
                        given = {**{name: taught[name] for name in beside}, site.output: made.to(wanted.dtype)}
                        lost = model.taught([end], batch, given)[end].float() - state
                        moved = arranged(lost.square().sum(-1), lying, its)
                        found.append(moved.reshape(counts.shape)[counts] / size)
                    else:
                        found.append((made - wanted.float()).square().sum(-1)[counts] / size)
                errors.append(torch.stack(found, -1))
                which.append(counts)
        return errors, which, {site.input: taught[site.input] for site in sites}


@dataclass(frozen=True)
class WidthBudget(Objective):
    """The program does its task at any width (ACM, sec. 3.2, phase 3, and one model for all widths).

    The losses of ``task``, and of following ``teacher`` in ``output`` (an output or a node of both): ``KL(teacher ||
    program)`` of logits, or with ``distance="mse"`` the squared error over the teacher's square. One of the two is
    needed. A teacher follows nothing that is trained, with ``train="all"`` neither. To that come

    - ``states`` times how far hidden states are from the teacher's after the same block, squared, over the variance of
      these; the mean over the last block of each stack and its exits. They say more of an example than its logits do;
    - ``budget |mean_i b_i - b|``: ``b_i`` is the share of the learners' FLOPs that sample ``i`` takes, ``b`` the step's
      width, drawn between ``low`` and ``high``;
    - ``-entropy mean H(a) / log K``: ``a`` are the shares of the ``K`` choices among a sample's tokens at a site;
    - ``-diversity mean |b_i - b_m|`` over pairs of samples (which the paper prints with the other sign).

    All three have the choices that are made, and the gradient of their probabilities. The last two are weighted with
    ``4 b (1 - b)``: at the ends of the range nothing is left to distribute, and they would pull the width away.
    """

    learners: ClassVar[bool] = True
    task: Objective | None = None
    teacher: Program | None = field(default=None, repr=False)
    output: str = "logits"
    distance: Literal["kl", "mse"] = "kl"
    low: float = 0.25
    high: float = 1.0
    budget: float = 0.1
    entropy: float = 0.05
    diversity: float = 0.05
    states: float = 0.0
    mask: str | None = MASK
    seed: int = 0

    def check(self, program: Program) -> None:
        _check_widths(self.low, self.high)
        require_numbers(budget=(self.budget, 0, math.inf), states=(self.states, 0, math.inf))
        any_number = -math.inf, math.inf
        require_numbers(entropy=(self.entropy, *any_number), diversity=(self.diversity, *any_number))
        learner_sites(program)
        if self.task is None and self.teacher is None:
            raise SpecError("neither task nor teacher: nothing to be good at", hint="task=CrossEntropy()")
        if self.states and self.teacher is None:
            raise SpecError(f"states={self.states}: without a teacher there are none to follow", hint="teacher=")
        if self.teacher is not None:
            require_teacher(self.teacher)
        if self.task is not None:
            require_one_run(self.task)
            self.task.check(program)
        if self.distance not in ("kl", "mse"):
            raise SpecError(f"distance={self.distance!r}: there are kl and mse")
        if self.teacher is not None:
            _check_output(program, self.teacher, self.output)
            self._states(program)
            if self.distance == "kl":
                require_classes(program, self.output, hint="distance='mse'")

    def compute(self, model: ObjectiveModule, batch: Values, step: int) -> dict[str, Tensor]:
        program, sites = model.program, _sites(model)
        share = random.Random(f"{self.seed} {step}").uniform(self.low, self.high)
        wanted = [site.learners.choice for site in sites]
        wanted += self.task.wants(program, step) if self.task else []
        states = model.known("states", lambda: self._states(program))
        wanted += [self.output, *states] if self.teacher else []
        values = model.values(wanted, batch, width(program, share, next(program.module.parameters())))
        found = dict(self.task.losses(program, values, batch)) if self.task else {}
        if self.teacher is not None:
            taught = model.taught([self.output, *states.values()], batch)
            found["teacher"] = self._distance(program, values[self.output], taught, batch)
            apart = [self._apart(program, name, values[name], taught[its], batch) for name, its in states.items()]
            if apart:
                found["states"] = self.states * torch.stack(apart).mean()
        shares, entropy = self._choices(program, sites, values, batch)
        room = 4 * share * (1 - share)
        found["budget"] = self.budget * (shares.mean() - share).abs()
        found["entropy"] = -self.entropy * room * entropy
        pairs = max(1, len(shares) * (len(shares) - 1))
        found["diversity"] = -self.diversity * room * (shares[:, None] - shares[None]).abs().sum() / pairs
        return found

    def _distance(self, program: Program, found: Tensor, taught: Values, batch: Values) -> Tensor:
        teacher = taught[self.output].float()
        counts = counting(program, batch, self.mask, self.output, teacher)
        if self.distance == "mse":
            return F.mse_loss(found[counts].float(), teacher[counts]) / teacher[counts].square().mean()
        if getattr(batch.get("labels"), "shape", None) == counts.shape:
            counts = counts & counted(teacher, batch)
        student, soft = F.log_softmax(found[counts].float(), -1), F.log_softmax(teacher[counts], -1)
        return F.kl_div(student, soft, reduction="batchmean", log_target=True)

    def _states(self, program: Program) -> dict[str, str]:
        """Nodes of hidden states after the last block of each stack and its exits; the teacher's that these follow."""
        found: dict[str, str] = {}
        if self.teacher is None or not self.states:
            return found
        for name, stack in program.stacks.items():
            own, its = (_size(each, name) for each in (program, self.teacher))
            if own != its:
                raise SpecError(
                    f"stack {name!r} has {own}, the teacher {its}: no hidden states to follow",
                    hint="the program before insert-acm; or states=0",
                )
            taught = self.teacher.stacks[name]
            followed = {stack.blocks, *(item.after for item in program.exits_of(name))}
            found |= {stack.cuts[after]: taught.cuts[after] for after in followed}
        return found

    def _apart(self, program: Program, name: str, found: Tensor, taught: Tensor, batch: Values) -> Tensor:
        counts = counting(program, batch, self.mask, name, taught)
        return relative_error(found[counts].float(), taught[counts].float())

    def _choices(
        self, program: Program, sites: Sequence[LearnerSite], values: Values, batch: Values
    ) -> tuple[Tensor, Tensor]:
        """The share of the learners' FLOPs that each sample takes ``[rows]``, and the mean entropy of its choices.

        Samples of which no token counts are left out.
        """
        taken, most, entropies = list[Tensor](), list[Tensor](), list[Tensor]()
        for site in sites:
            name, logits = site.learners.choice, values[site.learners.choice].float()
            counts = by_row(
                program, batch, name, counting(program, batch, self.mask, name, logits)[..., None]
            )  # [rows, tokens, 1]
            chosen = _made(by_row(program, batch, name, logits)) * counts
            tokens = counts.sum(1).clamp(min=1)
            taken.append((chosen.sum(1) @ chosen.new_tensor(site.counts)) * site.flops)
            most.append(counts.sum((1, 2)) * site.learners.learners * site.flops)
            among = chosen.sum(1) / tokens  # [rows, counts]
            # a log a is 0 where a is, but has no gradient there; that of a choice by one token more is near enough
            entropies.append(-(among * among.detach().maximum(1 / tokens).log()).sum(-1) / math.log(len(site.counts)))
        paid = torch.stack(most)  # [sites, rows]
        there = paid.sum(0) > 0
        share = torch.stack(taken).sum(0)[there] / paid.sum(0)[there]
        return share, torch.stack(entropies)[paid > 0].mean()


def _sites(model: ObjectiveModule) -> list[LearnerSite]:
    return model.known("sites", lambda: learner_sites(model.program))


def _size(program: Program, name: str) -> str:
    """The size of a stack, in words."""
    if name not in program.stacks:
        return "no such stack"
    stack = program.stacks[name]
    return f"{stack.blocks} blocks of {expression(shape(program.nodes[stack.output])[-1])} features"


def _taught(
    model: ObjectiveModule, batch: Values, sites: Sequence[LearnerSite], more: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the sites read and make in the teacher (and ``more`` of it), and what `LearnerSite.outputs` needs on it."""
    taught = model.taught([*more, *(name for site in sites for name in (site.input, site.output))], batch)
    given = {site.input: taught[site.input] for site in sites}
    return taught, model.values([name for site in sites for name in site.parts], batch, given)


def _made(logits: Tensor) -> Tensor:
    """The choices that are made, one-hot, with the gradient of their probabilities."""
    soft = logits.softmax(-1)
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()


def _mean(value: Tensor, counts: Tensor) -> Tensor:
    """Over the places that count; 0 where none does."""
    return value.where(counts, 0).sum() / counts.sum().clamp(min=1)


def _check_output(program: Program, teacher: Program, output: str) -> None:
    """Raise a SpecError where one of the two lacks the output, or has other features (classes, say) than the other."""
    sizes = {}
    for who, each in (("program", program), ("teacher", teacher)):
        node = results(each.graph).get(output) or each.nodes.get(output)
        if node is None or not is_tensor(node):
            raise SpecError(f"the {who} has no output {output!r}; there are {list(each.outputs)}")
        sizes[who] = expression(shape(node)[-1])
    if all(isinstance(size, int) for size in sizes.values()) and sizes["program"] != sizes["teacher"]:
        raise SpecError(
            f"the program's {output!r} has {sizes['program']} places on its last axis, the teacher's "
            f"{sizes['teacher']}: nothing to follow",
            hint="a teacher with the same classes; or output=NODE, a hidden state that both have, and distance='mse'",
        )


def _check_widths(low: float, high: float) -> None:
    require_numbers(low=(low, 0, 1), high=(high, 0, 1))
    if low > high:
        raise SpecError(f"low={low}, high={high}: widths lie between 0 and 1, low first")

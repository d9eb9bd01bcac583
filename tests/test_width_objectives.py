"""Adaptive width is trained: learners follow the MLP, gates spend a budget where it is worth most, all does a task."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import architectures
import decoders
import pytest
import shared
import tiny
import torch
from breadth import slow_but
from safetensors.torch import load_file
from test_training_fit import Cutting, KilledError, digest, weights
from torch import Tensor

import offramp
from offramp.errors import SpecError, TrainingError
from offramp.program import Program, capture
from offramp.program.learners import WIDTH
from offramp.training import (
    CrossEntropy,
    DeepSupervision,
    GateDistillation,
    LearnedGates,
    LearnerDistillation,
    Objective,
    SelfDistillation,
    Together,
    WidthBudget,
    fit,
    width_objectives,
)
from offramp.training.allocation import Allocation, allocate
from offramp.training.learner_sites import MASK, by_row, check_teacher, counting, learner_sites, rest_of, width
from offramp.training.objective_module import ObjectiveModule

FACTORIES = {**architectures.REQUIRED, **decoders.REQUIRED}
TEXTS = ["bert", "vit", "wav2vec2", "llama", "gpt2", "t5", "bart", "whisper"]
Batch = dict[str, Tensor]


@functools.cache
def captured(make: Callable[[], torch.nn.Module] = tiny.Encoder) -> Program:
    return capture(tiny.seeded(make), tiny.text() if make is tiny.Encoder else {"x": tiny.signal()})


def pair(options: str = "", make: Callable[[], torch.nn.Module] = tiny.Encoder) -> tuple[Program, Program]:
    """A teacher with weights of its own, and the program with learners that shares all but its MLPs' with it."""
    teacher = captured(make)
    teacher = dataclasses.replace(teacher, graph_module=copy.deepcopy(teacher.graph_module))
    return teacher, offramp.apply(teacher, f"insert-acm{options}")


def batch(seed: int = 1, rows: int = 8) -> Batch:
    return {"input_ids": tiny.ids(rows=rows, seed=seed), "attention_mask": tiny.padding(rows=rows)}


def batches(count: int = 8) -> list[Batch]:
    return [batch(seed) for seed in range(count)]


def losses(program: Program, objective: Objective, given: Batch | None = None, step: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = ObjectiveModule(program, objective)(given or batch(), step)
    return found


def site_errors(program: Program, teacher: Program, given: Batch) -> Tensor:
    """The squared errors of each count of learners, [sites, counts, ...], on what sites read in the teacher."""
    model = ObjectiveModule(program, LearnerDistillation(teacher))
    found = []
    with torch.no_grad():
        for site in learner_sites(program):
            taught = model.taught([site.input, site.output], given)
            values = model.values(site.parts, given, {site.input: taught[site.input]})
            found.append(torch.stack([(h - taught[site.output]).square().sum(-1) for _, h in site.outputs(values)]))
    return torch.stack(found)


def executed(program: Program, teacher: Program, given: Batch, share: float) -> Tensor:
    """How many learners each token takes on what sites read in the teacher, [sites, ...]."""
    model = ObjectiveModule(program, LearnerDistillation(teacher))
    sites = learner_sites(program)
    with torch.no_grad():
        taught = model.taught([site.input for site in sites], given)
        choices = model.values(
            [site.learners.choice for site in sites],
            given,
            {**taught, **width(program, share, next(iter(taught.values())))},
        )
    return torch.stack([choices[site.learners.choice].argmax(-1) + site.learners.least for site in sites])


def gates(program: Program) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights(program).items() if ".gate." in name}


def undecided(program: Program) -> Program:
    """Gates that choose otherwise for each token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in program.module.named_parameters():
            if ".gate." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return program


# Learners


@pytest.mark.parametrize("name", ["encoder", "decoder", "two_stacks"])
def test_outputs_are_those_of_so_many_learners(name: str, request: pytest.FixtureRequest) -> None:
    _same_as_the_program(request.getfixturevalue(name).program)


def _same_as_the_program(teacher: Program) -> Program:
    """What `LearnerSite.outputs` makes is what the program computes where every token takes so many."""
    program = offramp.apply(teacher, ",".join(f"insert-acm{{stack={stack}}}" for stack in teacher.stacks))
    model, given = ObjectiveModule(program, LearnerDistillation(teacher)), dict(teacher.example_inputs)
    for site in learner_sites(program):
        taught = model.taught([site.input], given)
        values = model.values(site.parts, given, taught)
        for count, made in site.outputs(values):
            fixed = width(program, count / 4, made)
            torch.testing.assert_close(made, model.values([site.output], given, {**taught, **fixed})[site.output])
    return program


def test_learners_learn_and_nothing_else_does() -> None:
    teacher, program = pair()
    before, frozen, still = site_errors(program, teacher, batch()), digest(program, of_added=False), gates(program)
    curve = fit(program, batches(), LearnerDistillation(teacher), epochs=10, rate=3e-3, log_every=40)
    after = site_errors(program, teacher, batch())
    assert curve[-1].loss < 0.8 * curve[0].loss
    assert (after[:, 1:4].flatten(2).mean(-1) < 0.8 * before[:, 1:4].flatten(2).mean(-1)).all()
    assert digest(program, of_added=False) == frozen
    assert all(torch.equal(weight, still[name]) for name, weight in gates(program).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    teacher = copy.deepcopy(shared.captured(FACTORIES[name]))
    program, given = _same_as_the_program(teacher), dict(teacher.example_inputs)
    _learns(program, teacher, given)


def _learns(program: Program, teacher: Program, given: Batch) -> None:
    """Fewer learners do better everywhere after training on one batch, and gates learn to choose."""

    def error() -> list[float]:
        model = ObjectiveModule(program, LearnerDistillation(teacher))
        found = []
        for site in learner_sites(program):
            taught = model.taught([site.input, site.output], given)
            values = model.values(site.parts, given, {site.input: taught[site.input]})
            made = [h for k, h in site.outputs(values) if 0 < k < 4]
            found.append(torch.stack([(h - taught[site.output]).square().sum() for h in made]).sum().item())
        return found

    before = error()
    fit(program, [given], LearnerDistillation(teacher), epochs=40, rate=3e-3)
    assert all(new < 0.9 * old for new, old in zip(error(), before, strict=True))
    curve = fit(program, [given], GateDistillation(teacher), epochs=60, rate=1e-2, log_every=20)
    assert curve[-1].loss < curve[0].loss
    wanted = WidthBudget(teacher=teacher, output=program.stacks[next(iter(program.stacks))].output, distance="mse")
    curve = fit(program, [given], wanted, epochs=30, train="all", log_every=10)
    assert curve[-1].loss < curve[0].loss


def test_sites_do_not_depend_on_each_other() -> None:
    teacher, program = pair()
    parameters = dict(program.module.named_parameters())
    mine = {
        block: [w for name, w in parameters.items() if name.startswith(f"learners.encoder.{block}.")]
        for block in (1, 4)
    }

    def gradients(block: int) -> list[Tensor]:
        program.module.zero_grad()
        losses(program, LearnerDistillation(teacher))["learners"].backward()
        return [weight.grad.clone() for weight in mine[block] if weight.grad is not None]

    first, last = gradients(1), gradients(4)
    with torch.no_grad():
        for weight in mine[1]:
            weight.mul_(1.5)
    assert len(last) == 3
    torch.testing.assert_close(gradients(4), last)
    assert not any(torch.allclose(new, old) for new, old in zip(gradients(1), first, strict=True))


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation])
def test_padding_does_not_count(kind: Any) -> None:
    teacher, program = pair()
    fit(program, batches(), LearnerDistillation(teacher), steps=5)
    plain, changed = batch(), batch()
    changed["input_ids"] = plain["input_ids"].clone()
    changed["input_ids"][-1, -2:] = (plain["input_ids"][-1, -2:] + 3) % tiny.WORDS
    one, other = (losses(program, kind(teacher), given) for given in (plain, changed))
    torch.testing.assert_close(one, other)
    one, other = (losses(program, kind(teacher, mask=None), given) for given in (plain, changed))
    assert all(abs(one[name] - other[name]).item() > 1e-5 for name in one)


def test_a_mask_of_another_stack_is_not_read(two_stacks: tiny.Captured) -> None:
    """Not even where both have as many tokens."""
    teacher = two_stacks.program
    program = offramp.apply(teacher, "insert-acm{stack=decoder}")
    given = {**two_stacks.inputs, "source_ids": tiny.ids(), "source_mask": tiny.padding()}
    one, other = (losses(program, LearnerDistillation(teacher, mask=mask), given) for mask in ("source_mask", None))
    assert torch.equal(one["learners"], other["learners"])
    both = offramp.apply(program, "insert-acm{stack=encoder}")
    one, other = (losses(both, LearnerDistillation(teacher, mask=mask), given) for mask in ("source_mask", None))
    assert not torch.allclose(one["learners"], other["learners"])


def test_a_divergence_of_what_has_no_classes_is_refused() -> None:
    class Number(tiny.Talker):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"number": super().forward(input_ids)[..., :1]}

    teacher = offramp.capture(tiny.seeded(Number), {"input_ids": tiny.ids()})
    program = offramp.apply(teacher, "insert-acm")
    WidthBudget(teacher=teacher, output="number", distance="mse").check(program)
    with pytest.raises(SpecError, match=r"'number' .*has no classes.*\n  try: distance='mse'"):
        WidthBudget(teacher=teacher, output="number").check(program)


def test_a_mask_that_no_batch_has_is_refused(labeller: tiny.Captured) -> None:
    program = offramp.apply(labeller.program, "insert-acm")
    with pytest.raises(SpecError, match=r"mask='atention_mask': a batch has attention_mask, input_ids\n  try: one of"):
        losses(program, LearnerDistillation(labeller.program, mask="atention_mask"), labeller.inputs)


@pytest.mark.parametrize("rows", [4, 7])
def test_a_mask_by_rows_of_tokens_that_lie_time_first(rows: int) -> None:
    """Also where there are as many rows as tokens."""

    class Masked(tiny.TimeFirst):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * attention_mask.T[..., None])

    example = {"x": torch.randn(7, 5, 16), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    program = capture(
        tiny.seeded(Masked),
        example,
        dynamic={"x": {0: "tokens", 1: "batch"}, "attention_mask": {0: "batch", 1: "tokens"}},
    )
    mask = torch.ones(rows, 7, dtype=torch.int64)
    mask[0, 3:] = 0
    name = next(iter(program.stacks["encoder"].cuts[1:]))
    found = counting(program, {"attention_mask": mask}, "attention_mask", name, torch.randn(7, rows, 16))
    assert torch.equal(found, mask.T.bool())


class Flat(torch.nn.Module):
    """An MLP that reads the tokens of all rows one after another, and what it does before."""

    def __init__(self, mlp: torch.nn.Module, before: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.mlp, self.before = mlp, before

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.mlp(self.before(x.flatten(0, 1))).view(x.shape)
        return made


class FlatTimeFirst(tiny.TimeFirst):
    """Tokens lie time first, the mask by rows; MLPs read all tokens one after another."""

    def __init__(self, before: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = Flat(block.mlp, before)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * attention_mask.T[..., None])


class AddmmTimeFirst(FlatTimeFirst):
    """The same by products that read all tokens one after another, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = torch.nn.Sequential(*(Addmm(part) for part in block.mlp.mlp))


class Addmm(torch.nn.Module):
    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.part, torch.nn.Linear):
            return cast(Tensor, self.part(x))
        weight, bias = self.part.weight, self.part.bias
        return torch.addmm(bias, x.view(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], len(bias))


def time_first(make: Callable[[], torch.nn.Module] = FlatTimeFirst, dynamic: dict[str, Any] | None = None) -> Program:
    x = torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(0))
    example = {"x": x, "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    axes = {"x": {0: "tokens", 1: "batch"}, "attention_mask": {0: "batch", 1: "tokens"}}
    return capture(tiny.seeded(make), example, dynamic=axes if dynamic is None else dynamic)


@pytest.mark.parametrize("rows", [5, 7])
@pytest.mark.parametrize("make", [FlatTimeFirst, AddmmTimeFirst, functools.partial(FlatTimeFirst, torch.relu)])
def test_a_mask_by_rows_of_tokens_time_first_one_after_another(make: Callable[[], Any], rows: int) -> None:
    """Those that count are the mask's, also by a mask beside the model's own; each sample has a share of its own."""
    program = offramp.apply(time_first(make), "insert-acm")
    mask = torch.ones(rows, 7, dtype=torch.int64)
    mask[0, 3:] = 0
    given = {"x": torch.randn(7, rows, 16), "attention_mask": mask, "counts": mask == 0}
    for site in learner_sites(program):
        for name in (site.output, site.learners.choice):
            tokens = torch.arange(7.0)[:, None].expand(7, rows).reshape(-1, 1)
            assert tokens.shape[0] == rows * 7
            found = [counting(program, given, which, name, tokens) for which in ("attention_mask", "counts")]
            assert torch.equal(found[0], mask.T.reshape(-1).bool())
            assert torch.equal(found[1], ~found[0])
            assert torch.equal(by_row(program, given, name, tokens)[..., 0], torch.arange(7.0).expand(rows, 7))


@pytest.mark.parametrize("dynamic", [{}, {"x": {1: "batch"}, "attention_mask": {0: "batch"}}])
def test_a_mask_of_tokens_one_after_another_where_sizes_are_fixed(dynamic: dict[str, Any]) -> None:
    program = offramp.apply(time_first(dynamic=dynamic), "insert-acm")
    mask = (torch.arange(7) < torch.tensor([3, 7, 7, 5, 7])[:, None]).long()
    found = counting(program, {"attention_mask": mask}, MASK, learner_sites(program)[0].output, torch.zeros(35, 16))
    assert torch.equal(found, mask.T.reshape(-1).bool())


def test_a_mask_by_rows_that_the_model_does_not_read() -> None:
    """Of tokens time first, one after another or not."""
    mask = (torch.arange(7) < torch.tensor([3, 7, 7, 5, 7])[:, None]).long()
    for flat in (True, False):
        model = tiny.seeded(tiny.TimeFirst)
        for block in model.blocks:
            block.mlp = Flat(block.mlp) if flat else block.mlp
        program = offramp.apply(capture(model, {"x": tiny.signal()}), "insert-acm")
        given = {"x": torch.randn(7, 5, 16), "attention_mask": mask}
        tokens = torch.zeros(35, 16) if flat else torch.zeros(7, 5, 16)
        found = counting(program, given, MASK, learner_sites(program)[0].output, tokens)
        assert torch.equal(found, mask.T.reshape(found.shape).bool())


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation, WidthBudget])
def test_padding_does_not_count_in_tokens_time_first_one_after_another(kind: Any) -> None:
    """All losses are those of the model that has them on two axes."""

    class Apart(FlatTimeFirst):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.mlp = block.mlp.mlp

    mask = (torch.arange(7) < torch.tensor([3, 7, 7, 5])[:, None]).long()
    given = {"x": torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(1)), "attention_mask": mask}
    found = []
    for make in (FlatTimeFirst, Apart):
        teacher = time_first(make)
        program = undecided(offramp.apply(teacher, "insert-acm"))
        options = {"output": "output", "distance": "mse"} if kind is WidthBudget else {}
        found.append(losses(program, kind(teacher=teacher, **options), given))
    torch.testing.assert_close(*found)


def test_tokens_one_after_another_in_an_order_that_nothing_says_are_refused() -> None:
    program = offramp.apply(time_first(functools.partial(FlatTimeFirst, _softmax)), "insert-acm")
    name = learner_sites(program)[0].output
    given = {"attention_mask": torch.ones(5, 7)}
    with pytest.raises(SpecError, match=r"tokens of all rows one after another; nothing says .*\n  try: flatten right"):
        counting(program, given, MASK, name, torch.zeros(35, 16))
    assert counting(program, given, None, name, torch.zeros(35, 16)).all()


def test_an_mlp_that_reads_rows_in_another_order_than_the_hidden_states() -> None:
    """An error stands over the norm of its own token's hidden state."""

    class Turned(torch.nn.Module):
        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            made: Tensor = self.mlp(x.flatten(0, 1)).view(x.shape).transpose(0, 1)
            return made

    model, found = tiny.seeded(tiny.Encoder), []
    for turned in (False, True):
        for block in model.blocks:
            block.mlp = Turned(block.mlp) if turned else block.mlp
        teacher = capture(model, tiny.text())
        found.append(losses(undecided(offramp.apply(teacher, "insert-acm")), GateDistillation(teacher)))
    torch.testing.assert_close(*found)


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def test_a_mask_that_hides_all_is_refused(labeller: tiny.Captured) -> None:
    """One of padding, say, which is True where there is some."""
    program = offramp.apply(labeller.program, "insert-acm")
    given = {**labeller.inputs, "padding": torch.zeros(tiny.ROWS, tiny.TOKENS, dtype=torch.bool)}
    for kind in (LearnerDistillation, GateDistillation, functools.partial(WidthBudget, _Nothing())):
        with pytest.raises(SpecError, match=r"padding is 0 everywhere.*\n  try: .*batch\['padding'\] == 0"):
            losses(program, kind(teacher=labeller.program, mask="padding"), given)


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation, WidthBudget])
def test_columns_that_are_no_tensors_are_not_read(kind: Any) -> None:
    teacher, program = pair()
    given: Any = {"sentence": ["a"] * 8, **batch()}
    found, wanted = (losses(program, kind(teacher=teacher), each) for each in (given, batch()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    with pytest.raises(SpecError, match=r"sentence is a list; a tensor says which tokens count\n  try: rows that"):
        losses(program, kind(teacher=teacher, mask="sentence"), given)


def test_samples_of_which_no_token_counts_are_left_out() -> None:
    """Budget, entropy and diversity are those of the others."""
    _, program = pair()
    program, given = undecided(program), batch()
    given["counts"] = given["attention_mask"] * (torch.arange(8) % 4 > 0)[:, None]
    wish = WidthBudget(_Nothing(), low=0.4, high=0.4, budget=1, entropy=1, diversity=1, mask="counts")
    others = {name: value[torch.arange(8) % 4 > 0] for name, value in given.items()}
    found, wanted = (losses(program, wish, each) for each in (given, others))
    torch.testing.assert_close(*({name: each[name] for name in wanted if name != "final"} for each in (found, wanted)))


def test_batches_are_not_kept() -> None:
    teacher, program = pair()
    alive: list[int] = []
    made = list[weakref.ref[Tensor]]()

    def stream() -> Iterator[Batch]:
        for seed in range(12):
            given = batch(seed)
            made.append(weakref.ref(given["input_ids"]))
            alive.append(sum(each() is not None for each in made))
            yield given
            del given

    fit(program, stream(), LearnerDistillation(teacher), steps=12)
    assert len(alive) == 12
    assert max(alive) <= 3


MEMORY = """
import resource, torch, offramp, tiny
from offramp.training import LearnerDistillation, fit

teacher = offramp.capture(tiny.seeded(tiny.Encoder), tiny.text())
program = offramp.apply(teacher, "insert-acm")
peaks = []
for steps in (5, 60):
    mask = tiny.padding(rows=2000)
    batches = ({"input_ids": tiny.ids(rows=2000, seed=seed), "attention_mask": mask} for seed in range(steps))
    fit(program, batches, LearnerDistillation(teacher), steps=steps)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peaks)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data() -> None:
    """What sites read and make in 55 further batches would be some 300 MB."""
    said = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    few, many = map(float, said.stdout.split())
    assert many < few + 50


# Gates


def test_labels_are_the_allocation_of_least_error() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = [torch.rand(3, 3, generator=generator).sort(-1, descending=True).values for _ in range(2)]
    costs = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 6.0, 9.0])]
    every = []
    for picks in itertools.product(range(3), repeat=6):
        spent = sum(float(costs[i // 3][k]) for i, k in enumerate(picks))
        every.append((spent, sum(float(errors[i // 3][i % 3, k]) for i, k in enumerate(picks))))
    seen = set()
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        found, price = allocate(errors, costs, share)
        spent = sum(float(cost[k].sum()) for cost, k in zip(costs, found, strict=True))
        error = sum(float(e.gather(1, k[:, None]).sum()) for e, k in zip(errors, found, strict=True))
        assert spent <= share * 33 + 1e-4
        for e, cost, k in zip(errors, costs, found, strict=True):
            paid = e + price * cost
            torch.testing.assert_close(paid.gather(1, k[:, None]), paid.amin(-1, keepdim=True))
        assert error <= min(e for s, e in every if s <= spent) + 1e-5
        seen.add(spent)
    assert len(seen) > 3
    assert spent == 33


def test_labels_meet_the_share_where_more_learners_do_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = [torch.rand(500, 5, generator=generator).sort(-1).values]
    ((found,), _) = allocate(errors, [torch.arange(5.0)], 0.6)
    assert float(found.float().mean()) / 4 == pytest.approx(0.6, abs=0.01)


@pytest.mark.slow
def test_gates_keep_the_width_and_choose_better_than_all_alike() -> None:
    teacher, program = pair()
    given = batches()
    fit(program, given, LearnerDistillation(teacher), epochs=10, rate=3e-3)
    learned = {name: weight for name, weight in weights(program).items() if ".gate." not in name}
    fit(program, given, GateDistillation(teacher), epochs=30, rate=1e-2)
    assert all(torch.equal(weight, learned[name]) for name, weight in weights(program).items() if name in learned)
    together = {name: torch.cat([each[name] for each in given]) for name in given[0]}
    counts = together["attention_mask"].bool()
    errors = site_errors(program, teacher, together)[:, :, counts]  # [sites, counts, tokens]
    with torch.no_grad():
        residual = ObjectiveModule(teacher, Objective()).values(teacher.stacks["encoder"].cuts, together)
    sizes = [residual[cut].square().sum(-1)[counts] for cut in teacher.stacks["encoder"].cuts[1:]]
    errors = errors / torch.stack(sizes)[:, None]
    alike = errors.mean((0, 2))  # [counts]
    for share in (0.3, 0.5, 0.6, 0.75, 0.9, 1.0):
        took = executed(program, teacher, together, share)[:, counts]
        mean = float(took.float().mean())
        assert mean / 4 == pytest.approx(share, abs=0.1)
        if 0.4 < share < 1:
            low = int(mean)
            uniform = torch.lerp(alike[low], alike[low + 1], mean - low)
            assert float(errors.gather(1, took[:, None]).mean()) < 0.9 * float(uniform)
    means = executed(program, teacher, together, 0.5)[:, counts].float().mean(1)
    assert float(means.max() - means.min()) > 0.1  # sites differ


def test_gates_weigh_what_a_choice_loses() -> None:
    """Of tokens that a gate cannot tell apart a few lose much by few learners: all take more, whatever most should."""
    losing = torch.arange(1000) < 200
    errors, costs = torch.stack((0.1 + 100.0 * losing, torch.zeros(1000)), 1), torch.tensor([0.0, 1.0])
    teacher, _ = pair()

    def slope(labels: float) -> float:
        logits = torch.zeros(1, 2, requires_grad=True)
        objective = GateDistillation(teacher, labels=labels, budget=0.0)
        objective._loss([logits.expand(1000, 2)], [errors], [costs], 0.25).backward()
        assert logits.grad is not None
        return float(logits.grad[0, 1])

    assert slope(0.0) < 0 < slope(1e6)


def test_labels_are_of_errors_over_the_hidden_state_and_of_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, halves = pair("{blocks=1,learners=2}")
    program = offramp.apply(halves, "insert-acm{blocks=3,least=1}")
    given, seen = batch(), list[Any]()

    def spy(errors: Any, costs: Any, share: float) -> Allocation:
        seen.append((share, errors, [cost.tolist() for cost in costs]))
        return allocate(errors, costs, share)

    monkeypatch.setattr(width_objectives, "allocate", spy)
    losses(program, GateDistillation(teacher, low=0.2, high=0.6, draws=2), given)
    (first, errors, costs), (second, *_) = seen
    assert 0.2 <= first <= 0.4 <= second <= 0.6
    one = 2 * 2 * 24 * 16 / 4
    assert costs == [[0, 2 * one, 4 * one], [one, 2 * one, 3 * one, 4 * one]]
    counts = given["attention_mask"].bool()
    cuts = [teacher.stacks["encoder"].cuts[block] for block in (1, 3)]
    with torch.no_grad():
        residual = ObjectiveModule(teacher, Objective()).values(cuts, given)
    for item, cut, found in zip(learner_sites(program), cuts, errors, strict=True):
        assert len(found) == counts.sum()
        alone = dataclasses.replace(program, records=(item.learners,))
        wanted = site_errors(alone, teacher, given)[0] / residual[cut].square().sum(-1)
        torch.testing.assert_close(found, wanted[:, counts].T)


def test_errors_are_of_the_hidden_state_whatever_lies_before_it() -> None:
    """A scale behind an MLP (DINOv2, CaiT) differs by block: what a site makes is worth that much more or less."""
    pytest.importorskip("transformers")
    module, example = architectures.OTHERS["dinov2"]()
    scales = [scale for name, scale in module.named_parameters() if "layer_scale2" in name]
    with torch.no_grad():
        for block, scale in enumerate(scales):
            scale.fill_(10.0**-block)
    teacher = capture(module, example)
    program, given = offramp.apply(teacher, "insert-acm"), dict(teacher.example_inputs)
    sites, objective = learner_sites(program), GateDistillation(teacher)
    found, *_ = objective._errors(ObjectiveModule(program, objective), given, sites)
    own = site_errors(program, teacher, given)
    with torch.no_grad():
        cuts = teacher.stacks[sites[0].learners.stack].cuts
        residual = ObjectiveModule(teacher, Objective()).values(cuts, given)
    assert len(found) == len(scales) > 1
    for block, (errors, local) in enumerate(zip(found, own, strict=True)):
        size = residual[cuts[sites[block].learners.block]].square().sum(-1)
        wanted = (local / size * 100.0**-block).flatten(1).T
        torch.testing.assert_close(errors[:, :-1], wanted[:, :-1], rtol=1e-2, atol=1e-9)


def test_where_attention_follows_a_token_has_its_own_error() -> None:
    """Keys of one token change what others are made of."""
    teacher = captured()
    program = offramp.apply(teacher, "insert-acm{sites=projections}")
    alone = {site.learners.site: rest_of(teacher, site).beside is not None for site in learner_sites(program)}
    assert alone == {"query": False, "kv": False, "output": True}


def test_widths_are_drawn_anew_each_step_and_the_same_again() -> None:
    teacher, program = pair()
    found = [float(losses(program, GateDistillation(teacher), step=step)["gates"].detach()) for step in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    other = float(losses(program, GateDistillation(teacher, seed=1))["gates"].detach())
    assert other != found[0]


# All of it


class _Nothing(Objective):
    """A task that anything does."""

    def wants(self, program: Program, step: int) -> list[str]:
        return [program.outputs[0]]

    def losses(self, program: Program, values: Any, batch: Any) -> dict[str, Tensor]:
        return {"nothing": 0 * values[program.outputs[0]].sum()}


def test_budget_entropy_and_diversity_are_what_the_formulas_say() -> None:
    _, shared = pair("{blocks=1,learners=2}")
    program = undecided(offramp.apply(shared, "insert-acm{blocks=3,least=1}"))
    given = batch()
    found = losses(program, WidthBudget(_Nothing(), low=0.4, high=0.4, budget=1, entropy=1, diversity=1), given)
    sites = learner_sites(program)
    assert [site.flops for site in sites] == [2 * 2 * 24 * 16 / 2, 2 * 2 * 24 * 16 / 4]
    names = [site.learners.choice for site in sites]
    chosen = ObjectiveModule(program, Objective()).values(names, given, width(program, 0.4, given["input_ids"]))
    ones = given["attention_mask"].bool()
    shares, entropies = [], []
    for row in range(8):
        spent = most = 0.0
        for site in sites:
            k = chosen[site.learners.choice].argmax(-1)[row, ones[row]]
            spent += float((k + site.learners.least).sum()) / site.learners.learners
            most += len(k)
            a = k.bincount().float() / len(k)
            entropies.append(-float(torch.special.xlogy(a, a).sum()) / torch.tensor(len(site.counts)).log().item())
        shares.append(spent / most)
    between = [abs(a - b) for a, b in itertools.permutations(shares, 2)]
    room = 4 * 0.4 * 0.6
    wanted = {
        "budget": abs(sum(shares) / 8 - 0.4),
        "entropy": -room * sum(entropies) / len(entropies),
        "diversity": -room * sum(between) / len(between),
    }
    assert wanted["diversity"] < -0.01 > wanted["entropy"]
    assert {name: float(found[name].detach()) for name in wanted} == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["budget", "entropy", "diversity"])
def test_each_of_the_three_goes_the_right_way(name: str) -> None:
    _, program = pair()
    program = undecided(program)
    only: dict[str, Any] = {"budget": 0.0, "entropy": 0.0, "diversity": 0.0, name: 1.0}
    wanted = WidthBudget(_Nothing(), low=0.5, high=0.5, **only)
    curve = fit(program, batches(), wanted, epochs=20, rate=1e-2, log_every=16)
    first, last = curve[0].losses[name], curve[-1].losses[name]
    assert last < 0.3 * first if name == "budget" else last < first - 0.05


def test_time_first_rows_are_samples() -> None:
    """Samples lie along the second axis; each has a budget of its own."""
    _, program = pair(make=tiny.TimeFirst)
    program = undecided(program)
    given: Batch = {
        "x": torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)[:, None]
    }
    found = losses(program, WidthBudget(_Nothing(), low=0.5, high=0.5, diversity=1), given)
    nodes = [site.learners.choice for site in learner_sites(program)]
    values = ObjectiveModule(program, Objective()).values(nodes, given, width(program, 0.5, given["x"]))
    shares = torch.stack([values[name].argmax(-1) for name in nodes]).float().mean((0, 1)) / 4
    between = abs(shares[:, None] - shares).sum() / 20
    assert found["diversity"].item() == pytest.approx(-between.item(), abs=1e-6)


@pytest.mark.parametrize("train", [pytest.param("added", marks=pytest.mark.slow), "all"])
@pytest.mark.slow
def test_following_the_teacher_at_any_width(train: Any) -> None:
    teacher, program = pair()
    given = batches()
    with torch.no_grad():
        wanted = teacher.module(**batch())["logits"]
    wish = WidthBudget(teacher=teacher, output="logits", distance="mse")
    curve = fit(program, given, wish, epochs=15, rate=3e-3, train=train, log_every=30)
    assert curve[-1].losses["teacher"] < 0.5 * curve[0].losses["teacher"]
    with torch.no_grad():
        assert torch.equal(teacher.module(**batch())["logits"], wanted) == (train == "added")
    found = fit(program, given, WidthBudget(teacher=teacher), steps=1)
    assert set(found[0].losses) == {"teacher", "budget", "entropy", "diversity"}
    assert found[0].losses["teacher"] >= 0


def test_following_hidden_states() -> None:
    """After exits and the last block, over the teacher's variance; padding does not count."""
    teacher, program = pair()
    program = offramp.apply(undecided(program), "insert-exits{after=2}")
    stack = program.stacks["encoder"]
    wish, given = WidthBudget(teacher=teacher, states=3.0, low=0.4, high=0.4), batch()
    model, counts = ObjectiveModule(program, wish), given["attention_mask"].bool()
    at = [stack.cuts[2], stack.output]
    own, its = model.values(at, given, width(program, 0.4, counts)), model.taught(at, given)
    apart = torch.stack(
        [(own[name] - its[name])[counts].square().mean() / its[name][counts].var(0, correction=0).mean() for name in at]
    )
    expected = pytest.approx(3 * apart.mean().item(), rel=1e-5)
    assert losses(program, wish, given)["states"].item() == expected
    other = {**given, "input_ids": given["input_ids"].where(counts, 1)}
    assert losses(program, wish, other)["states"].item() == expected
    alone = {"input_ids": given["input_ids"][:1], "attention_mask": (torch.arange(counts.shape[1]) == 0)[None].long()}
    assert losses(program, wish, alone)["states"] < 10
    curve = fit(program, batches(), wish, epochs=8, rate=3e-3, log_every=8)
    assert curve[-1].losses["states"] < 0.7 * curve[0].losses["states"]


def test_hidden_states_that_the_teacher_lacks() -> None:
    teacher, program = pair()
    short = offramp.apply(program, "truncate{after=2}")
    with pytest.raises(SpecError, match=r"has 2 blocks of 16 features, the teacher 4 blocks of 16 features: no hidden"):
        WidthBudget(teacher=teacher, states=1.0).check(short)
    WidthBudget(teacher=teacher).check(short)


@pytest.mark.parametrize("objective", [SelfDistillation(), DeepSupervision(), LearnedGates()])
def test_exits_are_trained_and_learners_are_not(objective: Objective) -> None:
    """Full depth is what it was, at each width."""
    _, program = pair("{learners=3}")
    program = offramp.apply(undecided(program), "insert-exits{after=2,head=own},insert-scores{measure=learned}")
    given = batch()
    before = program.module(**given)["logits"]
    fit(program, [{**given, "labels": torch.zeros(8, dtype=torch.int64)}], objective, steps=2)
    assert torch.equal(program.module(**given)["logits"], before)
    fit(program, [given], WidthBudget(SelfDistillation()), steps=2)
    assert not torch.equal(program.module(**given)["logits"], before)


def test_learners_are_no_part_that_any_objective_trains() -> None:
    _, program = pair()
    with pytest.raises(SpecError, match=r"nothing but learners, which CrossEntropy leaves .*\n  try: WidthBudget\(obj"):
        fit(program, batches(), CrossEntropy())


def test_an_output_without_a_name_is_followed() -> None:
    """Which is called as the node that returns it."""

    class Bare(tiny.Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask)["logits"]

    teacher = capture(tiny.seeded(lambda: Bare(pooled=False)), tiny.text())
    program = offramp.apply(teacher, "insert-acm")
    found = losses(program, WidthBudget(teacher=teacher, output="output"))
    assert all(bool(loss.isfinite()) for loss in found.values())


def test_the_teacher_stays_where_all_is_trained() -> None:
    teacher, program = pair()
    apart = ObjectiveModule(program, WidthBudget(teacher=teacher), apart=True)
    kept = apart.taught(["logits"], batch())["logits"]
    with torch.no_grad():
        for weight in program.module.parameters():
            weight.mul_(0.5)
    assert torch.equal(apart.taught(["logits"], batch())["logits"], kept)
    shared = ObjectiveModule(program, WidthBudget(teacher=teacher))
    assert not torch.equal(shared.taught(["logits"], batch())["logits"], kept)
    assert not apart.train().teacher.training  # type: ignore[union-attr]
    assert not kept.requires_grad


def test_labels_and_the_teacher_together() -> None:
    teacher, program = pair()
    given = [{**each, "labels": each["input_ids"][:, 0] % tiny.CLASSES} for each in batches()]
    curve = fit(program, given, WidthBudget(CrossEntropy(), teacher), epochs=15, train="all", rate=1e-2, log_every=24)
    assert set(curve[0].losses) == {"final", "teacher", "budget", "entropy", "diversity"}
    assert curve[-1].losses["final"] < curve[0].losses["final"]


# The loop


@pytest.mark.parametrize("name", slow_but(["learners"], ["learners", "gates", "budget"]))
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "every": 2, "log_every": 2, "seed": 7, "rate": 1e-2}
    options["train"] = "all" if name == "budget" else "added"

    def run(folder: str, last: int | None = None) -> tuple[Any, dict[str, Tensor]]:
        teacher, program = pair()
        wanted = {
            "learners": LearnerDistillation(teacher),
            "gates": GateDistillation(teacher),
            "budget": WidthBudget(teacher=teacher, distance="mse"),
        }[name]
        try:
            curve = fit(program, Cutting(batches(6), last), wanted, folder=tmp_path / folder, **options)
        except KilledError:
            return None, {}
        return [(point.step, point.loss, point.rate) for point in curve], weights(program)

    expected, whole = run("whole")
    assert run("cut", 8)[0] is None
    curve, again = run("cut")
    assert curve == expected
    assert all(torch.equal(weight, again[key]) for key, weight in whole.items())


@pytest.mark.parametrize("name", ["learners", "gates", "budget"])
def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(name: str, tmp_path: Path) -> None:
    teacher, program = pair(make=tiny.TimeFirst)
    wanted = {
        "learners": LearnerDistillation(teacher),
        "gates": GateDistillation(teacher),
        "budget": WidthBudget(teacher=teacher, output="output", distance="mse"),
    }[name]
    given = [{"x": tiny.signal() + seed} for seed in range(4)] + [{"x": tiny.signal() * torch.nan}]
    with pytest.raises(TrainingError, match=r"step 5 .*not finite.*") as failure:
        fit(program, given, wanted, folder=tmp_path, every=2)
    assert "step-4" in str(failure.value)
    kept = load_file(tmp_path / "step-4" / "trained.safetensors")
    assert all(torch.isfinite(weight).all() for weight in [*kept.values(), *program.module.parameters()])


def test_learners_that_are_not_finite_stop_gates() -> None:
    teacher, program = pair()
    name = next(name for name in weights(program) if name.startswith("learners.") and name.endswith("mlp.2.weight"))
    with torch.no_grad():
        dict(program.module.named_parameters())[name].fill_(torch.nan)
    with pytest.raises(TrainingError, match="loss is not finite"):
        fit(program, batches(1), GateDistillation(teacher))


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation])
@pytest.mark.slow
def test_bf16_trains(kind: Any) -> None:
    teacher, program = pair()
    curve = fit(program, batches(), kind(teacher), epochs=12, rate=1e-2, precision="bf16", log_every=16)
    assert curve[-1].loss < 0.9 * curve[0].loss


def test_the_width_is_as_it_was() -> None:
    teacher, program = pair()
    program.module.get_buffer(WIDTH).fill_(0.7)
    fit(program, batches(2), WidthBudget(teacher=teacher))
    assert float(program.module.get_buffer(WIDTH)) == pytest.approx(0.7)


# Refused


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation, WidthBudget])
def test_a_program_without_learners(kind: Any) -> None:
    teacher, _ = pair()
    with pytest.raises(SpecError, match=r"(?s)no learners.*insert-acm first"):
        fit(teacher, batches(), kind(teacher=teacher))


def test_a_teacher_of_other_sizes_is_refused_in_names_of_axes() -> None:
    _, program = pair()
    narrow = captured()
    check_teacher(program, narrow)
    site = learner_sites(program)[0]
    narrow.nodes[site.output].meta["val"] = narrow.nodes[site.output].meta["val"][..., :3]
    with pytest.raises(SpecError) as caught:
        check_teacher(program, narrow)
    shown = r"of shape \['batch', 'tokens', \d+\]: it has \['batch', 'tokens', 3\]\n  try: the program before"
    assert re.search(shown, str(caught.value))


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation])
def test_teachers_that_do_not_fit(kind: Any) -> None:
    teacher, program = pair()
    with pytest.raises(SpecError, match=r"the teacher has learners itself: mlp of block 1 of stack 'encoder'"):
        fit(program, batches(), kind(program))
    short = offramp.apply(teacher, "truncate{after=2}")
    with pytest.raises(SpecError, match=r"the teacher has no mlp of block 3 of stack 'encoder'"):
        fit(program, batches(), kind(short))
    with pytest.raises(SpecError, match=r"the teacher has no mlp of block 4|the teacher's mlp of block 1 .* no value"):
        fit(program, batches(), kind(captured(tiny.TimeFirst)))


def test_a_teacher_of_other_classes() -> None:
    _, program = pair()
    model = tiny.seeded(tiny.Encoder)
    model.head = torch.nn.Linear(tiny.WIDTH, 9)
    other = capture(model, tiny.text())
    with pytest.raises(SpecError, match=r"the program's 'logits' has 3 places on its last axis, the teacher's 9"):
        fit(program, batches(), WidthBudget(teacher=other))


def test_a_checkpoint_of_other_learners_is_refused(tmp_path: Path) -> None:
    """Their weights have the same names; none is changed."""
    teacher, program = pair()
    fit(program, batches(), LearnerDistillation(teacher), folder=tmp_path, every=1)
    other = offramp.apply(teacher, "insert-acm{learners=3}")
    before = {name: weight.detach().clone() for name, weight in other.module.named_parameters()}
    with pytest.raises(SpecError, match=r"trains other weights: \['learners.encoder.1.mlp"):
        fit(other, batches(), LearnerDistillation(teacher), folder=tmp_path, every=1)
    assert all(torch.equal(weight, before[name]) for name, weight in other.module.named_parameters())


@pytest.mark.parametrize("kind", [LearnerDistillation, GateDistillation, WidthBudget])
def test_a_teacher_that_is_no_program(kind: Any) -> None:
    _, program = pair()
    with pytest.raises(SpecError, match=r"the teacher is a Encoder; a program is needed\n  try: the program before"):
        fit(program, batches(), kind(teacher=tiny.Encoder()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda teacher: GateDistillation(teacher, low=0.8, high=0.5),
            r"low=0.8, high=0.5: widths lie between 0 and 1",
        ),
        (lambda teacher: GateDistillation(teacher, draws=0), "draws=0"),
        (lambda teacher: GateDistillation(teacher, draws=cast(Any, 2.5)), "draws=2.5: at least one width a step"),
        (lambda teacher: GateDistillation(teacher, labels=math.nan), "labels=nan: a number, at least 0"),
        (lambda teacher: WidthBudget(low=cast(Any, "0.25"), teacher=teacher), "low='0.25': a number, from 0 to 1"),
        (lambda teacher: WidthBudget(teacher=teacher, budget=-1), "budget=-1: a number, at least 0"),
        (lambda teacher: WidthBudget(teacher=teacher, entropy=math.inf), "entropy=inf: a number, finite"),
        (lambda teacher: WidthBudget(high=1.5, teacher=teacher), "high=1.5"),
        (lambda teacher: WidthBudget(CrossEntropy(), states=1.0), r"states=1.0: without a teacher"),
        (lambda teacher: WidthBudget(), "neither task nor teacher"),
        (lambda teacher: WidthBudget(LearnerDistillation(teacher)), "LearnerDistillation cannot be part of another"),
        (lambda teacher: Together((LearnerDistillation(teacher),)), "LearnerDistillation cannot be part of another"),
        (lambda teacher: WidthBudget(SelfDistillation()), "no exits"),
        (lambda teacher: WidthBudget(teacher=teacher, output="none"), "the program has no output 'none'"),
        (lambda teacher: WidthBudget(teacher=teacher, distance=cast(Any, "l1")), "distance='l1'"),
    ],
)
def test_options_that_do_not_fit(make: Any, match: str) -> None:
    teacher, program = pair()
    with pytest.raises(SpecError, match=match):
        fit(program, batches(), make(teacher))

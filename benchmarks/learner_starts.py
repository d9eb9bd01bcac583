"""Which start is best for learners? The error of MLPs with fewer of them, before and after the same distillation.

MiniLM on sentences of SST-2 without labels, its hidden units: new ones (random), in clusters that fire together (as
CMoE makes experts, arXiv 2502.04416), by the norms of what they read and write, and by what they add to the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import offramp
from benchmarks._common import Row, data, report, say, shown
from offramp import training, zoo
from offramp.program import Program
from offramp.program.analysis.sites import Site, mlp
from offramp.program.graph import attribute
from offramp.program.program import evaluate
from offramp.training.learner_sites import learner_sites
from offramp.training.objective_module import ObjectiveModule
from offramp.zoo import minilm

LEARNERS, FIRING = 4, 0.1
Batch = dict[str, Tensor]


def batches(count: int, size: int = 32) -> list[Batch]:
    """Sentences of the training part."""
    lines = (data("sst2") / "train.tsv").read_text().splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines if len(line) > 60]
    chosen = np.random.default_rng(0).permutation(len(texts))[: count * size].reshape(count, size)
    return [dict(minilm.tokenize(*[texts[i] for i in part])) for part in chosen]


def sites(program: Program) -> list[Site]:
    """The MLPs with learners, as the graph has them."""
    found = [mlp(program.nodes[site.output]) for site in learner_sites(program)]
    return [site for site in found if site is not None]


def renewed(program: Program) -> None:
    """New weights of the old ones' size."""
    generator = torch.Generator().manual_seed(0)
    for site in sites(program):
        for item in site.products:
            weight = attribute(program.module, str(item.weight.target))
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())


def clustered(program: Program) -> None:
    """Units in clusters that fire on the same tokens, the cluster first that adds most to the output."""
    split = sites(program)
    values = evaluate(program.graph_module, {site.last.data.args[0] for site in split}, program.example_inputs)  # type: ignore[misc]
    for site in split:
        up, down = site.first[0], site.last
        hidden = values[site.last.data.args[0]].flatten(0, -2)  # type: ignore[index]
        written = attribute(program.module, str(down.weight.target))
        fires = (hidden.abs() >= hidden.abs().quantile(1 - FIRING, dim=1, keepdim=True)).float().T
        groups = _clusters(fires)
        adds = hidden.square().mean(0) * written.square().sum(down.units_axis)
        groups.sort(key=lambda units: -float(adds[units].sum()))
        order = torch.cat(groups)
        for item, axis in ((up, up.units_axis), (down, 1 - down.units_axis)):
            weight = attribute(program.module, str(item.weight.target))
            weight.copy_(weight.index_select(axis, order))
        if up.bias is not None:
            bias = attribute(program.module, str(up.bias.target))
            bias.copy_(bias[order])


def _clusters(rows: Tensor) -> list[Tensor]:
    """Rows in clusters of equal size: k-means whose clusters take the nearest rows in turns."""
    size = len(rows) // LEARNERS
    middles = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:LEARNERS]]
    for _ in range(15):
        distances = torch.cdist(rows, middles)
        left, groups = torch.ones(len(rows), dtype=torch.bool), []
        for place in distances.std(0).argsort(descending=True).tolist():
            nearest = distances[:, place].masked_fill(~left, torch.inf).argsort()[:size]
            left[nearest] = False
            groups.append(nearest)
        middles = torch.stack([rows[group].mean(0) for group in groups])
    return groups


def errors(program: Program, teacher: Program, given: Sequence[Batch]) -> list[float]:
    """``||h(z, k) - o||^2 / ||o||^2`` for each ``k`` below all, the mean over sites and batches."""
    model = ObjectiveModule(program, training.LearnerDistillation(teacher))
    split = learner_sites(program)
    names = [name for site in split for name in (site.input, site.output)]
    total = torch.zeros(LEARNERS + 1)
    with torch.no_grad():
        for batch in given:
            taught = model.taught(names, batch)
            made = model.values([n for s in split for n in s.parts], batch, {s.input: taught[s.input] for s in split})
            for site in split:
                wanted = taught[site.output]
                for k, found in site.outputs(made):
                    total[k] += (found - wanted).square().sum() / wanted.square().sum()
    return [float(x) for x in total[1:-1] / len(given) / len(split)]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of the distillation, 32 sentences each (150)")
    steps = parser.parse_args().steps
    given = batches(steps + 9)
    held, first, learnt = given[:8], given[8], given[9:]
    teacher = offramp.capture(zoo.load("minilm")[0], first)
    starts: dict[str, tuple[str, Callable[[Program], None] | None]] = {
        "random": ("given", renewed),
        "clusters that fire together": ("given", clustered),
        "norms": ("importance", None),
        "what they add": ("activation", None),
    }
    rows: list[Row] = []
    for name, (order, change) in starts.items():
        program = offramp.apply(teacher, f"insert-acm{{learners={LEARNERS},order={order}}}")
        with torch.no_grad():
            if change:
                change(program)
        before = errors(program, teacher, held)
        training.fit(program, learnt, training.LearnerDistillation(teacher), rate=1e-3)
        after = errors(program, teacher, held)
        row: dict[str, Any] = {"start": name}
        row |= {f"{k} of {LEARNERS}, before": round(value, 3) for k, value in enumerate(before, 1)}
        row |= {f"{k} of {LEARNERS}, after": round(value, 3) for k, value in enumerate(after, 1)}
        rows.append(shown(row))
    say(f"{steps} steps of 32 sentences each")
    report("learner_starts", "Squared error of MiniLM's MLPs with fewer learners, relative to what they make", rows)


if __name__ == "__main__":
    main()

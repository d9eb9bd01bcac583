"""How much of the FLOPs that learners save becomes time, in which form, at how many tokens?

Whole models, every MLP (or what ``--sites`` says) in four learners, with gates that are not trained but choose
differently for each token; in turns with the model as it was.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import offramp
from benchmarks._common import BUILD, Row, alternate, report, shown
from offramp import zoo

FORMS = ("dense", "grouped")
BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)
CASES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "minilm": ((1, 16), (1, 128), (8, 128)),
    "vit": ((1, 257), (8, 257)),
    "smollm2": ((1, 1),),
}


def undecided(program: offramp.Program) -> offramp.Program:
    """The program with gates that add noise of their own to what the width says."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in program.module.named_parameters():
            if name.endswith(".gate.1.weight"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return program


def place(name: str, form: str) -> Path:
    """Where the bundle of a model lies whose learners run so; "none" is that without."""
    return BUILD / f"{name}-learners-{form}.offramp"


def chains(name: str, sites: str = "mlp") -> dict[str, offramp.Chain]:
    """The model as it was, and with learners in each form."""
    whole = offramp.capture(*zoo.load(name))
    split = undecided(offramp.apply(whole, f"insert-acm{{sites={sites}}}"))
    if name == "smollm2":
        whole, split = (offramp.apply(program, "insert-cache") for program in (whole, split))
    found = {}
    for form, program in (("none", whole), ("dense", split), ("grouped", split)):
        path = place(name, form)
        offramp.save(program, path, segments=1, learners=None if form == "none" else form)  # type: ignore[arg-type]
        found[form] = offramp.load(path)
    return found


def inputs(name: str, batch: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random ones; a generation begins with four tokens."""
    random = np.random.default_rng(0)
    if name == "vit":
        return {"pixel_values": random.standard_normal((batch, 3, 224, 224), np.float32)}
    ids = random.integers(1000, 20000, (batch, max(tokens, 16)))
    if name == "minilm":
        return {"input_ids": ids[:, :tokens], "attention_mask": np.ones((batch, tokens), np.int64)}
    return {"input_ids": ids[:, :4]}


def runner(name: str, batch: int, tokens: int) -> Callable[[offramp.Chain, offramp.Policy], Any]:
    """One run of a chain: of random inputs, or of eight tokens of a generation."""
    given = inputs(name, batch, tokens)
    if name == "smollm2":
        return lambda chain, policy: chain.generate(given, policy, max_new_tokens=8, stop=[])
    return lambda chain, policy: chain.run(given, policy)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", default="mlp", help="what is split: mlp, projections, qkv, output, ... (mlp)")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="(all)")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models:
        cases, ways = CASES[name], chains(name, args.sites)
        for batch, tokens in cases:
            run = runner(name, batch, tokens)
            runs: dict[str, Callable[[], object]] = {"none": functools.partial(run, ways["none"], offramp.Never())}
            for form in FORMS:
                for budget in BUDGETS:
                    runs[f"{form} {budget}"] = functools.partial(run, ways[form], offramp.Width(budget))
            times = alternate(runs, seconds=1.5, least=7)
            for budget in BUDGETS:
                executed = run(ways["dense"], offramp.Width(budget)).width
                row: Row = {"model": name, "tokens": f"{batch} x {tokens}", "width": round(executed, 3)}
                row |= {form: round(times[f"{form} {budget}"] / times["none"], 3) for form in FORMS}
                row["ms without"] = times["none"]
                rows.append(shown(row))
    title = f"Time with learners ({args.sites}) over the time of the model without, by form and width"
    report("learner_forms", title, rows)


if __name__ == "__main__":
    main()

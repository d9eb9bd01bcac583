"""Which form of learners is faster: both are built for each kind of site, and timed on the example's own tokens."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from torch import fx

from offramp.bundle.manifest import FORMS, WIDTH
from offramp.export.lowering.node_builder import Target
from offramp.export.lowering.outline import outline
from offramp.export.prepare import prepared
from offramp.export.subgraph import Subgraph, subgraph
from offramp.export.translations import Translations
from offramp.export.write import Writer
from offramp.program.analysis.sites import mlp
from offramp.program.graph import expression, read_by, shape
from offramp.program.program import Program, evaluate
from offramp.runtime.engine.sessions import session_options

_ROUNDS = 7
_SHARE = 0.5  # of the learners, while it is timed
_LEAST = 0.005  # seconds of a round, for clocks to tell


def fastest(program: Program, target: Target) -> tuple[dict[str, str], dict[str, Any]]:
    """The faster form of each site with learners, by the name of its node, and what was measured, by site.

    Each kind of site is timed once, where half of the learners are taken, on the CPU: on as many tokens as the example
    has, or on one where the program has caches and the site runs for each token.
    """
    sites = {item.hidden: item for item in program.learners}
    made = {form: prepared(program, dict.fromkeys(sites, form)) for form in FORMS if sites}
    kinds: dict[Any, dict[str, Any]] = {}
    forms, measured = dict[str, str](), dict[str, Any]()
    for name, item in sites.items():
        one = _by_token(program, name)
        key = outline(_piece(made[FORMS[0]], name)).key, one
        if key not in kinds:
            kinds[key] = _times(made, name, target, one)
        times = measured[item.name] = kinds[key]
        forms[name] = min(FORMS, key=times.__getitem__)
    return forms, measured


def _by_token(program: Program, hidden: str) -> bool:
    """Whether a site runs for each token of a generation, instead of once."""
    inputs = () if program.cache is None else program.cache.tokens
    return any(node.op == "placeholder" and node.target in inputs for node in read_by([program.nodes[hidden]]))


def _piece(program: Program, hidden: str) -> Subgraph:
    """A site from what it reads to its last product."""
    site = mlp(next(iter(program.nodes[hidden].users)))
    assert site is not None, hidden
    return subgraph(hidden, [site.output], [site.input])


def _times(made: Mapping[str, Program], hidden: str, target: Target, one: bool) -> dict[str, Any]:
    """Milliseconds of a site in each form, in turns, and on how many tokens: the example's, or ``one`` of them."""
    runs: dict[str, Callable[[], Any]] = {}
    given: dict[str, Any] = {}  # the same in every form
    with tempfile.TemporaryDirectory() as folder:
        for form, program in made.items():
            translation, place = Translations(target).of(_piece(program, hidden)), Path(folder) / form
            place.mkdir()
            writer = Writer(place, program.graph_module)
            file = writer.segment(translation, hidden)
            writer.close()
            session = ort.InferenceSession(place / file, session_options(), providers=["CPUExecutionProvider"])
            for node in translation.inputs:  # what gives sizes, too
                if node.name not in given:
                    given[node.name] = _given(program, node, one)
            runs[form] = _bound(session, {f"in{i}": given[node.name] for i, node in enumerate(translation.inputs)})
        for run in runs.values():
            run()
        seconds: dict[str, list[float]] = {form: [] for form in runs}
        for _ in range(_ROUNDS):
            for form, run in runs.items():
                seconds[form].append(_one(run))
    read = [given[node.name] for node in _piece(made[FORMS[0]], hidden).inputs]
    tokens = max(array.size // array.shape[-1] for array in read)
    return {form: round(statistics.median(found) * 1e3, 4) for form, found in seconds.items()} | {"tokens": tokens}


def _bound(session: ort.InferenceSession, feed: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(None, feed)


def _given(program: Program, node: fx.Node, one: bool) -> Any:
    """What a site reads in the example, or of that the first token of the first row."""
    if node.op == "placeholder" and node.target == WIDTH:
        return np.full(1, _SHARE, np.float32)
    value = evaluate(program.graph_module, [node], program.example_inputs)[node]
    if one:
        for axis, size in enumerate(shape(node)):
            if not isinstance(expression(size), int):
                value = value.narrow(axis, 0, 1)
    return value.contiguous().numpy()


def _one(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    count, started = 0, perf_counter()
    while (spent := perf_counter() - started) < _LEAST or not count:
        run()
        count += 1
    return spent / count

"""``precision="auto"``: of each file the encoding that is fastest here, as long as outputs stay within a bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from offramp.bundle.manifest import Manifest
from offramp.bundle.precision import ERROR
from offramp.export.agreement import Bounds, answers, changed, ways
from offramp.export.encode import encoded, run_together
from offramp.export.first_row import first_row, with_room
from offramp.export.head_precision import tied
from offramp.export.rounding import Roundings
from offramp.runtime.chain import Chain
from offramp.runtime.engine.sessions import open_sessions
from offramp.runtime.policies.base import Policy
from offramp.runtime.result import Result, Timing

_ROUNDS, _STEPS = 5, 4
_CLOSE = 1.05  # times that clocks do not tell apart: the smaller file is taken
_TRIES = 8
_SIZES = ("int4", "int8", "int8-dynamic", "fp32")  # from small to large

Losses = Mapping[str, Mapping[str, float]]


def automatic(
    manifest: Manifest,
    directory: Path,
    samples: Sequence[Mapping[str, Any]],
    bounds: Bounds,
    roundings: Roundings,
    before: Sequence[Sequence[Result]],
) -> tuple[dict[str, str], dict[str, Any]]:
    """The encoding of each file, and what was measured, by file.

    Every file is timed in every encoding, on one token where it runs token by token, else on the first sample's first
    row. Its loss is that of the chain in which it alone is encoded. Losses of several are taken to add up in squares;
    what that says is checked, and the widest bound is looked for with which it holds. Files of which one holds a
    screened head, and another makes its logits, get one encoding.

    Args:
        manifest: of the bundle in fp32.
        directory: where that is.
        samples: inputs on which outputs are compared.
        bounds: what is to be kept.
        roundings: of weights of 4 bits.
        before: what the bundle in fp32 answers.
    """
    names = list(dict.fromkeys(segment.file for segment in manifest.segments.values()))
    units = {min(group, key=names.index): group for group in tied(manifest)}
    chunked = {item.file for name, item in manifest.segments.items() if name not in run_together(manifest)}
    with TemporaryDirectory(prefix=f"{directory.name}-", dir=directory.parent) as folder:
        sessions = {"fp32": open_sessions(directory, names, None, None)}
        options = {unit: ["fp32"] for unit in units}
        for encoding in _SIZES[:-1]:
            place = Path(folder) / encoding
            place.mkdir()
            made = encoded(
                manifest, directory, place, dict.fromkeys(names, encoding), encoding, roundings
            ).segments.values()
            sessions[encoding] = open_sessions(place, names, None, None)
            changes = {item.file for item in made if item.encoding == encoding}
            for unit, group in units.items():
                ranged = encoding == "int8-dynamic" and group & chunked  # a token's range would be its prompt's
                if group & changes and not ranged:
                    options[unit].append(encoding)

        def chain(encodings: Mapping[str, str]) -> Chain:
            mixed = {name: sessions[encodings.get(name, "fp32")][name] for name in names}
            return Chain(manifest, directory, _sessions=mixed)

        times = _times({encoding: chain(dict.fromkeys(names, encoding)) for encoding in sessions}, samples[0])

        def lost(encodings: Mapping[str, str]) -> dict[str, float]:
            return changed(before, answers(chain(encodings), samples))

        losses = {unit: {"fp32": 0.0} for unit in units}
        for unit, item in ((unit, item) for unit, known in options.items() for item in known[1:]):
            if np.isfinite(error := lost(dict.fromkeys(units[unit], item))[ERROR]):
                losses[unit][item] = error
        costs = {
            unit: {item: sum(_cost(times[item, name]) for name in units[unit]) for item in known}
            for unit, known in losses.items()
        }
        found = dict.fromkeys(names, "fp32")
        low, high = 0.0, 2 * bounds.loss  # losses cancel each other in part
        bound = high
        for _ in range(_TRIES):
            bolder = {name: item for unit, item in chosen(costs, losses, bound).items() for name in units[unit]}
            if bolder != found and bounds.broken(lost(bolder)):
                high = bound
            else:
                low, found = bound, bolder
            bound = (low + high) / 2
    about = {
        name: {
            "encoding": found[name],
            "milliseconds": {
                item: {kind: round(ms, 4) for kind, ms in times[item, name].items()} for item in losses[unit]
            },
            "loss": {item: round(error, 6) for item, error in losses[unit].items()},
        }
        for unit, group in units.items()
        if len(losses[unit]) > 1
        for name in sorted(group, key=names.index)
    }
    return found, about


def chosen(costs: Losses, losses: Losses, bound: float) -> dict[str, str]:
    """For each file an encoding, so that the squares of the losses add up to no more than that of the bound.

    All begin with their fastest; then, one after the other, those files get a better encoding that lose the least time
    for what they gain.
    """
    found = {}
    for name, known in costs.items():
        fast = [item for item, time in known.items() if time <= _CLOSE * min(known.values())]
        found[name] = min(fast, key=_SIZES.index)
    while sum(losses[name][item] ** 2 for name, item in found.items()) > bound**2:
        better = [
            ((costs[name][other] - costs[name][item]) / (losses[name][item] ** 2 - error**2), name, other)
            for name, item in found.items()
            for other, error in losses[name].items()
            if error < losses[name][item]
        ]
        _, name, other = min(better)
        found[name] = other
    return found


def _cost(times: Mapping[str, float]) -> float:
    """Milliseconds of one token, or where a file never runs on one, of many."""
    return times.get("one", times.get("many", 0.0))


def _times(chains: Mapping[str, Chain], inputs: Mapping[str, Any]) -> defaultdict[tuple[str, str], dict[str, float]]:
    """Milliseconds by encoding and file, of "many" tokens and of "one": the least of rounds in which all take turns."""
    (first, *_) = chains.values()
    one, room = first_row(first.manifest, inputs), 0
    if first.generates is not None:
        one, room = with_room(first, one, _STEPS)
    found: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for policy in ways(first.manifest):
        for _ in range(_ROUNDS):
            for encoding, chain in chains.items():
                for kind, trace in _traces(chain, one, policy, room):
                    spent: defaultdict[str, float] = defaultdict(float)
                    for timing in trace:
                        spent[chain.manifest.segments[timing.segment].file] += timing.milliseconds
                    for name, time in spent.items():
                        known = found[encoding, name]
                        known[kind] = min(time, known.get(kind, time))
    return found


def _traces(
    chain: Chain, inputs: Mapping[str, Any], policy: Policy, steps: int
) -> Iterator[tuple[str, Sequence[Timing]]]:
    """What ran on many tokens, and on each of so many single ones where the bundle generates."""
    if chain.generates is None:
        yield "many", chain.run(inputs, policy).trace
        return
    session = chain.session(inputs, policy)
    yield "many", session.trace
    if session.together:
        yield "many", session.step(session.prompts).trace
    for _ in range(steps):
        yield "one", session.step([prompt[-1:] for prompt in session.prompts]).trace
    session.end()

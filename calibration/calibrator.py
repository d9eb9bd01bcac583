"""`calibrate`: the thresholds, or the width, with which a bundle keeps its quality, proven on examples, timed here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path as File
from tempfile import NamedTemporaryFile
from typing import Any, Literal, TypeAlias

import numpy as np

from offramp.bundle import directory
from offramp.bundle.json_text import to_json
from offramp.bundle.manifest import MANIFEST_FILE, Stack
from offramp.bundle.precision import encodings
from offramp.calibration import sequence, widths
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Examples, read
from offramp.calibration.gates import Fit, Path, Thresholds, leaves, policy_of
from offramp.calibration.observe import (
    Observed,
    generate,
    observe_rows,
    observe_tokens,
    runs_once,
    scored,
    stack_of,
    time_rows,
    unasked,
)
from offramp.calibration.quality import Quality, classes_of, same_class, same_tokens
from offramp.calibration.risk import accepted, losses_of, p_value
from offramp.calibration.sequence import Asked, Tested
from offramp.errors import InputError
from offramp.runtime import Chain, Each, Never, Policy, Verify, Width, card, load
from offramp.runtime.engine.cores import physical_cores

_Width: TypeAlias = float | Literal["choose"] | None
_ROW_POINTS, _TOKEN_POINTS = 40, 10  # of a path; every point of tokens is generated anew


@dataclass(frozen=True)
class Calibration:
    """What was chosen and why.

    Attributes:
        policy: The bundle's new default policy; `Never` where nothing could be proven, or nothing pays.
        record: As ``Manifest.calibration`` has it; ``record["reason"]`` says why it is `Never`.
    """

    policy: Policy
    record: Mapping[str, Any]

    @property
    def chosen(self) -> bool:
        """Whether there is something to make the default: beside other stacks' policies, which stay if not."""
        return "others" not in self.record or self.record["reason"] is None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Make it the default of the bundle at ``path``: its manifest is replaced at once, and its card after it.

        Raises:
            InputError: that bundle is in another precision than the one that this was chosen for.
        """
        manifest, root = directory.read(path, verify=False)
        if encodings(manifest) != self.record.get("encodings", {}):
            raise InputError(
                f"this was chosen for a bundle in {_listed(self.record.get('encodings', {}))}; {root.name} is in "
                f"{_listed(encodings(manifest))}, whose scores are others",
                hint=f"offramp calibrate {root.name}",
            )
        manifest = replace(manifest, policy=self.policy.to_dict(), calibration=self.record)
        text = to_json(manifest)
        with NamedTemporaryFile("w", dir=root, prefix=".manifest", delete=False, encoding="utf-8") as file:
            file.write(text)
        written = File(file.name)
        written.chmod((root / MANIFEST_FILE).stat().st_mode)
        written.replace(root / MANIFEST_FILE)
        card.write(manifest, root)


def calibrate(
    model: Chain | str | os.PathLike[str],
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    keep: float = 0.99,
    confidence: float = 0.95,
    quality: Quality | None = None,
    stack: str | None = None,
    measure: str | None = None,
    width: float | Literal["choose"] | None = None,
    others: Policy | None = None,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Choose measure, exits and thresholds of one stack, or the width, so that quality is kept.

    With a probability of at least ``confidence`` over the examples, the expected quality is at least ``keep`` times
    that at full depth with all learners, on data like them. What costs more than it saves on this machine, one row at
    a time, is left out. Other stacks run to full depth, or as ``others`` says. A bundle that is given by its path gets
    the policy as its default.

    Args:
        model: A loaded bundle, or the path of one.
        data: A batch as ``run`` or ``generate`` takes it, or several; "labels" beside the inputs, or none.
        keep: The share of the quality at full depth, between 0 and 1.
        confidence: The probability, between 0 and 1.
        quality: ``(answer, reference) -> [0, 1]``: see `offramp.calibration.quality`. If left out, whether the highest
            of the logits is right, or for generations 1 less the normalised edit distance. The reference is the
            label; without labels the answer at full depth.
        stack: The stack whose exits are chosen among, or the group of tokens (``STACK.GROUP``); the last one with
            scores if left out. Of a generator, the last that runs for each token, or one that runs once.
        measure: The score that is compared with thresholds; the one that is expected to be fastest if left out.
        width: For bundles with learners. "choose" chooses the budget of a `Width`, at full depth. With a budget exits
            are chosen at that width, if that alone passes; it should come from other examples. If left out, exits are
            chosen with all learners, or where no exit has a score, the width.
        others: What the other stacks do, an `Each` that was chosen before on other examples: image first, say, then
            text, then the decoder. What is proven is proven of all of them together; where nothing is, a bundle that
            is given by its path keeps the policy that it has.
        seed: Of the split into examples that are fitted on and examples that are tested on.
        options: Of a generation: ``max_new_tokens``, ``stop``, ... It is greedy.

    Raises:
        InputError: options or data make no sense for this bundle.
    """
    if not 0 < keep < 1 or not 0 < confidence < 1:
        raise InputError(f"keep={keep}, confidence={confidence}: both are between 0 and 1")
    chain = model if isinstance(model, Chain) else load(model)
    examples = read(chain, data)
    if chain.generates is None and options:
        raise InputError(f"options {sorted(options)} are of generations; this bundle does not generate")
    if options.get("temperature") or options.get("beams", 1) != 1:
        raise InputError("a calibration compares greedy texts", hint="leave temperature and beams out")
    judged = quality or (same_class if chain.generates is None else same_tokens)
    asked = Asked(chain, keep, confidence, judged, options)
    exits, budgets = _exits(asked, stack, measure, width, others), _budgets(width)
    if quality is None and chain.generates is None:
        classes_of(chain)
    fitting, testing = examples.split(seed)
    policy: Policy = Never()
    found: dict[str, Any] = {"reason": asked.too_few(fitting, testing)}
    if found["reason"] is None and exits is not None:
        by_token = chain.generates is not None and not runs_once(chain, exits.stack)
        policy, found = (_tokens if by_token else _rows)(exits, fitting, testing)
    elif found["reason"] is None:
        policy, found = widths.choose(asked, fitting, testing, budgets)
    record = {
        **(exits.about if exits is not None else {}),
        "keep": keep,
        "confidence": confidence,
        "quality": _named(quality, examples),
        "examples": len(examples),
        "data": examples.sha256,
        "seed": seed,
        "encodings": encodings(chain.manifest),
        **found,
        "versions": {name: version(name) for name in ("offramp", "numpy", "onnxruntime")},
        "machine": f"{platform.machine()}, {physical_cores()} cores",
    }
    calibration = Calibration(policy, record)
    if not isinstance(model, Chain) and calibration.chosen:
        calibration.write(model)
    return calibration


@dataclass(frozen=True)
class _Exits:
    """Exits are to be chosen: of which stack, by which score, and beside what (None: full depth and all learners)."""

    asked: Asked
    stack: Stack
    measure: str | None
    beside: Policy | None

    @property
    def about(self) -> dict[str, Any]:
        exits = self.beside.exits if isinstance(self.beside, Width) else self.beside
        width = {"width": self.beside.budget} if isinstance(self.beside, Width) else {}
        return {"stack": self.stack.name, **width, **({"others": exits.to_dict()} if exits is not None else {})}

    def policy(self, path: Path, thresholds: Thresholds) -> Policy:
        alone = len(self.asked.chain.stacks) == 1
        return policy_of(self.stack, path.measure, thresholds, alone=alone, beside=self.beside)

    def fit(self, seen: Observed, costs: Costs, tests: int, points: int) -> Path:
        """The path of the measure that is asked for, or expected to be the fastest."""
        known = list(seen.scores)
        if self.measure is not None and self.measure not in known:
            raise InputError(
                f"no exit of {self.stack.name!r} has the score {self.measure!r}; there are {', '.join(known)}"
            )
        fit = Fit(seen, costs, self.asked.keep, self.asked.confidence, tests, points)
        return fit.chosen([self.measure] if self.measure is not None else known)


def _exits(asked: Asked, stack: str | None, measure: str | None, width: _Width, others: Policy | None) -> _Exits | None:
    """Which exits are to be chosen; None where it is the width."""
    learners, about_exits = asked.chain.manifest.learners, stack is not None or measure is not None
    if width is not None and not learners:
        raise InputError(f"width={width!r}: this bundle has no learners", hint="insert-acm before export")
    if width == "choose" and about_exits:
        raise InputError(
            f"stack={stack!r}, measure={measure!r}: width='choose' chooses no exits",
            hint="width='choose' first, then the exits at the width that came out: width=0.5",
        )
    if width == "choose" or (learners and not about_exits and not scored(asked.chain)):
        return None
    chosen = stack_of(asked.chain, stack)
    if others is not None:
        if not isinstance(others, Each) or chosen.name in others.stacks:
            raise InputError(
                f"others={others!r}: what stacks other than {chosen.name!r} do", hint='others=Each({"STACK": policy})'
            )
        others.check(asked.chain.stacks)
        if others.observes or any(isinstance(policy, Verify) for policy in others.stacks.values()):
            raise InputError(
                f"others={others!r}: what learns or checks drafts is not the same in every run",
                hint="policies with fixed thresholds",
            )
    beside = others if width is None else Width(_budgets(width)[0], others)
    return _Exits(asked, chosen, measure, beside)


def _budgets(width: _Width) -> Sequence[float]:
    """The budgets that are tested, from careful to bold."""
    if width is None or width == "choose":
        return widths.BUDGETS
    if isinstance(width, str) or not 0 <= width < 1:
        raise InputError(f"width={width!r}: 'choose', or a share of the learners, from 0 to less than 1")
    return (width,)


def _rows(exits: _Exits, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """Rows are run once at every exit; then all settings are known without running them."""
    asked, stack, beside = exits.asked, exits.stack, exits.beside
    costs = time_rows(asked.chain, stack, fitting.inputs, beside)
    seen = observe_rows(asked.chain, stack, fitting, asked.quality, beside, asked.options)
    path = exits.fit(seen, costs, len(testing), _ROW_POINTS)
    held = observe_rows(asked.chain, stack, testing, asked.quality, beside, asked.options)
    return _chosen(exits, path, tested(path, held, asked.keep), costs)


def tested(path: Path, held: Observed, keep: float) -> Tested:
    """All settings of a path, on rows that nothing was fitted on."""
    scores = held.scores[path.measure]
    early = [
        np.take_along_axis(held.quality, leaves(path.measure, scores, thresholds)[:, None], 1)[:, 0]
        for thresholds, _ in path.settings
    ]
    return Tested(held.whole, early, [p_value(losses_of(one, held.whole, keep), keep) for one in early])


def _tokens(exits: _Exits, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """Tokens feed back, so each setting is generated with, until one fails."""
    asked, stack = exits.asked, exits.stack
    texts = [generate(asked.chain, example, Never(), asked.options)[0] for example in fitting.inputs]
    none_longer = max(text.size for text in texts) < 2  # else nobody needs to look at the prompts
    if none_longer and all(text.size <= n for text, n in zip(texts, unasked(asked.chain, fitting), strict=True)):
        return Never(), {
            "reason": "no text is longer than one token, which behind a prompt of several never leaves early"
        }
    seen, costs = observe_tokens(asked.chain, stack, fitting, texts, asked.options, exits.beside)
    path = exits.fit(seen, costs, len(testing), _TOKEN_POINTS)
    policies = [exits.policy(path, thresholds) for thresholds, _ in path.settings]
    return _chosen(exits, path, sequence.tested(asked, testing, policies), costs)


def _chosen(exits: _Exits, path: Path, results: Tested, costs: Costs) -> tuple[Policy, dict[str, Any]]:
    """The boldest setting that passed, or `Never` and why."""
    asked, after = exits.asked, [str(exit_.after) for exit_ in exits.stack.exits]
    dropped = {after[at]: why for at, why in sorted(path.dropped.items())}
    full_ms = round(costs.whole, 4)
    record: dict[str, Any] = {
        "reason": None,
        "measure": path.measure,
        "temperatures": {
            after[at]: [round(scale.temperature, 6), round(scale.offset, 6)] for at, scale in path.scales.items()
        },
        "dropped": dropped,
        "milliseconds": {"full": full_ms, "expected": full_ms},
        **results.record(asked.level, len(path.settings)),
    }
    count = accepted(results.p_values, asked.level)
    if not count:
        first = f"the most careful setting of {path.measure!r}"
        record["reason"] = (
            results.why_none(asked, first, "better exits")
            if path.settings
            else f"no setting of {path.measure!r} is faster than full depth on this machine"
        )
        return Never(), record
    thresholds, expected = path.settings[count - 1]
    for at in path.scales.keys() - thresholds.keys():
        dropped[after[at]] = "none of the examples is sure enough there"
    record["thresholds"] = {after[at]: number for at, number in thresholds.items()}
    record["milliseconds"]["expected"] = round(expected, 4)
    return exits.policy(path, thresholds), record


def _listed(found: Mapping[str, str]) -> str:
    """Encodings in words."""
    return ", ".join(sorted(set(found.values()))) + f" ({len(found)} segments)" if found else "fp32"


def _named(quality: Quality | None, examples: Examples) -> str:
    name = "default" if quality is None else getattr(quality, "__name__", type(quality).__name__)
    return f"{name} against {'labels' if examples.labels is not None else 'full depth'}"

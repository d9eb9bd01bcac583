"""`calibrate`: the thresholds, or the width, with which a bundle keeps its quality, proven on examples, timed here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

from offramp.bundle import directory
from offramp.bundle.json_text import to_json
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.bundle.precision import encodings
from offramp.calibration import exits, joint, sequence, widths
from offramp.calibration.examples import Examples, read
from offramp.calibration.exits import Exits
from offramp.calibration.joint import Joint
from offramp.calibration.observe import scored, stack_of, stacks_of
from offramp.calibration.quality import Quality, classes_of, same_class, same_tokens
from offramp.calibration.sequence import Asked, check_generation
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain, Each, Never, Policy, Verify, Width, card, load
from offramp.runtime.engine.cores import physical_cores
from offramp.runtime.policies.width import parted

_Stacks: TypeAlias = str | Sequence[str] | None
_Measures: TypeAlias = str | Mapping[str, str] | None
_Width: TypeAlias = float | Literal["choose"] | None


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
            PolicyError: it does not have the exits or scores that were chosen.
        """
        manifest, root = directory.read(path, verify=False)
        if encodings(manifest) != self.record.get("encodings", {}):
            raise InputError(
                f"this was chosen for a bundle in {_listed(self.record.get('encodings', {}))}; {root.name} is in "
                f"{_listed(encodings(manifest))}, whose scores are others",
                hint=f"offramp calibrate {root.name}",
            )
        policy, _ = parted(self.policy, manifest)
        policy.check(manifest.leaving)
        manifest = replace(manifest, policy=self.policy.to_dict(), calibration=self.record)
        text = to_json(manifest)
        directory.write_whole(root / MANIFEST_FILE, text, (root / MANIFEST_FILE).stat().st_mode)
        card.write(manifest, root)


def calibrate(
    model: Chain | str | os.PathLike[str],
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    keep: float = 0.99,
    confidence: float = 0.95,
    quality: Quality | None = None,
    stack: str | Sequence[str] | None = None,
    measure: str | Mapping[str, str] | None = None,
    width: float | Literal["choose"] | None = None,
    others: Policy | None = None,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Choose measure, exits and thresholds of one stack, of several at once, or the width, so that quality is kept.

    With a probability of at least ``confidence`` over the examples, the expected quality is at least ``keep`` times
    that at full depth and width 1, on data like them. What costs more than it saves on this machine, one row at
    a time, is left out. Other stacks run to full depth, or as ``others`` says. A bundle that is given by its path gets
    the policy as its default.

    Args:
        model: A loaded bundle, or the path of one.
        data: A batch as ``run`` or ``generate`` takes it, or several; "labels" beside the inputs, one for each row, or
            none: class ids of each place of the logits, -100 where it does not count; for generations token ids;
            with ``quality`` whatever that takes.
        keep: The share of the quality at full depth, between 0 and 1.
        confidence: The probability, between 0 and 1.
        quality: ``(answer, reference) -> [0, 1]``: see `offramp.calibration.quality`. If left out, whether the highest
            of the logits is right, or for generations 1 less the normalised edit distance. The reference is the
            label; without labels the answer at full depth.
        stack: The stack whose exits are chosen among, or the group of tokens (``STACK.GROUP``); the last one with
            scores if left out. Of a generator, the last that runs for each token, or one that runs once. A sequence
            of them is chosen for together: of combinations of thresholds and of depths that are the same for all
            (`Depth`) the fastest that passes, as whole rows or generations take. That takes many runs: a pass over
            three in ten examples for each exit and for each of 64 combinations, and 13 over the others, at most.
        measure: The score that is compared with thresholds; the one that is expected to be fastest if left out. Of
            several stacks one for all, or one by name.
        width: For bundles with learners. "choose" chooses the budget of a `Width`, at full depth. With a budget exits
            are chosen at that width, if that alone passes; it should come from other examples. If left out, exits are
            chosen with all learners, or where no exit has a score, the width.
        others: What the other stacks do, an `Each` that was chosen before on other examples: the encoder first, say,
            then the decoder. What is proven is proven of all of them together; where nothing is, a bundle that is
            given by its path keeps the policy that it has. The first one chosen may lose all that may be lost, for
            little: to choose several, name them as ``stack``.
        seed: Of the split into examples that are fitted on and examples that are tested on, at least 0.
        options: Of a generation: ``max_new_tokens``, ``stop``, ... It is greedy.

    Raises:
        InputError: options or data make no sense for this bundle, however few examples there are; labels are nothing
            that the answers can be compared with.
    """
    _check_options(keep, confidence, quality, stack, measure, seed)
    chain = model if isinstance(model, Chain) else load(model)
    examples = read(chain, data)
    check_generation(chain, options)
    judged = quality or (same_class if chain.generates is None else same_tokens)
    asked = Asked(chain, keep, confidence, judged, options)
    chosen, budgets = _exits(asked, stack, measure, width, others), _budgets(width)
    if quality is None and chain.generates is None:
        classes_of(chain, examples)
    fitting, testing = examples.split(seed)
    policy: Policy = Never()
    found: dict[str, Any] = {"reason": asked.too_few(fitting, testing)}
    if found["reason"] is None:
        found["reason"] = sequence.nothing_right(asked, fitting)
    else:  # what does not fit is refused all the same
        sequence.full(asked, examples if chain.generates is None else examples.some([0]))
    if found["reason"] is None and isinstance(chosen, Exits):
        policy, found = exits.choose(chosen, fitting, testing)
    elif found["reason"] is None and isinstance(chosen, Joint):
        policy, found = joint.choose(chosen, fitting, testing)
    elif found["reason"] is None:
        policy, found = widths.choose(asked, fitting, testing, budgets)
    record = {
        **(chosen.about if chosen is not None else {}),
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


def _check_options(
    keep: float, confidence: float, quality: Quality | None, stack: _Stacks, measure: _Measures, seed: int
) -> None:
    """Raise InputError where an option of every bundle makes no sense."""
    if not all(isinstance(share, Real) and 0 < share < 1 for share in (keep, confidence)):
        raise InputError(f"keep={keep}, confidence={confidence}: both are between 0 and 1")
    if quality is not None and not callable(quality):
        raise InputError(f"quality={quality!r}: a function of answer and reference, or None")
    if stack is not None and not isinstance(stack, str | Sequence):
        raise InputError(f"stack={stack!r}: a stack's name, or several")
    if measure is not None and not isinstance(measure, str | Mapping):
        raise InputError(f"measure={measure!r}: a score's name, or one by stack")
    if not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed={seed!r}: a whole number, at least 0")


def _exits(
    asked: Asked, stack: _Stacks, measure: _Measures, width: _Width, others: Policy | None
) -> Exits | Joint | None:
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
        if others is not None:
            raise InputError(
                f"others={others!r}: a width is chosen at full depth of all stacks",
                hint="the width first, then the exits at the width that came out: width=0.5",
            )
        return None
    chosen = [stack_of(asked.chain, stack)] if isinstance(stack, str | None) else stacks_of(asked.chain, stack)
    names = [each.name for each in chosen]
    if not isinstance(measure, str | None) and not measure.keys() <= {*names}:
        raise InputError(f"measure={measure!r}: a score's name, or one by stack, of {', '.join(names)}")
    if others is not None:
        _check_others(asked.chain, others, names)
    beside = others if width is None else Width(_budgets(width)[0], others)
    found = [
        Exits(asked, each, measure if isinstance(measure, str | None) else measure.get(each.name), beside)
        for each in chosen
    ]
    return found[0] if isinstance(stack, str | None) else Joint(asked, found, beside)


def _check_others(chain: Chain, others: Policy, names: Sequence[str]) -> None:
    """Raise InputError where ``others`` cannot be what stacks but these do."""
    if not isinstance(others, Each) or not others.stacks.keys().isdisjoint(names):
        raise InputError(
            f"others={others!r}: what stacks other than {', '.join(map(repr, names))} do",
            hint='others=Each({"STACK": policy})',
        )
    others.check(chain.stacks)
    try:
        others.to_dict()
    except PolicyError as error:
        raise InputError(f"others={others!r}: {error.reason}", hint="policies of offramp's own") from error
    if others.observes or any(isinstance(policy, Verify) for policy in others.stacks.values()):
        raise InputError(
            f"others={others!r}: what learns or checks drafts is not the same in every run",
            hint="policies with fixed thresholds",
        )


def _budgets(width: _Width) -> Sequence[float]:
    """The budgets that are tested, from careful to bold."""
    if width is None or width == "choose":
        return widths.BUDGETS
    if isinstance(width, str) or not 0 <= width < 1:
        raise InputError(f"width={width!r}: 'choose', or a share of the learners, from 0 to less than 1")
    return (width,)


def _listed(found: Mapping[str, str]) -> str:
    """Encodings in words."""
    return ", ".join(sorted(set(found.values()))) + f" ({len(found)} segments)" if found else "fp32"


def _named(quality: Quality | None, examples: Examples) -> str:
    name = "default" if quality is None else getattr(quality, "__name__", type(quality).__name__)
    return f"{name} against {'labels' if examples.labels is not None else 'full depth'}"

"""`calibrate`: the thresholds with which a bundle keeps a share of its quality, proven on examples, timed here."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path as File
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import directory
from offramp.bundle.json_text import to_json
from offramp.bundle.manifest import MANIFEST_FILE, Stack
from offramp.calibration.examples import FIT_SHARE, Examples, read
from offramp.calibration.gates import Fit, Path, Thresholds, leaves, policy_of
from offramp.calibration.observe import Observed, generate, observe_rows, observe_tokens, stack_of, time_rows
from offramp.calibration.quality import Quality, classes_of, graded, same_class, same_tokens
from offramp.calibration.risk import accepted, least_examples, losses_of, p_value
from offramp.errors import InputError
from offramp.runtime import Chain, Never, Policy, card, load
from offramp.runtime.engine.cores import physical_cores

Numbers = NDArray[np.float64]

_ROW_POINTS, _TOKEN_POINTS = 40, 10  # of a path; every point of tokens is generated anew
LEAST_FIT = 20  # examples, for a fit of two numbers at each exit


@dataclass(frozen=True)
class Calibration:
    """What was chosen and why.

    Attributes:
        policy: The bundle's new default policy; `Never` where nothing could be proven, or nothing pays.
        record: As ``Manifest.calibration`` has it; ``record["reason"]`` says why it is `Never`.
    """

    policy: Policy
    record: Mapping[str, Any]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Make it the default of the bundle at ``path``: its manifest is replaced at once, and its card after it."""
        manifest, root = directory.read(path, verify=False)
        manifest = replace(manifest, policy=self.policy.to_dict(), calibration=self.record)
        text = to_json(manifest)
        with NamedTemporaryFile("w", dir=root, prefix=".manifest", delete=False, encoding="utf-8") as file:
            file.write(text)
        written = File(file.name)
        written.chmod((root / MANIFEST_FILE).stat().st_mode)
        written.replace(root / MANIFEST_FILE)
        card.write(manifest, root)


@dataclass(frozen=True)
class Tested:
    """How far along a path the tests went: qualities by example of each setting that passed, and its p-value."""

    full: Numbers
    early: Sequence[Numbers]
    p_values: Sequence[float]


def calibrate(
    model: Chain | str | os.PathLike[str],
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    keep: float = 0.99,
    confidence: float = 0.95,
    quality: Quality | None = None,
    stack: str | None = None,
    measure: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Choose measure, exits and thresholds of one stack, so that quality is kept; others run to full depth.

    With a probability of at least ``confidence`` over the examples, the expected quality with exits is at least
    ``keep`` times that at full depth, on data like them. Exits that cost more than they save on this machine, one row
    at a time, are left out. A bundle that is given by its path gets the policy as its default.

    Args:
        model: A loaded bundle, or the path of one.
        data: A batch as ``run`` or ``generate`` takes it, or several; "labels" beside the inputs, or none.
        keep: The share of the quality at full depth, between 0 and 1.
        confidence: The probability, between 0 and 1.
        quality: ``(answer, reference) -> [0, 1]``: see `offramp.calibration.quality`. If left out, whether the highest
            of the logits is right, or for generations 1 less the normalised edit distance. The reference is the
            label; without labels the answer at full depth.
        stack: The stack whose exits are chosen among; the last one with scores if left out. Of a generator, the last
            that runs for each token.
        measure: The score that is compared with thresholds; the one that is expected to be fastest if left out.
        seed: Of the split into examples that are fitted on and examples that are tested on.
        options: Of a generation: ``max_new_tokens``, ``stop``, ... It is greedy.

    Raises:
        InputError: options or data make no sense for this bundle.
    """
    if not 0 < keep < 1 or not 0 < confidence < 1:
        raise InputError(f"keep={keep}, confidence={confidence}: both are between 0 and 1")
    chain = model if isinstance(model, Chain) else load(model)
    examples = read(chain, data)
    chosen = stack_of(chain, stack)
    if chain.generates is None and options:
        raise InputError(f"options {sorted(options)} are of generations; this bundle does not generate")
    if options.get("temperature") or options.get("beams", 1) != 1:
        raise InputError("a calibration compares greedy texts", hint="leave temperature and beams out")
    run = _tokens if chain.generates is not None else _rows
    asked = _Asked(chain, chosen, keep, confidence, quality, measure, options)
    found = run(asked, *examples.split(seed))
    record = {
        "stack": chosen.name,
        "keep": keep,
        "confidence": confidence,
        "quality": _named(quality, examples),
        "examples": len(examples),
        "data": examples.sha256,
        "seed": seed,
        **found.record,
        "versions": {name: version(name) for name in ("offramp", "numpy", "onnxruntime")},
        "machine": f"{platform.machine()}, {physical_cores()} cores",
    }
    calibration = Calibration(found.policy, record)
    if not isinstance(model, Chain):
        calibration.write(model)
    return calibration


@dataclass(frozen=True)
class _Asked:
    """What a calibration is asked for."""

    chain: Chain
    stack: Stack
    keep: float
    confidence: float
    quality: Quality | None
    measure: str | None
    options: Mapping[str, Any]

    @property
    def level(self) -> float:
        return 1 - self.confidence

    def policy(self, path: Path, thresholds: Thresholds) -> Policy:
        return policy_of(self.stack, path.measure, thresholds, alone=len(self.chain.stacks) == 1)

    def measures(self, known: Mapping[str, Any]) -> list[str]:
        if self.measure is not None and self.measure not in known:
            raise InputError(
                f"no exit of {self.stack.name!r} has the score {self.measure!r}; there are {', '.join(known)}"
            )
        return [self.measure] if self.measure is not None else list(known)


def _rows(asked: _Asked, fitting: Examples, testing: Examples) -> Calibration:
    """Rows are run once at every exit; then all settings are known without running them."""
    if asked.quality is None:
        classes_of(asked.chain)
    quality = asked.quality or same_class
    if reason := _too_few(asked, fitting, testing):
        return _chosen(asked, None, None, 0.0, reason)
    costs = time_rows(asked.chain, asked.stack, fitting.inputs)
    seen = observe_rows(asked.chain, asked.stack, fitting, quality)
    fit = Fit(seen, costs, asked.keep, asked.confidence, len(testing), _ROW_POINTS)
    path = fit.chosen(asked.measures(seen.scores))
    held = observe_rows(asked.chain, asked.stack, testing, quality)
    return _chosen(asked, path, tested(path, held, asked.keep), costs.full)


def tested(path: Path, held: Observed, keep: float) -> Tested:
    """All settings of a path, on rows that nothing was fitted on."""
    scores, full = held.scores[path.measure], held.quality[:, -1]
    early = [
        np.take_along_axis(held.quality, leaves(path.measure, scores, thresholds)[:, None], 1)[:, 0]
        for thresholds, _ in path.settings
    ]
    return Tested(full, early, [p_value(losses_of(one, full, keep), keep) for one in early])


def _tokens(asked: _Asked, fitting: Examples, testing: Examples) -> Calibration:
    """Tokens feed back, so each setting is generated with, until one fails."""
    chain, options, quality = asked.chain, asked.options, asked.quality or same_tokens
    if reason := _too_few(asked, fitting, testing):
        return _chosen(asked, None, None, 0.0, reason)
    texts = [generate(chain, example, Never(), options)[0] for example in fitting.inputs]
    if max(text.size for text in texts) < 2:
        return _chosen(asked, None, None, 0.0, "no text is longer than one token, and the first one never leaves early")
    seen, costs = observe_tokens(chain, asked.stack, fitting, texts, options)
    fit = Fit(seen, costs, asked.keep, asked.confidence, len(testing), _TOKEN_POINTS)
    path = fit.chosen(asked.measures(seen.scores))
    whole = [generate(chain, example, Never(), options)[0] for example in testing.inputs]
    references = whole if testing.labels is None else testing.labels
    full = np.array([graded(quality, *pair) for pair in zip(whole, references, strict=True)])
    early: list[Numbers] = []
    values: list[float] = []
    for thresholds, _ in path.settings:
        grades: list[float] = []
        value = 1.0
        for example, reference in zip(testing.inputs, references, strict=True):
            text, _ = generate(chain, example, asked.policy(path, thresholds), options)
            grades.append(graded(quality, text, reference))
            value = p_value(losses_of(np.array(grades), full[: len(grades)], asked.keep), asked.keep)
            if value <= asked.level:  # enough is proven: the rest of the examples can stay out
                break
        early.append(np.array(grades))
        values.append(value)
        if value > asked.level:
            break
    return _chosen(asked, path, Tested(full, early, values), costs.full)


def _too_few(asked: _Asked, fitting: Examples, testing: Examples) -> str | None:
    least = least_examples(asked.keep, asked.level)
    if len(fitting) >= LEAST_FIT and len(testing) >= least:
        return None
    needed = math.ceil(max(LEAST_FIT / FIT_SHARE, least / (1 - FIT_SHARE))) + 1
    return (
        f"{len(fitting) + len(testing)} examples are too few: keep={asked.keep:g} with confidence "
        f"{asked.confidence:g} needs at least {needed}, even if no exit ever loses anything"
    )


def _chosen(
    asked: _Asked, path: Path | None, results: Tested | None, full_ms: float, reason: str | None = None
) -> Calibration:
    """The boldest setting that passed, or `Never` and why."""
    count = accepted(results.p_values, asked.level) if results else 0
    record: dict[str, Any] = {"reason": reason}
    if path is None or results is None:
        return Calibration(Never(), record)
    dropped = {str(asked.stack.exits[at].after): why for at, why in sorted(path.dropped.items())}
    record |= {
        "measure": path.measure,
        "temperatures": {
            str(asked.stack.exits[at].after): [round(scale.temperature, 6), round(scale.offset, 6)]
            for at, scale in path.scales.items()
        },
        "dropped": dropped,
        "settings": {"tested": min(len(results.p_values), count + 1), "passed": count, "of": len(path.settings)},
        "milliseconds": {"full": round(full_ms, 4), "expected": round(full_ms, 4)},
    }
    if not count:
        record["reason"] = _why_never(asked, path, results)
        return Calibration(Never(), record)
    thresholds, expected = path.settings[count - 1]
    early = results.early[count - 1]
    for at in path.scales.keys() - thresholds.keys():
        dropped[str(asked.stack.exits[at].after)] = "none of the examples is sure enough there"
    record["thresholds"] = {str(asked.stack.exits[at].after): number for at, number in thresholds.items()}
    record["milliseconds"]["expected"] = round(expected, 4)
    record["risk"] = {
        "full": round(float(results.full[: early.size].mean()), 6),
        "early": round(float(early.mean()), 6),
        "examples": early.size,
        "p_value": float(f"{results.p_values[count - 1]:.3g}"),
    }
    return Calibration(asked.policy(path, thresholds), record)


def _why_never(asked: _Asked, path: Path, results: Tested) -> str:
    if not path.settings:
        return f"no setting of {path.measure!r} is faster than full depth on this machine"
    early = results.early[0]
    found = early.mean() / max(results.full[: early.size].mean(), 1e-12)
    return (
        f"even the most careful setting of {path.measure!r} is not proven to keep {asked.keep:g}: it kept {found:.4f} "
        f"of the quality in {early.size} examples (p = {results.p_values[0]:.2g}, needed {asked.level:.2g}); more "
        "examples, better exits or a smaller keep may help"
    )


def _named(quality: Quality | None, examples: Examples) -> str:
    name = "default" if quality is None else getattr(quality, "__name__", type(quality).__name__)
    return f"{name} against {'labels' if examples.labels is not None else 'full depth'}"

"""The measures by which an exit tells how sure it is, in one table: what a measure means is asked nowhere else.

A bundle may score by measures of its own; those are taken to go from 0 (unsure) to 1, as most of these do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: What a score is made of: the exit's logits, those of a head of its own (for a short list of candidates, or for all
#: classes), hidden states, or a trained gate.
Source = Literal["logits", "short head", "screened head", "hidden states", "gate", "bundle"]
#: What is computed of the source; the measures of a short head are those of logits, of the candidates' alone.
Computation = Literal["top1", "margin", "entropy", "prediction", "cosine", "learned", "unknown"]


@dataclass(frozen=True)
class Measure:
    """One score of an exit.

    Attributes:
        name: What pipelines, bundles and policies call it.
        source: What it is made of, hence what has to run to ask for it.
        computes: What is computed of that.
        surer: Which scores are surer, greater ones (from 0 to 1) or lesser ones (from 0, without bound); None where the
            score says what the exit would answer, not how surely.
        dtype: Of the values that a bundle's segments make.
    """

    name: str
    source: Source
    computes: Computation
    surer: Literal["greater", "less"] | None = "greater"
    dtype: Literal["float32", "int64"] = "float32"

    @property
    def gates(self) -> bool:
        """Whether a threshold can be set for it."""
        return self.surer is not None

    @property
    def of_classes(self) -> bool:
        """Whether its source has a number for each class."""
        return self.source in ("logits", "short head", "screened head")

    @property
    def bounded(self) -> bool:
        """Whether it goes from 0, unsure, to 1."""
        return self.surer == "greater"


#: A row's next token, of a short list of candidates: greedy generation takes it where the row leaves.
PICK = "prediction-short"
#: The same of all classes, which needs nobody's consent: it is what the logits would say, in their precision.
SCREENED = "prediction-screened"

MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("top1", "logits", "top1"),
        Measure("margin", "logits", "margin"),
        Measure("entropy", "logits", "entropy", "less"),
        Measure("prediction", "logits", "prediction", None, "int64"),
        Measure("cosine", "hidden states", "cosine"),
        Measure("learned", "gate", "learned"),
        Measure("top1-short", "short head", "top1"),
        Measure("margin-short", "short head", "margin"),
        Measure(PICK, "short head", "prediction", None, "int64"),
        Measure(SCREENED, "screened head", "prediction", None, "int64"),
    )
}


def names_from(*sources: Source) -> tuple[str, ...]:
    """The measures of these sources by name, in the table's order."""
    return tuple(name for name, measure in MEASURES.items() if measure.source in sources)


OF_LOGITS = names_from("logits")
OF_STATE = names_from("hidden states", "gate")
OF_SHORT = names_from("short head")
OF_OWN_HEAD = names_from("short head", "screened head")


def measure_named(name: str) -> Measure:
    """The measure of that name; one that the table does not have is the bundle's own."""
    return MEASURES.get(name) or Measure(name, "bundle", "unknown")

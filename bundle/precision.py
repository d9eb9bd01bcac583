"""What a bundle says of its precision: which segments have fewer bits, and how far that is from fp32."""

from __future__ import annotations

from collections.abc import Mapping

from offramp.bundle.manifest import Manifest

#: Figures of ``Manifest.validation`` that compare an encoded bundle with the one in fp32.
ERROR, ANSWERS, EXITS = "encoding", "same answers", "same exits"


def encodings(manifest: Manifest) -> Mapping[str, str]:
    """The encoding of each segment that is not fp32. Thresholds hold for the encodings that they were chosen with."""
    return {name: item.encoding for name, item in manifest.segments.items() if item.encoding != "fp32"}


def against_fp32(manifest: Manifest) -> str:
    """What encoding changed, in words; empty where nothing is encoded."""
    found = manifest.validation
    if ERROR not in found:
        return ""
    text = f"{manifest.precision} against fp32: {found[ERROR]:.3f} of the outputs' scale"
    if ANSWERS in found:
        text += f", {found[ANSWERS]:.1%} of the answers are the same"
    return text + (f", {found[EXITS]:.1%} of the exits taken" if EXITS in found else "")

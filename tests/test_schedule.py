"""The schedule of a manifest: run in thought, it has every value when it is read, and keeps none for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bundles
import pytest
import tiny

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import Manifest
from offramp.bundle.schedule import Schedule, Span, Step

KINDS: dict[str, Callable[[Path], Path]] = {
    "adapters": lambda path: bundles.classifier(path, adapters=True),
    "scores of blocks": lambda path: bundles.classifier(path, scores="block"),
}


def run(manifest: Manifest, there: set[str], names: tuple[str, ...], dead: tuple[frozenset[str], ...] = ()) -> None:
    for at, name in enumerate(names):
        segment = manifest.segments[name]
        assert set(segment.inputs.values()) <= there, name
        there |= set(segment.outputs.values())
        there -= dead[at] if dead else frozenset()


def walk_span(manifest: Manifest, step: Step, span: Span, there: set[str]) -> None:
    run(manifest, there, span.segments, span.dead)
    branch = span.branch
    assert branch is not None
    assert {branch.scores[measure] for measure in branch.free} <= there
    here = set(branch.reads)
    assert here <= there
    run(manifest, here, branch.segments)
    assert set(branch.results.values()) <= here
    assert branch.results.keys() <= step.makes


def assert_flows(manifest: Manifest, schedule: Schedule, there: set[str]) -> None:
    for step in schedule.steps:
        assert step.reads <= there
        if step.stack is None:
            run(manifest, there, step.segments)
        else:
            inside = set(step.reads)
            for span in step.spans:
                walk_span(manifest, step, span, inside)
                assert span.live <= inside
                inside = set(span.live)
        there |= step.makes
        assert step.live <= there
        there &= step.live


@pytest.mark.parametrize("kind", KINDS)
def test_of_hand_written_bundles(kind: str, tmp_path: Path) -> None:
    manifest, _ = directory.read(KINDS[kind](tmp_path / "m"))
    assert_flows(manifest, Schedule.of(manifest), set(manifest.inputs))


def test_of_two_stacks_with_caches(two_stacks: tiny.Captured, tmp_path: Path) -> None:
    text = "insert-cache,insert-exits{stack=encoder,after=1},insert-exits{stack=decoder},insert-scores{measure=top1}"
    offramp.save(offramp.apply(two_stacks.program, text.replace("{measure", "{stack=decoder,measure")), tmp_path / "m")
    manifest, _ = directory.read(tmp_path / "m")
    cache = manifest.cache
    assert cache is not None
    given = {*manifest.inputs, cache.lengths, cache.places, *cache.buffers}
    whole = Schedule.of(manifest)
    assert_flows(manifest, whole, set(given))
    chunk = Schedule.of(manifest, ("chunk",), (cache.logits,))
    once = {name for step in whole.steps if step.stage.when != "chunk" for name in step.makes}
    assert_flows(manifest, chunk, given | once)
    decoder = whole.of_stack("decoder")
    assert whole.of_stack("encoder") in [step for near in whole.after(decoder) for step in (near, *whole.after(near))]
    assert [span.branch.after for span in decoder.spans if span.branch] == [
        exit_.after for exit_ in manifest.stacks["decoder"].exits
    ]
    assert set(decoder.segments) <= set(manifest.segments)


def test_values_die_behind_the_last_that_reads_them(decoder: tiny.Captured, tmp_path: Path) -> None:
    offramp.save(decoder.program, tmp_path / "m")
    manifest, _ = directory.read(tmp_path / "m")
    (span,) = Schedule.of(manifest).of_stack("decoder").spans
    states = [part.output for part in manifest.stacks["decoder"].parts]
    for state, dead in zip(states, span.dead[1:], strict=False):
        assert state in dead
    assert states[-1] not in frozenset().union(*span.dead)

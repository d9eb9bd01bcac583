"""``offramp demo translation``: German captions become English, most tokens after two of eight decoder blocks."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from offramp import models, zoo
from offramp.cli import _text, _words
from offramp.demo import _two_ways
from offramp.runtime import Confidence

BUNDLE = Path("build/translator.offramp")
EXIT, BLOCKS, MEASURE = 2, 8, "top1-short"
#: Full depth always takes its token from the short list of 3,000.
POLICY = Confidence(measure=MEASURE, thresholds={EXIT: 0.6, BLOCKS: 0.0})
_IDS = Path(zoo.__file__).with_name("translator") / "english.txt"
PIPELINE = (
    f"insert-exits{{stack=decoder,after={EXIT}}}",
    "insert-adapter{stack=decoder}",
    "insert-cache",
    f"insert-scores{{stack=decoder,measure={MEASURE}|prediction-short,after={EXIT}|{BLOCKS},ids={_IDS}}}",
)
SENTENCES = (
    "Zwei Hunde rennen durch den Schnee.",
    "Ein Mann mit Hut spielt auf der Straße Gitarre.",
    "Eine Frau in einem roten Kleid wartet an der Bushaltestelle.",
    "Drei Kinder bauen am Strand eine Sandburg.",
    "Ein Junge auf einem Skateboard springt über eine Treppe.",
    "Zwei Männer in orangefarbenen Westen reparieren das Dach eines alten Hauses.",
)


def bundles(path: Path) -> dict[Path, tuple[str, ...]]:
    """The bundles of the demo, and the passes that make them."""
    return {path: PIPELINE, _two_ways.full_of(path): _two_ways.FULL}


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Save the translator as it is, and with a trained exit and a short list of candidates."""
    import offramp
    from offramp.zoo import translator

    _on_one_core()
    scores = offramp.InsertScores("decoder", (MEASURE, "prediction-short"), (EXIT, BLOCKS), ids=str(_IDS))
    quick = offramp.apply(translator.trained((EXIT,)), [offramp.InsertCache(), scores])
    full = offramp.apply(translator.trained(), ",".join(_two_ways.FULL))
    how = models.settings("zoo:translator") | models.origin("zoo:translator") | {"segments": 1, "progress": progress}
    for program, place, policy in ((full, _two_ways.full_of(path), None), (quick, path, POLICY.to_dict())):
        offramp.save(program, place, policy=policy, **how)


def show(path: Path, words: Sequence[str]) -> None:
    """Translate the demo's sentences and ``words``, more of them, early and at full depth."""
    _on_one_core()
    both = quick, _ = _two_ways.ways(path, POLICY)
    stack = _words.token_stack(quick.chain)
    decode = _words.decoder_of(_text.tokenizer_of(quick.chain, path))
    pairs = []
    print(_words.legend(stack), end="")
    for sentence in (*SENTENCES, *words):
        (inputs,) = _text.encode(quick.chain, path, [sentence])
        early, full = _two_ways.in_turns(both, inputs)
        pairs.append((early, full))
        print(f"\n{sentence}")
        print(f"  early  {_figures(early)}  {_two_ways.painted(early, decode, _words.painter(stack))}")
        print(f"  full   {_figures(full)}  {_said(decode(full.tokens), decode(early.tokens))}")
    mean = statistics.fmean(early.blocks for early, _ in pairs)
    print(f"\n{mean:.1f} of {BLOCKS} blocks on average, {_two_ways.summary(pairs, 'sentences')}")
    print(f'Run the bundle by hand, without torch:\n\n  offramp run {path} --text "{SENTENCES[0]}"\n')


def _figures(run: _two_ways.Run) -> str:
    return f"{run.milliseconds:5.1f} ms  {run.blocks:.1f} blocks"


def _said(full: str, early: str) -> str:
    return "the same text" if full == early else full


def _on_one_core() -> None:
    """More threads make a model of this size slower, and a process has one pool."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

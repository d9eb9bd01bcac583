"""``offramp demo text``: SmolLM2 answers, at full depth and with early exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from offramp.cli import _generate
from offramp.demo import _two_ways
from offramp.runtime import Confidence, load

BUNDLE = Path("build/smollm2.offramp")
PIPELINE = (
    "insert-cache",
    "insert-exits{after=10|15|20|25}",
    "insert-scores{measure=top1}",
)
#: Asked after block 25 only: these exits are not trained, and shallower ones are sure of what is wrong.
POLICY = Confidence(thresholds={25: 0.9})
SEGMENTS = 6
PROMPT = "What is the capital of France, and what is it known for?"
_NEW_TOKENS = 64


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Capture SmolLM2, insert caches, four exits and scores, and save it."""
    _two_ways.build("smollm2", path, PIPELINE, POLICY, SEGMENTS, progress)


def show(path: Path, words: Sequence[str]) -> None:
    """Answer what ``words`` ask."""
    question = " ".join(words) or PROMPT
    chain = load(path)
    prompt = _generate.prompt(chain, path, question)
    print(f"SmolLM2-135M-Instruct answers: {question}")
    _two_ways.show(chain, path, {"input_ids": [prompt]}, POLICY, max_new_tokens=_NEW_TOKENS)
    print(f'\nRun the bundle by hand, without torch:\n\n  offramp run {path} --text "{question}"')

"""``offramp demo sentiment``: a sentence encoder whose six blocks each have a sentiment head, on single sentences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offramp.cli._text import encode
from offramp.cli.bench import measure
from offramp.runtime import Confidence, Never, load

if TYPE_CHECKING:
    from offramp.runtime import Chain

BUNDLE = Path("build/minilm.offramp")
STACK, OUTPUT = "encoder", "logits"
LABELS = ("negative", "positive")
#: On the 872 sentences of SST-2's validation set: 81.7 % right after 3.6 of 6 blocks; full depth 81.1 %.
POLICY = Confidence(0.9)
PIPELINE = (
    f"insert-exits{{stack={STACK},head=own}}",
    f"insert-scores{{stack={STACK},measure=top1|margin|entropy|prediction}}",
)
SENTENCES = (
    "A triumph: funny, moving and beautifully acted.",
    "Dull, lifeless and far too long.",
    "A gripping thriller that never lets go.",
    "I checked my watch twice in the first ten minutes.",
    "I loved every minute of it.",
    "An utter waste of time and talent.",
    "What could have been a masterpiece ends up a beautifully shot bore.",
    "Nobody will remember this one by Christmas.",
    "The worst film I have seen this year.",
    "A film that trusts its audience, which is rarer than it should be.",
)
_REPEAT = 25


class Answer(NamedTuple):
    """What one way of running said of a sentence: label, its probability, blocks run, median milliseconds."""

    label: str
    probability: float
    blocks: int
    milliseconds: float


def bundles(path: Path) -> dict[Path, tuple[str, ...]]:
    """The bundle of the demo, and the passes that make it."""
    return {path: PIPELINE}


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Capture MiniLM, insert exits with their trained heads and scores, and save it with its tokenizer."""
    import offramp
    from offramp import models, zoo
    from offramp.zoo.minilm import exit_heads

    program = offramp.apply(offramp.capture(*zoo.load("minilm")), ",".join(PIPELINE))
    heads = {
        f"exits.{STACK}.{after}.classifier.{part}": tensor
        for after, head in exit_heads().items()
        for part, tensor in head.items()
    }
    unknown = program.module.load_state_dict(heads, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"the exits have no weights {unknown}")
    offramp.save(
        program,
        path,
        files=zoo.tokenizer_files("minilm"),
        policy=POLICY.to_dict(),
        name="minilm-sentiment",
        **models.origin("zoo:minilm"),
        progress=progress,
    )


def show(path: Path, words: Sequence[str]) -> None:
    """Run the demo's sentences and ``words``, more of them, one by one, early and at full depth; print a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    table = Table("sentence", "leaves early", "after", "ms", "full depth", "ms")
    for column in (2, 3, 5):
        table.columns[column].justify = "right"
        table.columns[column].no_wrap = True
    sentences = [*SENTENCES, *words]
    chain = load(path)
    blocks = chain.stacks[STACK].blocks
    results = [ask(chain, path, sentence) for sentence in sentences]
    for sentence, (early, full) in zip(sentences, results, strict=True):
        color = "green" if early.blocks < blocks else "yellow"
        table.add_row(
            escape(sentence),
            _answer(early),
            f"[{color}]{early.blocks} of {blocks}[/]",
            f"{early.milliseconds:.2f}",
            _answer(full),
            f"{full.milliseconds:.2f}",
        )
    console.print(table)
    console.print(_summary(results, blocks))
    console.print(_by_hand(chain, path, sentences[0]), markup=False, soft_wrap=True)


def ask(chain: Chain, path: Path, sentence: str) -> tuple[Answer, Answer]:
    """The answers of one sentence, early and at full depth; the two ways take turns."""
    (inputs,) = encode(chain, path, [sentence])
    ways = {"early": POLICY, "full": Never()}
    times, _ = measure(chain, inputs, ways, _REPEAT)
    early, full = (_read(chain, inputs, policy, statistics.median(times[way])) for way, policy in ways.items())
    return early, full


def _read(chain: Chain, inputs: Any, policy: Any, milliseconds: float) -> Answer:
    import numpy as np

    result = chain.run(inputs, policy)
    powers = np.exp(result.outputs[OUTPUT][0] - result.outputs[OUTPUT][0].max())
    best = int(powers.argmax())
    blocks = int(result.exits[STACK][0])
    return Answer(LABELS[best], float(powers[best] / powers.sum()), blocks, milliseconds)


def _answer(answer: Answer) -> str:
    return f"{answer.label} {answer.probability:.0%}"


def _summary(results: Sequence[tuple[Answer, Answer]], blocks: int) -> str:
    early, full = (sum(pair[way].milliseconds for pair in results) for way in (0, 1))
    mean = statistics.fmean(pair[0].blocks for pair in results)
    same = sum(pair[0].label == pair[1].label for pair in results)
    return (
        f"{mean:.1f} of {blocks} blocks on average, {full / early:.2f}x as fast as full depth "
        f"({early:.1f} ms against {full:.1f} ms); the same answer for {same} of {len(results)} sentences."
    )


def _by_hand(chain: Chain, path: Path, sentence: str) -> str:
    inputs = {name: array.tolist() for name, array in encode(chain, path, [sentence])[0].items()}
    return f"""
The bundle lies in {path}. Run it by hand, with or without torch:

  offramp run {path} --text "{sentence}"

or in Python:

  import offramp
  model = offramp.load("{path.as_posix()}")
  result = model.run({inputs})"""

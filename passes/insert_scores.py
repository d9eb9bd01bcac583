"""``insert-scores``: numbers per row that tell how sure an exit is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx

from offramp.bundle.measures import MEASURES, OF_LOGITS, OF_OWN_HEAD, OF_SHORT, OF_STATE, SCREENED, Measure
from offramp.errors import SpecError
from offramp.passes.infra.contract import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.passes.scores.candidates import short_list
from offramp.passes.scores.score_builder import ScoreBuilder
from offramp.passes.scores.short_head import ShortHead, find_head
from offramp.program.exit import Exit
from offramp.program.graph import ancestors, dependents, is_tensor, results, shape, sizes_of, symbols
from offramp.program.program import Program
from offramp.program.record import exchanged


@dataclass(frozen=True, repr=False)
class InsertScores(Pass):
    """Scores at exits, float32 (``prediction``: int64): [batch], and [batch, tokens] in a causal stack.

    ``state -> tail' -> logits'``  becomes  ``state -> tail' -> logits' -> top1``

    Options: ``stack``; ``after``, counts of blocks that have an exit, or "all" of those; ``output``, the model's output
    that holds logits (may be left out where one is named so, or there is one); ``measure``, any of

    - top1, margin: the greatest probability, and its distance to the second (CALM, arXiv 2207.07061, sec. 3.1)
    - entropy: of the probabilities, in nats (DeeBERT, arXiv 2004.12993); low is sure
    - prediction: the index of the greatest logit, which PABEE's patience compares (arXiv 2006.04152)
    - cosine: similarity of the last block's input and output, all its values as one vector (MuE, arXiv
      2211.11152, sec. 3.2), but per row, and without padding
    - learned: ``sigmoid(w h + b)`` of the hidden state's mean over tokens; trained later, starts at 0.5
    - top1-short, margin-short, prediction-short: as top1, margin and prediction (the class itself, not its place),
      among a few candidates (Confidently-Exiting, a fork of FREE, 2310.05424, prunes the vocabulary so). ``ids`` lists
      them, most frequent first, or names a text file of them; of these ``candidates`` many count (all). Without
      ``ids`` they are the ``candidates`` (512) classes of most probability in the captured model's answer to the
      inputs that it was captured with
    - prediction-screened: as prediction, of all classes, and made by a head that screens them first: products in 8
      bits, with a bound on the error of each, say which classes may be the greatest, and only those get their exact
      products (`offramp.export.screening`). Greedy generation takes its token from there, where the row leaves

    The first four need the exit's tail to run, the others only the block. A short score has an adapter and tail of
    its own up to the head, and K of the head's V rows, in the block's segment; where the row leaves, the whole tail
    runs, or, where an exit has prediction-short or prediction-screened and generation is greedy, nothing: that is the
    token (the lexical short list of machine translation). Probabilities are of the candidates alone, hence never below
    those of all classes: a threshold for top1 is too low for top1-short. The rows are a copy: insert the scores after
    adapters, and after training of the head. Where ``after`` names all blocks, full depth gets short scores too, which
    spares it the head where they are sure enough: there a policy says whether the token that was picked will do.

    Where logits have more axes than rows and classes, the least sure place that is not padding decides; in a causal
    stack each token has a score of its own, since each may leave at another exit; where tokens leave in groups
    (``split-modalities``) each group has one, [batch, groups], and cosine alone is made of them.

    Requires: exits, for all but prediction-screened; for all but cosine and learned, a stack whose tail ends in
    logits; for short and screened scores, logits of one product with a weight, and operators that keep classes apart
    after it (scale, bias, soft-cap).
    Ensures: full depth gets the first four and prediction-screened too.
    Invalidates: nothing.
    """

    name: ClassVar[str] = "insert-scores"
    stack: str | None = None
    measure: tuple[str, ...] | str = "top1"
    after: tuple[int, ...] | int | Literal["all"] = "all"
    output: str | None = None
    candidates: int | None = None
    ids: tuple[int, ...] | str | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures as a tuple."""
        return (self.measure,) if isinstance(self.measure, str) else tuple(self.measure)

    def requires(self, program: Program) -> None:
        """The measures are known, the exits exist, and there are logits where a measure needs them."""
        stack = stack_named(program, self.stack)
        wrong = [name for name in self.measures if name not in MEASURES]
        if wrong or not self.measures:
            raise SpecError(f"measure={'|'.join(map(str, wrong))}: there are {', '.join(MEASURES)}")
        have = {item.after for item in program.exits_of(stack)}
        if not self._early(program) <= have or not (have or self._at_end(program)):
            raise SpecError(
                f"stack {stack!r} has exits after {sorted(have) or 'no block'}",
                hint=f"insert-exits{{stack={stack}}} first",
            )
        if program.groups_of(stack) and set(self.measures) != {"cosine"}:
            raise SpecError(
                f"measure={'|'.join(self.measures)}: tokens leave stack {stack!r} in groups, of which no output tells",
                hint="measure=cosine",
            )
        if set(self.measures) - set(OF_STATE):
            if following := program.next_stack(stack):
                raise SpecError(
                    f"measure={'|'.join(self.measures)}: stack {stack!r} ends in stack {following!r}, not in logits",
                    hint="measure=cosine or learned",
                )
            self._logits(program)
        if set(self.measures) & set(OF_STATE):
            hidden = program.nodes[program.stacks[stack].input]
            try:
                program.axes.batch_axis(hidden)
            except ValueError as error:
                raise SpecError(
                    f"measure={'|'.join(self.measures)}: batch and tokens share an axis of the hidden state ({error})",
                    hint="measure=top1, margin or entropy",
                ) from error
        if set(self.measures) & set(OF_OWN_HEAD):
            tokens, name = self._tokens(program), self._logits(program)
            sizes = sizes_of(results(program.graph)[name])
            if tokens is not None and tokens not in sizes:
                raise SpecError(
                    f"measure={'|'.join(self.measures)}: output {name!r} is of the last token alone, and a block does "
                    "not know which one that is",
                    hint="return the logits of all tokens, or measure=top1, margin or entropy",
                )
            for item in (*program.exits_of(stack), *([self._full(program)] if self._at_end(program) else ())):
                if set(self._wanted(program, item)) & set(OF_OWN_HEAD):
                    find_head(program.graph, results(program.graph)[item.outputs[self._logits(program)]])
        if set(self.measures) & set(OF_SHORT):
            self._candidates(program)
        elif self.candidates is not None or self.ids is not None:
            raise SpecError(f"candidates and ids belong to measure={', '.join(OF_SHORT)}")

    def _at_end(self, program: Program) -> bool:
        """Whether full depth gets scores of heads of its own."""
        blocks = program.stacks[stack_named(program, self.stack)].blocks
        return SCREENED in self.measures or (blocks in self._given and bool(set(self.measures) & set(OF_SHORT)))

    @property
    def _given(self) -> tuple[Any, ...]:
        """``after`` as a tuple."""
        return tuple(self.after) if isinstance(self.after, (tuple, list)) else (self.after,)

    def _early(self, program: Program) -> set[int]:
        """The exits before full depth that get scores."""
        name = stack_named(program, self.stack)
        blocks = program.stacks[name].blocks
        if self.after == "all":
            return {item.after for item in program.exits_of(name) if item.after < blocks}
        if not self._at_end(program):
            return set(blocks_named(program, name, self.after))
        counts = tuple(count for count in self._given if count != blocks)
        return set(blocks_named(program, name, counts)) if counts else set()

    def _full(self, program: Program) -> Exit:
        """Full depth as an exit, as it stands or new."""
        name = stack_named(program, self.stack)
        stack = program.stacks[name]
        found = [item for item in program.exits_of(name) if item.after == stack.blocks]
        behind = self._behind(program) | {program.nodes[stack.output]}
        returned = results(program.graph)
        outputs = {output: output for output in program.outputs if returned[output] in behind}
        return found[0] if found else Exit(name, stack.blocks, stack.output, stack.output, outputs=outputs)

    def _wanted(self, program: Program, item: Exit) -> tuple[str, ...]:
        """The measures that an exit gets; full depth all of its logits, and short ones only where it is named."""
        name = stack_named(program, self.stack)
        if item.stack != name:
            return ()
        if item.after < program.stacks[name].blocks:
            return self.measures if item.after in self._early(program) else ()
        short = OF_SHORT if program.stacks[name].blocks in self._given else ()
        return tuple(m for m in self.measures if m in (*OF_LOGITS, SCREENED, *short))

    def _candidates(self, program: Program) -> tuple[int, ...]:
        return short_list(program.example_outputs[self._logits(program)], self.candidates, self.ids)

    def _logits(self, program: Program) -> str:
        returned = results(program.graph)
        stack = stack_named(program, self.stack)
        made = self._full(program).outputs
        usable = [name for name in program.outputs if name in made and returned[name].meta["val"].is_floating_point()]
        name = self.output or ("logits" if "logits" in usable else usable[0] if len(usable) == 1 else None)
        if name not in usable:
            raise SpecError(
                f"which output holds logits? The program has {usable} behind stack {stack!r}"
                + (f", not {self.output!r}" if self.output else ""),
                hint=next((f"output={o}" for o in usable if _has_classes(returned[o])), "measure=cosine or learned"),
            )
        node = returned[name]
        sizes = [program.axes.describe(size) for size in shape(node)]
        if not _has_classes(node):
            others = [f"output={other}" for other in usable if _has_classes(returned[other])]
            raise SpecError(
                f"output {name!r} of shape {sizes} has no classes on its last axis",
                hint=", ".join([*others, "measure=cosine or learned"]),
            )
        if not self.output and name != "logits" and not self._has_head(program, node):
            raise SpecError(
                f"output {name!r} of shape {sizes} is made without a product with a weight behind stack {stack!r}, so "
                "it holds features, not classes",
                hint=f"measure=cosine or learned; or output={name}, if its features are classes",
            )
        axes = len(shape(node)) - (self._tokens(program) is not None)
        rows = program.axes.batch is not None or self._tokens(program) is not None
        if not all(MEASURES[measure].gates for measure in self.measures) and (axes > 2 or not rows):
            raise SpecError(
                f"measure=prediction: output {name!r} of shape {sizes} has many per row", hint="measure=top1 or entropy"
            )
        return name

    def _has_head(self, program: Program, output: fx.Node) -> bool:
        """Whether a matrix of weights is read between the stack and an output."""
        read = {item for node in self._behind(program) & ancestors([output]) for item in node.all_input_nodes}
        return any(node.op == "get_attr" and is_tensor(node) and len(shape(node)) > 1 for node in read)

    def _behind(self, program: Program) -> set[fx.Node]:
        """What the stack's last hidden state leads to."""
        return dependents([program.nodes[program.stacks[stack_named(program, self.stack)].output]], program.graph)

    def _tokens(self, program: Program) -> Any:
        """The symbol of the token axis of a causal stack, each of whose tokens has a score; None for others."""
        stack = program.stacks[stack_named(program, self.stack)]
        sizes = sizes_of(program.nodes[stack.input])
        if stack.role != "decoder" or (program.axes.batch is None and sizes[0] != 1):
            return None
        return next((size for size in sizes if symbols(size) & {*program.axes.tokens}), None)

    def run(self, program: Program) -> PassResult:
        """Insert the scores that are not there yet."""
        name = stack_named(program, self.stack)
        editor = Editor(program, repr(self))
        exits = list(program.exits)
        full = self._full(program)
        if full not in exits and self._wanted(program, full):
            exits.append(full)
        short = ShortHead(editor, name, self._candidates(program)) if set(self.measures) & set(OF_SHORT) else None
        heads = {"short head": short, "screened head": ShortHead(editor, name)}
        notes = []
        for at, item in enumerate(exits):
            scores = dict(item.scores)
            for measure in self._wanted(program, item):
                if measure in scores:
                    notes.append(f"the exit after block {item.after} has {measure} already")
                else:
                    node = self._score(editor, program, item, MEASURES[measure], heads.get(MEASURES[measure].source))
                    scores[measure] = f"{name}.{item.after}/{measure}"
                    editor.returns({scores[measure]: node})
            exits[at] = replace(item, scores=scores)
        return editor.finish(tuple(notes), records=exchanged(program.records, Exit, exits))

    def _score(self, editor: Editor, program: Program, item: Exit, measure: Measure, head: ShortHead | None) -> fx.Node:
        stack = program.stacks[item.stack]
        builder = ScoreBuilder(editor, program, self._tokens(program))
        hidden = editor[item.hidden]
        if measure.source == "hidden states":
            before, groups = editor[stack.cuts[item.after - 1]], program.groups_of(stack.name)
            return builder.cosine(before, hidden, builder.padding(stack.name), groups)
        if measure.source == "gate":
            return builder.learned(hidden, builder.padding(stack.name), f"exits.{item.stack}.{item.after}.gate")
        logits = results(editor.graph)[item.outputs[self._logits(program)]]
        if head is None:
            return builder.of_logits(logits, measure, builder.padding(stack.name))
        few = head.logits(builder, hidden, logits)
        found = builder.of_logits(few, measure, builder.padding(stack.name))
        return found if measure.gates else head.classes(builder, found)


def _has_classes(node: fx.Node) -> bool:
    """Whether an output has several values on a last axis of one size."""
    sizes = shape(node)
    return len(sizes) > 1 and isinstance(sizes[-1], int) and sizes[-1] > 1

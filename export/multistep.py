"""A decoder in a loop: several tokens in one run, while each leaves at the first exit, or none does.

Where a step takes a fraction of a millisecond, a host that asks for one token at a time takes as long itself. So a
small first part gets a second file, made of the same operators and weights, which feeds the exit's pick back; and so
does full depth, with the greatest of what the model gives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from offramp.bundle.manifest import FREELY, NEXT, STEPS, Generation, Manifest, Segment, Value, in_steps, least_of
from offramp.bundle.measures import measure_named
from offramp.bundle.schedule import Schedule
from offramp.bundle.whole import divided, undivided
from offramp.errors import OfframpError
from offramp.export.first_row import first_row
from offramp.export.whole import joined
from offramp.export.write import hashed
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import Never, Policy
from offramp.runtime.policies.builtin import Each
from offramp.runtime.policies.thresholds import Confidence

log = logging.getLogger(__name__)

#: Bytes of weights that a token reads: more take so long that a host's time is nothing beside it, and a second session
#: packs them once more.
LARGEST = 1 << 24
_AXIS = "steps"
_COMPARED, _CLOSE = 8, 1e-5  # tokens; how far their scores may be from each other


def with_steps(manifest: Manifest, directory: Path, inputs: Mapping[str, Any]) -> Manifest:
    """The manifest with such files, for the first exit and for full depth, where the bundle in ``directory`` has them.

    Both ways make tokens behind the first of ``inputs``. Where these or their scores differ, or ONNX Runtime does not
    take the file, there is none: it is a quicker way, and no more than that.
    """
    cache = manifest.cache
    if cache is None or len(cache.tokens) != 1 or _AXIS in manifest.axes or STEPS in manifest.values:
        return manifest
    for full in (False, True):
        manifest = _with(manifest, directory, inputs, full)
    return manifest


def _with(manifest: Manifest, directory: Path, inputs: Mapping[str, Any], full: bool) -> Manifest:
    found = _looped(manifest, directory, full)
    if found is None:
        return manifest
    try:
        plain = replace(found, stacks=manifest.stacks)
        single, several = (_generated(item, directory, inputs, full) for item in (plain, found))
        if len(several) < 2:
            log.warning("no file for several tokens at once: the example's prompt leaves room for one only")
        elif _same(single, several):
            return found
        else:
            log.warning("several tokens at once, %s, are not those one by one, %s", several, single)
    except OfframpError as error:
        log.warning("no file for several tokens at once: %s", error)
    for file in found.files.keys() - manifest.files.keys():
        (directory / file).unlink()
    return manifest


def _same(single: Sequence[tuple[int, list[float]]], several: Sequence[tuple[int, list[float]]]) -> bool:
    pairs = list(zip(single, several, strict=False))
    close = all(np.allclose(a[1], b[1], _CLOSE, _CLOSE, equal_nan=True) for a, b in pairs)
    return close and [token for token, _ in single] == [token for token, _ in several]


def _generated(
    manifest: Manifest, directory: Path, inputs: Mapping[str, Any], full: bool
) -> list[tuple[int, list[float]]]:
    """Tokens of the first row that all leave at the first exit, or at full depth, and their scores.

    A few, or as many as there is room for.
    """
    plain = replace(manifest, generation=Generation(prompt=manifest.generation.prompt, max_new_tokens=_COMPARED))
    cache, row = manifest.cache, first_row(manifest, inputs)
    assert cache is not None
    if cache.prompt is None:
        row[cache.tokens[0]] = row[cache.tokens[0]][:, :1]
    policy = Never() if full else _first(manifest)
    steps = Chain(plain, directory).stream(row, policy)
    return [(step.token, [*step.scores.values()]) for step in steps]


def _first(manifest: Manifest) -> Policy:
    """All leave at the first exit."""
    stack = next(manifest.stacks[stage.stack] for stage in reversed(manifest.stages) if stage.stack is not None)
    exit_, known = stack.exits[0], set(manifest.values)
    gate = next(measure for measure in exit_.scores if least_of(measure) in known)
    return Each({stack.name: Confidence(measure=gate, thresholds={exit_.after: -math.inf})})


def _looped(manifest: Manifest, directory: Path, full: bool) -> Manifest | None:
    """The manifest with a loop, which is written to ``directory``: of the first part, or of all of them.

    None where it can have none.
    """
    cache, view = manifest.cache, undivided(manifest) if full else divided(manifest)
    assert cache is not None
    step = Schedule.of(view, ("chunk",), (cache.logits,)).steps[0]
    stack, span, branch = step.stack, step.spans[0], step.spans[0].branch
    if stack is None or len(span.segments) != 1 or branch is None or branch.full != full or manifest.learners:
        return None
    (name,), pick = span.segments, None if branch.next == NEXT else branch.pick
    free = () if full else sorted(branch.free)
    gates = {measure: branch.scores[measure] for measure in free if measure_named(measure).gates}
    values = [*manifest.segments[name].outputs.values()]
    made = [value for value in values if value not in cache.buffers.values()]
    behind = [] if pick else [branch.results.get(manifest.outputs[cache.logits], "")]
    if not _of_each(manifest, [*made, *behind]) or not (full or (pick and gates)):
        return None
    parts = [manifest.segments[each] for each in (name, *(branch.segments if behind else ()))]
    wanted = [*dict.fromkeys([*values, *behind])]
    model = ir.to_proto(joined([(part, ir.load(directory / part.file)) for part in parts], wanted))
    given = [item.name for item in model.graph.input]
    if _read(model) > LARGEST or cache.tokens[0] not in given:
        return None
    loop = _Loop(manifest, given, pick, *behind, scores=gates, made=made)
    steps, file = f"{name}-steps", f"{Path(parts[0].file).stem}-steps.onnx"
    (directory / file).write_bytes(loop.model(model).SerializeToString(deterministic=True))
    own, one = manifest.stacks[stack.name], stack.parts[0]
    if own.whole == one:
        own = replace(own, whole=replace(one, steps=steps))
    else:
        own = replace(own, parts=(replace(one, steps=steps), *own.parts[1:]))
    return replace(
        manifest,
        axes={**manifest.axes, _AXIS: (1, None)},
        values={**manifest.values, **loop.values},
        segments={**manifest.segments, steps: Segment(steps, file, loop.inputs, loop.outputs, parts[0].encoding)},
        stacks={**manifest.stacks, stack.name: own},
        files={**manifest.files, file: hashed(directory / file)},
    )


def _of_each(manifest: Manifest, names: Sequence[str]) -> bool:
    """Whether these are values of each token of a row."""
    assert manifest.cache is not None
    shapes = [manifest.values[name].shape[:2] if name else () for name in names]
    asked = [stack.asked for stack in manifest.stacks.values() if stack.asked is not None]
    along = {manifest.cache.chunk, *(manifest.values[name].shape[1] for name in asked)}
    return all(len(shape) == 2 and shape[0] in (manifest.batch, 1) and shape[1] in along for shape in shapes)


def _read(model: onnx.ModelProto) -> int:
    """Bytes of the weights that each token reads in whole; of tables it reads a row."""
    read = {name for node in model.graph.node if not node.op_type.startswith("Gather") for name in node.input}
    weights = [weight for weight in model.graph.initializer if weight.name in read]
    lengths = (int(e.value) for weight in weights for e in weight.external_data if e.key == "length")
    return sum(lengths) + sum(len(weight.raw_data) for weight in weights)


class _Loop:
    """A file in a loop: what goes round (tokens, lengths, caches), and what is there for all of them.

    Its inputs and outputs are called as the values are. The next token is ``pick``, or the greatest of ``logits``.
    """

    def __init__(
        self,
        manifest: Manifest,
        given: Sequence[str],
        pick: str | None,
        logits: str = "",
        *,
        scores: Mapping[str, str],
        made: Sequence[str],
    ) -> None:
        cache, known = manifest.cache, manifest.values
        assert cache is not None
        self._given, self._made, self._logits = given, made, logits
        self._tokens, self._lengths = cache.tokens[0], cache.lengths if cache.lengths in given else None
        self._kind = helper.np_dtype_to_tensor_dtype(np.dtype(known[self._tokens].dtype))
        self._pick, self._scores = pick, {f"least_{m}": value for m, value in scores.items()}
        self._caches = {old: new for old, new in cache.buffers.items() if old in given}
        round_ = [self._tokens, *self._caches, *([self._lengths] if self._lengths else ())]
        self._first = {name: f"{name}_first" for name in given if name in round_}
        classes = int(known[manifest.outputs[cache.logits]].shape[-1])
        self.values = {STEPS: Value("int64", ()), FREELY: Value("bool", (classes + 1,))}
        self.values |= {least_of(measure): Value("float32", ()) for measure in scores}
        self.values |= {in_steps(name): Value(known[name].dtype, (_AXIS, *known[name].shape)) for name in made}
        self.inputs = {self._first.get(name, name): name for name in given}
        self.inputs |= {"most": STEPS, "freely": FREELY, **{f"least_{m}": least_of(m) for m in scores}}
        self.outputs = {f"{old}_last": new for old, new in self._caches.items()}
        self.outputs |= {f"{name}_all": in_steps(name) for name in made}
        if pick is None:
            self._floats = helper.np_dtype_to_tensor_dtype(np.dtype(known[logits].dtype))
            self.values[NEXT] = Value("int64", (_AXIS, *known[logits].shape[:2]))
            self.outputs["next_all"] = NEXT

    def model(self, one: onnx.ModelProto) -> onnx.ModelProto:
        """The file, of that of one step, with its weights.

        They are the body's own: a translator's steps took 6% longer with weights of the graph around it.
        """
        graph = one.graph
        known = {item.name: item for item in (*graph.input, *graph.output)}
        given = [_typed(known[name], self._first.get(name)) for name in self._given]
        more = {"most": TensorProto.INT64, **dict.fromkeys(self._scores, TensorProto.FLOAT)}
        given += [helper.make_tensor_value_info(key, kind, []) for key, kind in more.items()]
        given.append(helper.make_tensor_value_info("freely", TensorProto.BOOL, self.values[FREELY].shape))
        nodes, again = self._again()
        made = [known[name] for name in self._made]
        if self._pick is None:
            made.append(helper.make_tensor_value_info("next", TensorProto.INT64, None))
        round_ = [_typed(known[name]) for name in self._first]
        body = helper.make_graph(
            [*graph.node, *nodes],
            "step",
            [_scalar("step", TensorProto.INT64), _scalar("goes_on", TensorProto.BOOL), *round_],
            [_scalar("goes_on_then", TensorProto.BOOL)]
            + [_typed(known[name], again[name]) for name in self._first]
            + [_typed(item) for item in made],
            list(graph.initializer),
        )
        last = [_typed(known[name], f"{name}_last") for name in self._first]
        several = [_unshaped(item, f"{item.name}_all") for item in made]
        loop = helper.make_node(
            "Loop", ["most", "", *self._first.values()], [item.name for item in (*last, *several)], body=body
        )
        kept = [item for item in last if item.name in self.outputs]
        whole = helper.make_graph([loop], graph.name, given, [*kept, *several])
        found = helper.make_model(whole, opset_imports=one.opset_import, ir_version=one.ir_version)
        found.functions.extend(one.functions)
        return found

    def _again(self) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """What decides whether the loop goes on, and makes the next token's inputs, which are named."""
        again = dict(self._caches)
        nodes = [] if self._pick else self._greatest()
        pick = self._pick or "next"
        nodes += [
            helper.make_node("Cast", [pick], ["picked"], to=self._kind),
            helper.make_node("Gather", ["freely", pick], ["going"]),
        ]
        again[self._tokens] = "picked"
        going = "going"
        for least, score in self._scores.items():
            nodes.append(helper.make_node("GreaterOrEqual", [score, least], [f"{least}_met"]))
            nodes.append(helper.make_node("And", [going, f"{least}_met"], [f"{least}_and"]))
            going = f"{least}_and"
        nodes.append(helper.make_node("Squeeze", [going], ["goes_on_then"]))
        if self._lengths:
            nodes += [_constant("one_more", [1]), helper.make_node("Add", [self._lengths, "one_more"], ["longer"])]
            again[self._lengths] = "longer"
        return nodes, again

    def _greatest(self) -> list[onnx.NodeProto]:
        """The place of the greatest logit; -1, which is no token, where one is no number or infinite."""
        return [
            helper.make_node("ArgMax", [self._logits], ["greatest"], axis=-1, keepdims=0),
            _constant("last_axis", [-1]),
            helper.make_node("ReduceSum", [self._logits, "last_axis"], ["sum"], keepdims=0),
            helper.make_node("Abs", ["sum"], ["size"]),
            _constant("infinity", [math.inf], self._floats),
            helper.make_node("Less", ["size", "infinity"], ["finite"]),
            helper.make_node("Where", ["finite", "greatest", "last_axis"], ["next"]),
        ]


def _constant(name: str, values: Sequence[float], kind: int = TensorProto.INT64) -> onnx.NodeProto:
    tensor = helper.make_tensor(name, kind, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)


def _typed(known: onnx.ValueInfoProto, name: str | None = None) -> onnx.ValueInfoProto:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(known)
    copied.name = name or known.name
    return copied


def _unshaped(known: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, known.type.tensor_type.elem_type, None)


def _scalar(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [])

"""The first part of a decoder in a loop: several tokens in one run, while each leaves at the exit behind it.

Where a step takes a fraction of a millisecond, a host that asks for one token at a time takes as long itself. So a
small part gets a second file, made of the first one's operators and weights, which feeds the exit's pick back.
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
from onnx import TensorProto, helper

from offramp.bundle.manifest import FREELY, STEPS, Generation, Manifest, Segment, Value, in_steps, least_of
from offramp.bundle.measures import measure_named
from offramp.bundle.schedule import Schedule
from offramp.errors import OfframpError
from offramp.export.write import hashed
from offramp.runtime.chain import Chain
from offramp.runtime.policies.builtin import Each
from offramp.runtime.policies.thresholds import Confidence

log = logging.getLogger(__name__)

#: Bytes of weights that a token reads: more take so long that a host's time is nothing beside it, and a second session
#: packs them once more.
LARGEST = 1 << 24
_AXIS = "steps"
_COMPARED, _CLOSE = 8, 1e-5  # tokens; how far their scores may be from each other


def with_steps(manifest: Manifest, directory: Path, inputs: Mapping[str, Any]) -> Manifest:
    """The manifest with such a file where the bundle in ``directory`` has such a part.

    Both make tokens behind the first of ``inputs``. Where these or their scores differ, or ONNX Runtime does not take
    the file, there is none: it is a quicker way, and no more than that.
    """
    found = _looped(manifest, directory)
    if found is None:
        return manifest
    try:
        plain = replace(found, stacks=manifest.stacks)
        single, several = (_generated(item, directory, inputs) for item in (plain, found))
        if _same(single, several):
            return found
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


def _generated(manifest: Manifest, directory: Path, inputs: Mapping[str, Any]) -> list[tuple[int, list[float]]]:
    """Tokens of the first row that all leave at the first exit, and their scores."""
    stack = next(manifest.stacks[stage.stack] for stage in reversed(manifest.stages) if stage.stack is not None)
    exit_, known = stack.exits[0], set(manifest.values)
    gate = next(measure for measure in exit_.scores if least_of(measure) in known)
    policy = Each({stack.name: Confidence(measure=gate, thresholds={exit_.after: -math.inf})})
    plain = replace(manifest, generation=Generation(prompt=manifest.generation.prompt))
    cache, row = manifest.cache, {}
    assert cache is not None
    for name, array in inputs.items():
        place = manifest.values[name].place(manifest.batch)
        row[name] = array if place is None else array.take(range(place[1]), place[0])
    if cache.prompt is None:
        row[cache.tokens[0]] = row[cache.tokens[0]][:, :1]
    count = _COMPARED if cache.limit is None else min(_COMPARED, cache.limit - 1)
    steps = Chain(plain, directory).stream(row, policy, max_new_tokens=count)
    return [(step.token, [*step.scores.values()]) for step in steps]


def _looped(manifest: Manifest, directory: Path) -> Manifest | None:
    """The manifest with the first part's loop, which is written to ``directory``; None where it can have none."""
    cache = manifest.cache
    if cache is None or len(cache.tokens) != 1 or _AXIS in manifest.axes or STEPS in manifest.values:
        return None
    step = Schedule.of(manifest, ("chunk",), (cache.logits,)).steps[0]
    stack, span, branch = step.stack, step.spans[0], step.spans[0].branch
    if stack is None or len(span.segments) != 1 or branch is None or branch.full or branch.pick is None:
        return None
    segment = manifest.segments[span.segments[0]]
    made = _made(manifest, segment)
    gates = [measure for measure in sorted(branch.free) if measure_named(measure).gates]
    if not gates or made is None or manifest.learners:
        return None
    model = onnx.load(directory / segment.file, load_external_data=False)
    if _read(model) > LARGEST or cache.tokens[0] not in segment.inputs.values():
        return None
    loop = _Loop(manifest, segment, branch.pick, {name: branch.scores[name] for name in gates}, made)
    name, file = f"{segment.name}-steps", f"{Path(segment.file).stem}-steps.onnx"
    (directory / file).write_bytes(loop.model(model).SerializeToString(deterministic=True))
    parts = (replace(stack.parts[0], steps=name), *stack.parts[1:])
    return replace(
        manifest,
        axes={**manifest.axes, _AXIS: (1, None)},
        values={**manifest.values, **loop.values},
        segments={**manifest.segments, name: Segment(name, file, loop.inputs, loop.outputs, segment.encoding)},
        stacks={**manifest.stacks, stack.name: replace(stack, parts=parts)},
        files={**manifest.files, file: hashed(directory / file)},
    )


def _made(manifest: Manifest, segment: Segment) -> dict[str, str] | None:
    """What the segment makes of each token, values by the file's names; None where some is not of one token."""
    assert manifest.cache is not None
    made = {key: name for key, name in segment.outputs.items() if name not in manifest.cache.buffers.values()}
    shapes = [manifest.values[name].shape[:2] for name in made.values()]
    asked = [stack.asked for stack in manifest.stacks.values() if stack.asked is not None]
    along = {manifest.cache.chunk, *(manifest.values[name].shape[1] for name in asked)}
    fits = all(len(shape) == 2 and shape[0] in (manifest.batch, 1) and shape[1] in along for shape in shapes)
    return made if fits else None


def _read(model: onnx.ModelProto) -> int:
    """Bytes of the weights that each token reads in whole; of tables it reads a row."""
    read = {name for node in model.graph.node if not node.op_type.startswith("Gather") for name in node.input}
    weights = [weight for weight in model.graph.initializer if weight.name in read]
    lengths = (int(e.value) for weight in weights for e in weight.external_data if e.key == "length")
    return sum(lengths) + sum(len(weight.raw_data) for weight in weights)


class _Loop:
    """A segment's file in a loop: what goes round (tokens, lengths, caches), and what is there for all of them."""

    def __init__(
        self, manifest: Manifest, segment: Segment, pick: str, scores: Mapping[str, str], made: Mapping[str, str]
    ) -> None:
        cache, self._segment, self._made = manifest.cache, segment, made
        assert cache is not None
        by_value = {name: key for key, name in segment.inputs.items()}
        outputs = {name: key for key, name in segment.outputs.items()}
        self._tokens, self._lengths = by_value[cache.tokens[0]], by_value.get(cache.lengths)
        self._kind = helper.np_dtype_to_tensor_dtype(np.dtype(manifest.values[cache.tokens[0]].dtype))
        self._pick, self._scores = outputs[pick], {f"least_{m}": outputs[value] for m, value in scores.items()}
        self._caches = {by_value[old]: outputs[new] for old, new in cache.buffers.items() if old in by_value}
        round_ = {self._tokens, *self._caches, *([self._lengths] if self._lengths else ())}
        self._first = {key: f"{key}_first" for key in segment.inputs if key in round_}
        classes = int(manifest.values[manifest.outputs[cache.logits]].shape[-1])
        self.values = {STEPS: Value("int64", ()), FREELY: Value("bool", (classes + 1,))}
        self.values |= {least_of(measure): Value("float32", ()) for measure in scores}
        known = manifest.values
        self.values |= {in_steps(v): Value(known[v].dtype, (_AXIS, *known[v].shape)) for v in made.values()}
        self.inputs = {self._first.get(key, key): name for key, name in segment.inputs.items()}
        self.inputs |= {"most": STEPS, "freely": FREELY, **{f"least_{m}": least_of(m) for m in scores}}
        self.outputs = {f"{key}_last": segment.outputs[new] for key, new in self._caches.items()}
        self.outputs |= {f"{key}_all": in_steps(name) for key, name in made.items()}

    def model(self, one: onnx.ModelProto) -> onnx.ModelProto:
        """The file, of that of one step: its weights are where they are."""
        graph = one.graph
        known = {item.name: item for item in (*graph.input, *graph.output)}
        given = [_typed(known[key], self._first.get(key)) for key in self._segment.inputs]
        more = {"most": TensorProto.INT64, **dict.fromkeys(self._scores, TensorProto.FLOAT)}
        given += [helper.make_tensor_value_info(key, kind, []) for key, kind in more.items()]
        given.append(helper.make_tensor_value_info("freely", TensorProto.BOOL, self.values[FREELY].shape))
        nodes, again = self._again()
        round_ = [_typed(known[key]) for key in self._first]
        body = helper.make_graph(
            [*graph.node, *nodes],
            "step",
            [_scalar("step", TensorProto.INT64), _scalar("goes_on", TensorProto.BOOL), *round_],
            [_scalar("goes_on_then", TensorProto.BOOL)]
            + [_typed(known[key], again[key]) for key in self._first]
            + [_typed(known[key]) for key in self._made],
        )
        last = [_typed(known[key], f"{key}_last") for key in self._first]
        several = [_unshaped(known[key], f"{key}_all") for key in self._made]
        loop = helper.make_node(
            "Loop", ["most", "", *self._first.values()], [item.name for item in (*last, *several)], body=body
        )
        kept = [item for item in last if item.name in self.outputs]
        whole = helper.make_graph([loop], graph.name, given, [*kept, *several], list(graph.initializer))
        made = helper.make_model(whole, opset_imports=one.opset_import, ir_version=one.ir_version)
        made.functions.extend(one.functions)
        return made

    def _again(self) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """What decides whether the loop goes on, and makes the next token's inputs, which are named."""
        again = dict(self._caches)
        nodes = [
            helper.make_node("Cast", [self._pick], ["picked"], to=self._kind),
            helper.make_node("Gather", ["freely", self._pick], ["going"]),
        ]
        again[self._tokens] = "picked"
        going = "going"
        for least, score in self._scores.items():
            nodes.append(helper.make_node("GreaterOrEqual", [score, least], [f"{least}_met"]))
            nodes.append(helper.make_node("And", [going, f"{least}_met"], [f"{least}_and"]))
            going = f"{least}_and"
        nodes.append(helper.make_node("Squeeze", [going], ["goes_on_then"]))
        if self._lengths:
            one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
            nodes.insert(0, helper.make_node("Constant", [], ["one_more"], value=one))
            nodes.append(helper.make_node("Add", [self._lengths, "one_more"], ["longer"]))
            again[self._lengths] = "longer"
        return nodes, again


def _typed(known: onnx.ValueInfoProto, name: str | None = None) -> onnx.ValueInfoProto:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(known)
    copied.name = name or known.name
    return copied


def _unshaped(known: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, known.type.tensor_type.elem_type, None)


def _scalar(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [])

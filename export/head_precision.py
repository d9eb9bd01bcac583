"""The weights of screened heads, in the segments of blocks, in the precision of the segments that make the logits.

A screened head says in a block's segment what the exit's own segments would: the greatest of their logits. So each of
its weights is encoded as it is there, whatever the block's are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import helper

from offramp.bundle.manifest import Exit, Manifest, Segment
from offramp.bundle.measures import SCREENED
from offramp.export.quantize import Tables, encoding_of, quantized
from offramp.export.rounding import Rounding


@dataclass
class Head:
    """Screened heads in a file: its ``outputs``, and the encodings of weights by where they lie.

    ``other`` is that of weights that no segment of the exit reads.
    """

    other: str
    outputs: set[str] = field(default_factory=set)
    encodings: dict[int, str] = field(default_factory=dict)


def heads_in(manifest: Manifest) -> Iterator[tuple[Segment, str, Exit]]:
    """The screened heads that a block's segment holds: that segment, its output, and the exit."""
    for stack in manifest.stacks.values():
        for exit_ in (item for item in stack.exits if SCREENED in item.scores and item.segments):
            for segment in manifest.segments.values():
                for key, value in segment.outputs.items():
                    if value == exit_.scores[SCREENED] and segment.name not in exit_.segments:
                        yield segment, key, exit_


def tied(manifest: Manifest) -> list[set[str]]:
    """Files that are to have one encoding where nobody may choose one for a head alone: all of a bundle, in groups."""
    found = [{name} for name in dict.fromkeys(segment.file for segment in manifest.segments.values())]
    for segment, _, exit_ in heads_in(manifest):
        together = {segment.file, *(manifest.segments[name].file for name in exit_.segments)}
        whole = set[str]().union(*(group for group in found if group & together))
        found = [whole if whole & group else group for group in found]
        found = [group for at, group in enumerate(found) if group not in found[:at]]
    return found


def offsets(model: onnx.ModelProto) -> dict[str, int]:
    """Where the weights of a model lie whose external data is not loaded."""
    return {
        item.name: int(entry.value)
        for item in model.graph.initializer
        for entry in item.external_data
        if entry.key == "offset"
    }


def heads_of(manifest: Manifest, source: Path, wanted: Mapping[str, str]) -> dict[str, Head]:
    """The screened heads by file of which something is to have another encoding than the file's.

    Args:
        manifest: of the bundle at ``source``, in fp32.
        source: where its files are.
        wanted: the encoding of each file.
    """
    found = dict[str, Head]()
    for segment, key, exit_ in heads_in(manifest):
        files = [manifest.segments[name].file for name in exit_.segments]
        if {wanted[file] for file in files} == {wanted[segment.file]}:
            continue
        tail = files[exit_.head == "shared" and exit_.adapter != "identity"]  # behind the adapter, if that is apart
        head = found.setdefault(segment.file, Head(wanted[tail]))
        head.outputs.add(key)
        for file in files:  # of a weight that several read the first counts, which makes the logits
            for offset in offsets(onnx.load(source / file, load_external_data=False)).values():
                head.encodings.setdefault(offset, wanted[file])
    return found


def quantized_with_heads(
    model: onnx.ModelProto,
    encoding: str,
    head: Head,
    places: Mapping[str, int],
    tables: Tables,
    rounding: Rounding | None = None,
) -> tuple[onnx.ModelProto, str]:
    """As `quantized`, but for a head's weights; and what the others are.

    Args:
        model: with its weights inside.
        encoding: of all but the head's weights.
        head: what has another.
        places: where the model's weights lie.
        tables: as for `quantized`.
        rounding: as for `quantized`.
    """
    own = _own_weights(model, head.outputs)
    kinds = {copy: head.encodings.get(places.get(name, -1), head.other) for copy, name in own.items()}
    tables = {**tables, **{copy: tables[name] for copy, name in own.items() if name in tables}}
    model = _in_part(model, {item.name for item in model.graph.initializer} - kinds.keys(), encoding, tables, rounding)
    made = encoding_of(model)
    for kind in sorted({*kinds.values()}):
        model = _in_part(model, {name for name, found in kinds.items() if found == kind}, kind, tables, rounding)
    return model, made


def _in_part(
    model: onnx.ModelProto, names: Collection[str], encoding: str, tables: Tables, rounding: Rounding | None
) -> onnx.ModelProto:
    """The model with these weights alone encoded: the others are inputs meanwhile, of which nobody knows the values."""
    others = [onnx.TensorProto.FromString(item.SerializeToString()) for item in _weights(model, names)]
    for item in _weights(model, names):
        model.graph.initializer.remove(item)
    model.graph.input.extend(helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in others)
    model = quantized(model, encoding, tables, rounding)
    hidden = {item.name for item in others}
    for value in [value for value in model.graph.input if value.name in hidden]:
        model.graph.input.remove(value)
    model.graph.initializer.extend(others)
    return model


def _weights(model: onnx.ModelProto, but: Collection[str]) -> list[onnx.TensorProto]:
    return [item for item in model.graph.initializer if item.name not in but]


def _own_weights(model: onnx.ModelProto, outputs: Collection[str]) -> dict[str, str]:
    """The weights that serve these outputs alone, by name; of one that serves others too the model gets a copy."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    read = {item.name for item in graph.output} - {*outputs}
    own: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if read.isdisjoint(node.output):
            own.append(node)
        else:
            read.update(_reads(node))
    found = dict[str, str]()
    for node in own:
        for at, name in enumerate(node.input):
            if name in weights and name not in read:
                found[name] = name
            elif name in weights:
                node.input[at] = f"{name}_head"
                if node.input[at] not in found:
                    graph.initializer.add().CopyFrom(weights[name])
                    graph.initializer[-1].name = node.input[at]
                found[node.input[at]] = name
    return found


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, in graphs inside of it too."""
    yield from node.input
    for graph in (item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH):
        for inner in graph.node:
            yield from _reads(inner)

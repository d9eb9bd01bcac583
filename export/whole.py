"""All parts of a stack in one file: a run that nobody may leave then takes no longer than without exits.

Each part is a session, whose call takes some 50 to 100 microseconds beside its operators, and what exits score is
computed where nobody asks. The file is made of the parts' operators, and its weights are theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from offramp.bundle.manifest import Manifest, Part, Segment, Stack
from offramp.bundle.whole import divided, last_exit, segments, undivided
from offramp.errors import OfframpError
from offramp.export.first_row import first_row, with_room
from offramp.export.validation import error
from offramp.export.write import hashed
from offramp.program.compare import TOLERANCE
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import Never

log = logging.getLogger(__name__)

#: Bytes of a stack's weights, which a process that runs it in both ways has twice. Where they are more, calls of
#: sessions are nothing beside what the operators take.
LARGEST = 1 << 28
#: How far outputs may be from each other, of their scale, in whole numbers: activations that differ in the seventh
#: digit are rounded differently now and then.
_ROUNDED = 0.05
_VIEWS = (divided, undivided)


def with_whole(
    manifest: Manifest, directory: Path, inputs: Mapping[str, Any], sessions: Mapping[str, Any] | None = None
) -> Manifest:
    """The manifest with such a file for each stack of several parts, which lies in ``directory``.

    The bundle runs the first row of ``inputs`` in both ways; ``sessions`` are those of its files that are open. Where
    the answers differ, or ONNX Runtime does not take a file, there is none: it is a quicker way, and no more than that.
    """
    found = manifest
    for stack in manifest.stacks.values():
        found = _joined(found, stack, directory)
    if found is manifest:
        return manifest
    try:
        plain, row = replace(found, policy=None), first_row(manifest, inputs)
        parts, whole = (_answers(Chain(view(plain), directory, _sessions=sessions), row) for view in _VIEWS)
        exact = {segment.encoding for segment in manifest.segments.values()} <= {"fp32", "fp16"}
        errors = [error(one, torch.tensor(other)) for one, other in zip(whole, parts, strict=True)]
        if parts and max(errors) <= (TOLERANCE if exact else _ROUNDED):
            return found
        if parts:
            log.warning("all parts of a stack in one file do not give what they give one by one")
    except OfframpError as problem:
        log.info("no file for all parts of a stack: %s", problem)
    for file in found.files.keys() - manifest.files.keys():
        (directory / file).unlink()
    return manifest


def _answers(chain: Chain, inputs: Mapping[str, Any]) -> list[Any]:
    """What a run gives; of a bundle with caches, if it generates, the logits behind a prompt and of a token more.

    A prompt that leaves no room for that token is cut.
    """
    if chain.manifest.cache is None:
        return list(chain.run(inputs, Never()).outputs.values())
    if chain.generates is None:
        return []
    inputs, room = with_room(chain, inputs, 1)
    session = chain.session(inputs, Never())
    found = [*session.step(session.prompts).rows]
    if room:
        found += session.step([row[-1:] for row in session.prompts]).rows
    session.end()
    return [row.outputs[session.plan.output] for row in found]


def _joined(manifest: Manifest, stack: Stack, directory: Path) -> Manifest:
    """The manifest with a file for all parts of a stack; itself where there is none to be had."""
    parts = [manifest.segments[name] for part in stack.parts for name in part.segments]
    chosen = _chosen(manifest, stack)
    files = [segment.file for segment in manifest.segments.values()]
    shared = any(files.count(item.file) > 1 for item in parts)  # whose sessions and packed weights are shared, too
    if len(chosen) < 2 or stack.groups or shared or len({part.encoding for part in parts}) > 1:
        return manifest
    made = {value for item in chosen for value in item.outputs.values()}
    wanted = sorted(made & _read(manifest, stack, {item.name for item in chosen}))
    model = joined([(item, ir.load(directory / item.file)) for item in chosen], wanted)
    if len(stack.exits) > 1 and _bytes(model) > LARGEST:
        return manifest
    name, file = f"{stack.name}-whole", f"{stack.name}-whole.onnx"
    (directory / file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    graph = model.graph
    inputs, outputs = ({str(item.name): str(item.name) for item in items} for items in (graph.inputs, graph.outputs))
    whole = Part(stack.blocks, (name,), stack.parts[-1].output)
    return replace(
        manifest,
        segments={**manifest.segments, name: Segment(name, file, inputs, outputs, parts[0].encoding)},
        stacks={**manifest.stacks, stack.name: replace(stack, whole=whole)},
        files={**manifest.files, file: hashed(directory / file)},
    )


def _chosen(manifest: Manifest, stack: Stack) -> list[Segment]:
    """What runs at once: a stack's parts, and what leads to them if there is no other stack.

    The last exit's segments too where they run on all tokens, which they do without caches.
    """
    at = next(place for place, stage in enumerate(manifest.stages) if stage.stack == stack.name)
    before, own = manifest.stages[:at], manifest.stages[at]
    names = [name for part in stack.parts for name in part.segments]
    if len(manifest.stacks) == 1:
        names = [stage.segment for stage in before if stage.segment and stage.when == own.when] + names
        names += stack.exits[-1].segments if manifest.cache is None else ()
    return [manifest.segments[name] for name in names]


def _read(manifest: Manifest, stack: Stack, chosen: Collection[str]) -> set[str]:
    """The values that are read behind the ``chosen`` segments where nobody leaves before full depth."""
    last = last_exit(stack)
    inside = {*chosen, *segments(stack)} - ({*last.segments} - {*chosen})
    read = {value for name, item in manifest.segments.items() if name not in inside for value in item.inputs.values()}
    read |= {stack.parts[-1].output, last.state, *last.outputs.values(), *last.scores.values()}
    read |= {*manifest.outputs.values()} | {item.count for item in manifest.learners.values()}
    return read | ({*manifest.cache.buffers.values()} if manifest.cache else set())


def joined(parts: Sequence[tuple[Segment, ir.Model]], wanted: Sequence[str]) -> ir.Model:
    """One model of several that run one after the other, whose inputs and outputs are called as the values are.

    It makes the ``wanted`` values; of a weight that several have it has one. The models are taken apart.
    """
    for at, (_, model) in enumerate(parts):
        _own_sizes(model, f"_{at}")
    values: dict[str, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: dict[Any, ir.Value] = {}
    nodes: list[ir.Node] = []
    functions: dict[ir.OperatorIdentifier, ir.Function] = {}
    opsets: dict[str, int] = {}
    for segment, model in parts:
        graph, given, made = model.graph, list(model.graph.inputs), list(model.graph.outputs)
        for items in (graph.inputs, graph.outputs):
            items.clear()
        for item in given:
            first = values.setdefault(segment.inputs[str(item.name)], item)
            if first is item:
                inputs.append(item)
            else:
                item.replace_all_uses_with(first)
        for weight in list(graph.initializers.values()):
            first = weights.setdefault(_identity(weight), weight)
            if first is not weight:
                weight.replace_all_uses_with(first)
        graph.initializers.clear()
        values |= {segment.outputs[name]: item for item in made if (name := str(item.name)) in segment.outputs}
        moved = list(graph)
        graph.remove(moved)
        nodes += moved
        functions |= model.functions
        opsets |= {name: max(version, opsets.get(name, 0)) for name, version in model.opset_imports.items()}
    for at, weight in enumerate(weights.values()):
        weight.name = f"{weight.name}_{at}"
    for name, value in values.items():  # of which a weight may be one
        value.name = name
    outputs, last = [values[name] for name in wanted], parts[-1][1]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=[*weights.values()],
        opset_imports=opsets,
        name="whole",
    )
    whole = ir.Model(graph, ir_version=last.ir_version, functions=[*functions.values()])
    RemoveUnusedNodesPass()(whole)
    NameFixPass()(whole)
    for unused in [item for item in graph.inputs if not item.uses()]:
        graph.inputs.remove(unused)
    return whole


def _own_sizes(model: ir.Model, suffix: str) -> None:
    """Give a part's sizes names that no other part has; inside of it they go without.

    ONNX Runtime lets values of sizes of one name use the same memory.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            names = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape([f"{name}{suffix}" if isinstance(name, str) else name for name in names])
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def _identity(weight: ir.Value) -> Any:
    """What two weights have in common that are the same: their place in the bundle's file of weights.

    Products of whole numbers keep their own: see `offramp.export.quantize`.
    """
    tensor = weight.const_value
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype != ir.DataType.INT8:
        return tensor.location, tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape)
    return id(weight)


def _bytes(model: ir.Model) -> int:
    return sum(item.const_value.nbytes for item in model.graph.initializers.values() if item.const_value is not None)

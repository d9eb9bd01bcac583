"""A worker that decodes with a bundle: through its chain, or through one session of the same lowering."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

import offramp
from benchmarks._workers import Worker, serve
from offramp.bundle.manifest import Segment
from offramp.runtime.engine.sessions import session_options
from offramp.runtime.generation.buffers import chunk_segment

SINGLE, SINGLE_FOLDER = "single.json", "single"


def chain(path: Path, *, single: bool = False) -> Worker:
    """A worker on a bundle; ``single`` runs the file that `write_single` put beside it."""
    return Worker(sys.executable, "-m", "benchmarks._chains", str(path), str(int(single)))


def write_single(program: offramp.Program, bundle: Path) -> None:
    """Put one file into the folder of a bundle that has all that its chunks run, lowered as its segments are."""
    from offramp.export.partition import partition
    from offramp.export.prepare import prepared
    from offramp.export.subgraph import Subgraph
    from offramp.export.translations import Translations
    from offramp.export.write import Writer
    from offramp.program.graph import is_tensor, results

    program = prepared(program)
    plan = partition(program, 1)
    pieces = [*plan.enter, *(piece for stack in plan.stacks for _, piece in stack.blocks), *plan.tails]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    of_chunk = {node for piece in pieces if piece and _of_chunk(program, piece) for node in piece.nodes}
    nodes = sorted(of_chunk, key=order.__getitem__)
    made, returned, cache = set(nodes), results(program.graph), program.cache
    assert cache is not None
    outputs = {name: returned[name] for name in (*program.outputs, *cache.buffers.values())}
    inputs = dict.fromkeys(
        arg
        for node in nodes
        for arg in node.all_input_nodes
        if is_tensor(arg) and arg not in made and arg.op != "get_attr"
    )
    folder = bundle / SINGLE_FOLDER
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, program.graph_module)
    function = Translations().of(Subgraph("single", tuple(inputs), tuple(outputs.values()), tuple(nodes)))
    writer.segment(function, "single")
    writer.close()
    names = {f"in{i}": _name(program, node) for i, node in enumerate(function.inputs)}
    (folder / SINGLE).write_text(json.dumps([names, {f"out{i}": name for i, name in enumerate(outputs)}]))


def _of_chunk(program: offramp.Program, piece: Any) -> bool:
    cache = program.cache
    assert cache is not None
    chunk = {program.nodes[name] for name in (*cache.tokens, cache.lengths)}
    from offramp.program.graph import ancestors

    return bool(ancestors(piece.outputs) & chunk)


def _name(program: offramp.Program, node: Any) -> str:
    cuts = {name: f"{stack.name}.{depth}" for stack in program.stacks.values() for depth, name in enumerate(stack.cuts)}
    return str(cuts.get(node.name, node.name))


def main(path: Path, single: bool) -> None:
    """Serve."""
    model = offramp.load(path)
    ids, (logits,), generation = model.generates, model.manifest.outputs.values(), model.manifest.generation
    assert ids is not None
    alone: dict[str, Any] = {"stop": (), "suppress": (), "suppress_first": ()}

    def inputs(prompt: list[int], features: str | None) -> dict[str, Any]:
        given: dict[str, Any] = {ids: [prompt]}
        if features:
            found = np.load(features)
            given |= dict(found) if isinstance(found, NpzFile) else dict.fromkeys(model.inputs.keys() - {ids}, found)
        return given

    def by_chain(prompt: list[int], new: int | None, features: str | None) -> tuple[list[int], list[float]]:
        arrays, options = inputs(prompt, features), {} if new is None else {"max_new_tokens": new, **alone}
        times, tokens = [time.perf_counter()], list[int]()
        for step in model.stream(arrays, offramp.Never(), **options):
            tokens.append(step.token)
            times.append(time.perf_counter())
        return tokens, times

    def by_session(prompt: list[int], new: int | None, features: str | None) -> tuple[list[int], list[float]]:
        arrays, stop = inputs(prompt, features), set(generation.stop or ()) if new is None else set()
        most = new or (generation.max_length or 448) - len(prompt)
        times, tokens = [time.perf_counter()], list[int]()
        session = model.session(arrays)
        session.reserve(len(prompt) + most)
        chunk, count = np.array([prompt]), np.zeros(1, np.int64)
        while len(tokens) < most and not stop.intersection(tokens[-1:]):
            made = session.decoder.store.run(whole, 0, 1, {ids: chunk}, count)
            count += chunk.shape[1]
            tokens.append(int(made[logits][0, -1].argmax()))
            chunk = np.array([tokens[-1:]])
            times.append(time.perf_counter())
        return tokens, times

    def of_text(text: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = model.run({ids: [text]}, offramp.Never()).outputs["logits"][0]
        return found

    if single:
        bound, made = json.loads((path / SINGLE_FOLDER / SINGLE).read_text())
        values = {key: model.manifest.outputs.get(name, name) for key, name in made.items()}
        segment = Segment("single", "single.onnx", bound, values)
        session = ort.InferenceSession(path / SINGLE_FOLDER / "single.onnx", session_options())
        cache = model.manifest.cache
        assert cache is not None
        changing = {*cache.tokens, *cache.buffers, cache.lengths}
        whole = chunk_segment(model.manifest, segment, session, frozenset(set(bound.values()) - changing))
    serve({}, by_session if single else by_chain, of_text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")

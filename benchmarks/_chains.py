"""A worker that decodes with a bundle: through its chain, or through one session of the same lowering."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
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
from offramp.runtime.generation.session import Session

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


class Single:
    """What `write_single` wrote, in one session, with the encoder and the caches of the bundle that it lies beside."""

    def __init__(self, bundle: Path, model: offramp.Chain, threads: int | None = None) -> None:
        bound, made = json.loads((bundle / SINGLE_FOLDER / SINGLE).read_text())
        values = {key: model.manifest.outputs.get(name, name) for key, name in made.items()}
        segment = Segment("single", "single.onnx", bound, values)
        session = ort.InferenceSession(bundle / SINGLE_FOLDER / "single.onnx", session_options(threads))
        cache, ids, (logits,) = model.manifest.cache, model.generates, model.manifest.outputs.values()
        assert cache is not None
        assert ids is not None
        changing = {*cache.tokens, *cache.buffers, cache.lengths}
        self._file = chunk_segment(model.manifest, segment, session, frozenset(set(bound.values()) - changing))
        self._model, self._ids, self._logits = model, ids, logits

    def session(self, inputs: Mapping[str, Any]) -> Session:
        """A generation of one row, of which has run what runs once."""
        return self._model.session(inputs)

    def tokens(self, session: Session, most: int | None = None, stop: Collection[int] | None = None) -> Iterator[int]:
        """The greedy tokens of a generation, as many as the bundle's own settings say, or the arguments."""
        generation = self._model.manifest.generation
        (prompt,), stop = session.prompts, set(generation.stop or ()) if stop is None else stop
        most = (generation.max_length or 448) - prompt.size if most is None else most
        session.reserve(prompt.size + most)
        chunk, count = prompt[None], np.zeros(1, np.int64)
        for _ in range(most):
            made = session.decoder.store.run(self._file, 0, 1, {self._ids: chunk}, count)
            count += chunk.shape[1]
            token = int(made[self._logits][0, -1].argmax())
            yield token
            if token in stop:
                return
            chunk = np.array([[token]])


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
    ids = model.generates
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
        assert whole is not None
        most, stop = (None, None) if new is None else (new, ())
        times, tokens = [time.perf_counter()], list[int]()
        for token in whole.tokens(whole.session(inputs(prompt, features)), most, stop):
            tokens.append(token)
            times.append(time.perf_counter())
        return tokens, times

    def of_text(text: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = model.run({ids: [text]}, offramp.Never()).outputs["logits"][0]
        return found

    whole = Single(path, model) if single else None
    serve({}, by_session if single else by_chain, of_text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")

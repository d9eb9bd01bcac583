"""Translation validation: every segment, the whole chain and every exit against torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from offramp.bundle.manifest import WIDTH, Manifest
from offramp.errors import ExportError, InputError
from offramp.passes import Truncate
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import attribute, run
from offramp.program.groups import left_early
from offramp.program.program import Program
from offramp.program.sizes import at_other_sizes
from offramp.runtime.chain import Chain
from offramp.runtime.engine.sessions import open_sessions
from offramp.runtime.policies.base import State
from offramp.runtime.policies.builtin import Depth, Never

#: The largest error that is let through, by the encoding of the weights.
TOLERANCES: dict[str, float] = {"fp32": TOLERANCE}

Arrays = Mapping[str, np.ndarray[Any, Any]]


def error(found: np.ndarray[Any, Any], expected: torch.Tensor) -> float:
    """`relative_error` of an array."""
    return relative_error(torch.tensor(found), expected.cpu())


def worst(found: Arrays, expected: Mapping[str, torch.Tensor]) -> float:
    """The largest error over outputs by name."""
    return max((error(found[name], value) for name, value in expected.items()), default=0.0)


def eager(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own outputs of the program's graph in torch."""
    return program.as_returned(_returned(program, inputs), inputs)


def _returned(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the program's graph returns."""
    with torch.no_grad():
        found: dict[str, torch.Tensor] = program.module(
            **program.fresh({name: inputs[name] for name in program.inputs})
        )
    return found


def opened(manifest: Manifest, directory: Path) -> dict[str, Any]:
    """Sessions of a bundle's files, by name."""
    return open_sessions(directory, {segment.file for segment in manifest.segments.values()}, None, None)


def validate(
    program: Program,
    manifest: Manifest,
    directory: Path,
    origin: Mapping[str, fx.Node],
    lowered: Program | None = None,
    sessions: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a bundle's files with a program; ``origin`` names the node of each value, ``sessions`` are the files'.

    Those are nodes of ``lowered``, the program as it was when it was cut, if that is another. All but single segments
    is compared with ``program`` itself, so that what was rewritten in between is validated too.

    Returns the largest relative errors: ``segments`` (each segment on torch's values of its inputs), ``chain``
    (full depth), ``exits`` (every exit forced, against the truncated program), ``rows`` (rows that leave at
    different exits, against each row alone), ``other_shapes`` (other batch sizes and lengths), ``groups`` (groups of
    tokens that leave at different exits, each row at its own).

    Raises:
        ExportError: an error is above the tolerance; the message names the segment or exit.
    """
    sessions = sessions or opened(manifest, directory)
    chain = Chain(manifest, directory, _sessions=sessions)
    if manifest.cache is not None and chain.generates is None:
        try:
            chain.stream({})
        except InputError as error:
            hint = "leave insert-cache out" + (f"; or {error.hint}" if error.hint else "")
            raise ExportError(f"a bundle with caches that cannot generate: {error.reason}", hint=hint) from error
    bound = tolerance(manifest)
    wanted = _Wanted(program)
    figures = {
        "segments": _segments(lowered or program, manifest, sessions, origin, wanted.scores(manifest)),
        "chain": _checked(
            "the chain at full depth",
            worst(_run(program, chain, program.example_inputs), wanted.outputs()),
            bound,
        ),
        "exits": 0.0,
        "other_shapes": 0.0,
    }
    for inputs, outputs in at_other_sizes(program):
        sizes = {name: tuple(value.shape) for name, value in inputs.items()}
        figures["other_shapes"] = max(
            figures["other_shapes"],
            _checked(f"the chain on inputs {sizes}", worst(_run(program, chain, inputs), outputs), bound),
        )
    for stack in program.stacks:
        for item in program.exits_of(stack):
            if item.after == program.stacks[stack].blocks:
                continue
            expected = wanted.outputs(stack, item.after)
            forced = Depth(dict.fromkeys(manifest.stacks[stack].by_group, item.after))
            found = _run(program, chain, program.example_inputs, forced)
            figures["exits"] = max(
                figures["exits"],
                _checked(f"the exit after block {item.after} of stack {stack}", worst(found, expected), bound),
            )
    figures["rows"] = _rows(program, chain)
    if program.groups:
        figures["groups"] = _checked("groups of tokens that leave apart", _groups(program, chain), bound)
    if program.cache is not None:
        figures["cache"] = _checked("the chain step by step", _stepwise(wanted, chain), bound)
    return {**figures, "tolerance": bound}


class _Wanted:
    """What torch gives for a program's example, whole and truncated; nothing is computed twice."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._cuts: dict[tuple[str, int], Program] = {}
        self._made: dict[int, dict[str, torch.Tensor]] = {}

    @cached_property
    def _whole(self) -> dict[str, torch.Tensor]:
        """What the program's graph returns."""
        return _returned(self.program, self.program.example_inputs)

    def scores(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """The scores of exits, by the values that hold them in a bundle."""
        return {
            exit_.scores[measure]: self._whole[key]
            for name, stack in manifest.stacks.items()
            for exit_, item in itertools.product(stack.exits, self.program.exits_of(name))
            if exit_.after == item.after
            for measure, key in item.scores.items()
            if measure in exit_.scores
        }

    def cut(self, stack: str, after: int) -> Program:
        """The program that always leaves a stack after so many blocks."""
        if after == self.program.stacks[stack].blocks:
            return self.program
        if (stack, after) not in self._cuts:
            self._cuts[stack, after] = Truncate(stack, after).run(self.program).program
        return self._cuts[stack, after]

    def outputs(self, stack: str | None = None, after: int = 0) -> dict[str, torch.Tensor]:
        """The model's outputs, at full depth if no stack is named."""
        program = self.program if stack is None else self.cut(stack, after)
        if id(program) not in self._made:
            inputs = self.program.example_inputs
            found = self._whole if program is self.program else _returned(program, inputs)
            self._made[id(program)] = program.as_returned(found, inputs)
        return self._made[id(program)]


@contextmanager
def at_full_width(program: Program) -> Iterator[None]:
    """Meanwhile gates read a width of 1, as in a chain whose policy is no `Width`; then the program's own is back."""
    if not program.learners:
        yield
        return
    width = attribute(program.graph_module, WIDTH)
    own = width.clone()
    width.fill_(1)
    try:
        yield
    finally:
        width.copy_(own)


def _run(program: Program, chain: Chain, inputs: Mapping[str, torch.Tensor], policy: Any = None) -> Arrays:
    return chain.run(given(program, inputs), policy or Never()).outputs


def given(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs of a program as its bundle takes them."""
    return {name: value.numpy() for name, value in program.as_captured(inputs).items() if name in program.inputs}


def tolerance(manifest: Manifest) -> float:
    """The largest error of a whole chain: that of its coarsest encoding."""
    return max(TOLERANCES[segment.encoding] for segment in manifest.segments.values())


def _checked(what: str, found: float, bound: float) -> float:
    if not found <= bound:
        raise ExportError(
            f"{what} differs from torch: relative error {found:.1e}, allowed {bound:.0e}",
            hint="an operator is lowered wrongly, or the model is not deterministic; please report it with the model",
        )
    return found


def _segments(
    program: Program,
    manifest: Manifest,
    sessions: Mapping[str, Any],
    origin: Mapping[str, fx.Node],
    scores: Mapping[str, torch.Tensor],
) -> float:
    """Each segment alone, on the values that torch computes for its inputs; ``scores`` are those before lowering."""
    nodes = set(origin.values())
    values: dict[fx.Node, Any] = {
        node: program.example_inputs[str(node.target)] for node in program.graph.find_nodes(op="placeholder")
    }
    order = [node for node in program.graph.nodes if node.op != "output"]
    with torch.no_grad():
        run(program.graph_module, order, values, nodes.__contains__)
    largest = 0.0
    early = [item for stack in manifest.stacks.values() for item in stack.exits[:-1] if item.head == "shared"]
    tails = {name for item in early for name in item.segments[item.adapter != "identity" :]}
    for segment in manifest.segments.values():
        names = {*segment.inputs.values(), *segment.outputs.values()}
        if segment.name in tails or not all(name in origin for name in names):
            continue  # a shared tail on an exit's state: checked as an exit
        cache = manifest.cache
        one = cache is not None and cache.rowwise and any(name in cache.buffers for name in segment.inputs.values())

        def value(name: str, one: bool = one) -> torch.Tensor:
            found: torch.Tensor = scores.get(name, values[origin[name]]).detach()
            kind = manifest.values[name]
            if one and (place := kind.place(manifest.batch)):  # the file takes one row at a time
                return found.narrow(place[0], 0, place[1])
            return found

        feed = {key: value(name).contiguous().numpy() for key, name in segment.inputs.items()}
        arrays = sessions[segment.file].run(list(segment.outputs), feed)
        found = dict(zip(segment.outputs.values(), arrays, strict=True))
        expected = {name: value(name) for name in segment.outputs.values()}
        largest = max(
            largest, _checked(f"segment {segment.name}", worst(found, expected), TOLERANCES[segment.encoding])
        )
    return largest


def _stepwise(wanted: _Wanted, chain: Chain) -> float:
    """Token by token, prompts of different lengths, rows leaving at random exits: each token against one pass.

    The tokens are those of the example, whatever the model would have chosen. A token that leaves after k blocks has
    to get what the truncated program gives at its place, and one that goes deep what the whole program gives: so what
    was computed late for the tokens before is exact. Returns the largest relative error, 0 where the bundle generates
    no text.
    """
    program = wanted.program
    inputs = {name: program.example_inputs[name].numpy() for name in program.inputs}
    if chain.generates is None or inputs[chain.generates].shape[1] < 3:
        return 0.0
    name, stack = chain.generates, list(chain.stacks)[-1]
    depths = {item.after for item in program.exits_of(stack)} | {program.stacks[stack].blocks}
    passes = {after: _Pass(wanted.cut(stack, after), name) for after in depths}
    random = np.random.default_rng(0)
    rows, total = inputs[name].shape
    assert program.cache is not None
    at = random.integers(program.cache.least, max(program.cache.least + 1, total - 1), rows)
    ahead = program.ahead(program.example_inputs)
    over_text = (*(program.cache.prompt.beside if program.cache.prompt else ()), name)
    beside = {
        key: [row[ahead:n] for row, n in zip(inputs[key], at, strict=True)]
        if inputs[key].ndim == 2
        else inputs[key][..., : at.max()]
        for key in over_text
    }
    chunks: Any = beside[name]
    session = chain.session({**inputs, **beside}, _coin(stack))
    output = session.plan.cache.logits
    largest = 0.0
    while session.rows:
        for left in session.step(chunks).rows:
            row, after = session.rows[left.slot], left.exits[stack]
            for value in left.outputs.values():
                largest = max(largest, error(value, passes[after].at(output, row, int(at[row]))))
        session.drop([slot for slot, row in enumerate(session.rows) if at[row] == total])
        chunks = [inputs[name][row, at[row] : at[row] + 1] for row in session.rows]
        for row in session.rows:
            at[row] += 1
    return largest


class _Pass:
    """Logits of the example's tokens in one pass of a program, those of places in front of the text too."""

    def __init__(self, program: Program, tokens: str) -> None:
        self._program, self._tokens = program, tokens
        self._made: dict[int, dict[str, torch.Tensor]] = {}

    def at(self, output: str, row: int, count: int) -> torch.Tensor:
        """Those of the ``count``-th token of a row; a model that gives the last one's only is run on so many."""
        total = self._program.example_inputs[self._tokens].shape[1]
        whole = self._of(total)[output]
        if whole.dim() == 3 and whole.shape[1] == total:
            return whole[row, count - 1 : count]
        return self._of(count)[output][row]

    def _of(self, count: int) -> dict[str, torch.Tensor]:
        if count not in self._made:
            inputs, cache = dict(self._program.example_inputs), self._program.cache
            for name in (self._tokens, *(cache.prompt.beside if cache and cache.prompt else ())):
                inputs[name] = inputs[name][..., :count]
            self._made[count] = _returned(self._program, inputs)
        return self._made[count]


def _coin(stack: str) -> Callable[[State], Any]:
    """Leave the stack at random exits."""
    random = np.random.default_rng(1)
    return lambda state: (random.random(state.rows.size) < 0.4) & (state.stack == stack)


def _groups(program: Program, chain: Chain) -> float:
    """Groups of tokens leave at random exits, in each row at others; the largest relative error."""
    random, largest = np.random.default_rng(2), 0.0
    inputs = given(program, program.example_inputs)
    stacks = [chain.manifest.stacks[item.stack] for item in program.groups]
    groups = {stack.name: list(stack.by_group) for stack in stacks if stack.groups}  # none in one without exits
    for _ in range(4):
        draws = {
            name: random.choice([exit_.after for exit_ in chain.stacks[name].exits], 64)
            for names in groups.values()
            for name in names
        }

        def leave(state: State, draws: Mapping[str, Any] = draws) -> Any:
            if state.stack in draws:
                return draws[state.stack][state.rows % 64] == state.after
            return np.zeros(state.rows.size, np.bool_)

        found = chain.run(inputs, leave)
        depths = {
            stack: torch.from_numpy(np.column_stack([found.exits[name] for name in names]))
            for stack, names in groups.items()
        }
        with torch.no_grad():
            expected = left_early(program, program.fresh(program.example_inputs), depths)
        largest = max(largest, worst(found.outputs, {name: expected[name] for name in program.outputs}))
    return largest


def _rows(program: Program, chain: Chain) -> float:
    """Rows that leave one after the other must get what they get together."""
    if chain.manifest.batch is None:
        return 0.0
    stack = list(chain.manifest.stacks.values())[-1]
    exits = [item.after for item in stack.exits]
    if len(exits) < 2 or stack.groups:
        return 0.0
    inputs = given(program, program.example_inputs)

    def leave(state: State) -> Any:
        here = exits.index(state.after) if state.stack == stack.name else -1
        return state.rows % len(exits) == here

    mixed = chain.run(inputs, leave)
    largest = 0.0
    for at, after in enumerate(exits):
        forced = chain.run(inputs, Depth({stack.name: after}))
        for name in chain.manifest.outputs:
            axis, factor = chain.rows_of(name) or (None, 1)
            if axis is None:
                continue
            rows = np.flatnonzero(mixed.exits[stack.name] == after)
            rows = rows[rows % len(exits) == at]
            if len(rows) and factor == 1:
                wanted = torch.from_numpy(np.take(forced.outputs[name], rows, axis))
                largest = max(
                    largest,
                    _checked(
                        f"a row that leaves after block {after}",
                        error(np.take(mixed.outputs[name], rows, axis), wanted),
                        tolerance(chain.manifest),
                    ),
                )
    return largest

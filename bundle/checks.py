"""Checks of a manifest that types cannot express: names refer to things, and values flow.

Each check yields its problems as text; none of them stops another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import pairwise

from offramp.bundle.expressions import names
from offramp.bundle.implied import GREATEST
from offramp.bundle.manifest import (
    DTYPES,
    ENCODINGS,
    FORMS,
    FREELY,
    NEXT,
    STEPS,
    WIDTH,
    Cache,
    Exit,
    Generation,
    Implied,
    Manifest,
    Segment,
    Stack,
    Value,
    in_steps,
    least_of,
)
from offramp.bundle.measures import MEASURES, PICK, SCREENED, measure_named
from offramp.bundle.options import OPTIONS, read
from offramp.bundle.precision import encodings
from offramp.bundle.preprocessing import preprocessing_problems
from offramp.bundle.whole import segments, undivided
from offramp.errors import InputError

_FAR = 2**63  # beyond, nothing is an int64


def problems_of(manifest: Manifest) -> list[str]:
    """All that is wrong with a manifest whose fields have the right types; empty when nothing is."""
    problems = [
        *_axes(manifest),
        *(text for name, value in manifest.values.items() for text in _value(manifest, name, value)),
        *_ids(manifest),
        *_references(manifest),
        *_learners(manifest),
        *_groups(manifest),
        *_steps(manifest),
        *(text for stack in manifest.stacks.values() for text in _stack(stack)),
        *generation_problems(manifest.generation),
        *preprocessing_problems(manifest.preprocessing),
        *_calibration(manifest),
        *(f"labels: there is no output {name!r}" for name in manifest.labels if name not in manifest.outputs),
    ]
    problems = problems or list(_Flow(manifest).problems())
    return problems or [f"at full depth, as a whole: {text}" for text in _Flow(undivided(manifest)).problems()]


def _calibration(manifest: Manifest) -> Iterator[str]:
    """Thresholds hold for the encodings that they were chosen with."""
    made = (manifest.calibration or {}).get("encodings", encodings(manifest))
    if made != encodings(manifest):
        yield "calibration: it was made in another precision; offramp calibrate chooses anew"


def generation_problems(generation: Generation) -> Iterator[str]:
    """What is wrong with values whose types are right."""
    for item in fields(generation):
        value = getattr(generation, item.name)
        try:
            if value != item.default and item.name in OPTIONS:
                read(item.name, value)
        except InputError as error:
            yield f"generation.{error}"


def _cache(cache: Cache, manifest: Manifest) -> Iterator[str]:
    for name in (*cache.tokens, *cache.values, *cache.buffers.values()):
        if name not in manifest.values:
            yield f"cache: there is no value {name!r}"
    for kind, axis in (("chunk", cache.chunk), ("capacity", cache.capacity)):
        if axis not in manifest.axes:
            yield f"cache.{kind}: there is no axis {axis!r}"
    for name, made in cache.buffers.items():
        if name in manifest.values and cache.capacity not in manifest.values[name].shape:
            yield f"cache.buffers: {name!r} has no axis {cache.capacity!r}"
        elif _kind(manifest, name) != _kind(manifest, made):
            yield f"cache.buffers: {name!r} and {made!r} differ in dtype, rank or place of rows"
    logits = manifest.values.get(manifest.outputs.get(cache.logits, ""))
    if logits is None or not logits.shape or not isinstance(logits.shape[-1], int):
        yield f"cache.logits: {cache.logits!r} is no output with a fixed number of classes on its last axis"
    if not set(cache.tokens) <= set(manifest.inputs):
        yield f"cache.tokens: {list(cache.tokens)} are not all inputs"
    if cache.prompt and not set(cache.prompt.beside) <= set(manifest.inputs):
        yield f"cache.prompt.given and counting: {list(cache.prompt.beside)} are not all inputs"
    for name, item in cache.implied.items():
        yield from _implied(manifest, name, item)
    if cache.prompt:
        yield from _size(manifest, "cache.prompt.ahead", cache.prompt.ahead)
        for name in cache.prompt.cut:
            value = manifest.values.get(manifest.outputs.get(name, ""))
            if value is None or cache.chunk not in value.shape:
                yield f"cache.prompt.cut: {name!r} is no output with the axis {cache.chunk!r}"


def _learners(manifest: Manifest) -> Iterator[str]:
    width = manifest.values.get(WIDTH)
    if manifest.learners and (width is None or (width.dtype, width.shape) != ("float32", (1,))):
        yield f"learners: there is no value {WIDTH!r}, float32 [1]"
    for name, item in manifest.learners.items():
        where, stack = f"learners.{name}", manifest.stacks.get(item.stack)
        if stack is None:
            yield f"{where}.stack: there is no stack {item.stack!r}"
        elif not 1 <= item.block <= stack.blocks:
            yield f"{where}.block: stack {item.stack!r} has the blocks 1 to {stack.blocks}, not {item.block}"
        if not 0 <= item.least < item.learners:
            yield f"{where}.least: {item.least} is none of 0 to {item.learners - 1}"
        if item.flops < 1:
            yield f"{where}.flops: {item.flops}"
        if item.form not in FORMS:
            yield f"{where}.form: {item.form!r} is none of {', '.join(FORMS)}"
        if item.count in manifest.values and manifest.values[item.count].dtype != "int64":
            yield f"{where}.count: {item.count!r} is {manifest.values[item.count].dtype}, expected int64"


def _groups(manifest: Manifest) -> Iterator[str]:
    policies = [name for stack in manifest.stacks.values() for name in _leaving(stack)]
    for name in sorted({name for name in policies if policies.count(name) > 1}):
        yield f"stacks: {name!r} is the name of several things that leave"
    for name, stack in manifest.stacks.items():
        where = f"stacks.{name}"
        if stack.groups and stack.whole is not None:
            yield f"{where}.whole: groups of tokens leave apart"
        if bool(stack.groups) != (stack.places is not None):
            yield f"{where}: has groups or places, and not both"
        for field, given in (("places", stack.places), ("asked", stack.asked)):
            value = manifest.values.get(given or "")
            if value is not None and (value.dtype, len(value.shape)) != ("int64", 2):
                yield f"{where}.{field}: {given!r} is {value}, expected int64 [batch, tokens]"
        if stack.asked is not None and manifest.cache is None:
            yield f"{where}.asked: there is no cache, and no chunks of tokens"
        for group in stack.groups:
            yield from _size(manifest, f"{where}.groups.{group.name}", group.tokens)


def _leaving(stack: Stack) -> list[str]:
    return [f"{stack.name}.{group.name}" for group in stack.groups] or [stack.name]


def _scores(stack: Stack) -> int | None:
    """How many scores the groups of a stack have; None where that depends on the inputs."""
    counts = [group.tokens if group.alone else 1 for group in stack.groups]
    return sum(count for count in counts if isinstance(count, int)) if all(type(c) is int for c in counts) else None


def _size(manifest: Manifest, where: str, size: int | str) -> Iterator[str]:
    """What is wrong with a number of tokens."""
    try:
        unknown = names(size) - manifest.axes.keys()
    except ValueError as error:
        yield f"{where}: {error}"
        return
    if unknown:
        yield f"{where}: no such axes: {', '.join(sorted(unknown))}"
    if isinstance(size, int) and size < 0:
        yield f"{where}: {size} tokens"


def _implied(manifest: Manifest, name: str, item: Implied) -> Iterator[str]:
    where = f"cache.implied.{name}"
    if name in manifest.inputs:
        yield f"{where}: is one of the inputs"
    if item.dtype not in (*DTYPES, "bfloat16"):
        yield f"{where}.dtype: {item.dtype!r} is none of {', '.join(DTYPES)}, bfloat16"
    try:
        unknown = {axis for size in item.shape for axis in names(size)} - manifest.axes.keys()
    except ValueError as error:
        yield f"{where}.shape: {error}"
        return
    if unknown:
        yield f"{where}.shape: no such axes: {', '.join(sorted(unknown))}"
    if item.axis is not None and not 0 <= item.axis < len(item.shape):
        yield f"{where}.axis: {list(item.shape)} has no axis {item.axis}"
    if item.hidden is not None and len(item.shape) < 2:
        yield f"{where}.hidden: {list(item.shape)} has no axes of queries and keys"
    for kind in ("value", "hidden", "padding"):
        number = getattr(item, kind)
        if number is not None and not abs(number) <= GREATEST:
            yield f"{where}.{kind}: {number} is too large"


def _axes(manifest: Manifest) -> Iterator[str]:
    for name, (low, high) in manifest.axes.items():
        if low < 0 or (high is not None and high < low):
            yield f"axes.{name}: a range from {low} to {high} holds nothing"
    if manifest.batch is not None and manifest.batch not in manifest.axes:
        yield f"batch: there is no axis {manifest.batch!r}"
    values = [manifest.values[name] for name in manifest.inputs if name in manifest.values]
    if manifest.batch is not None and not any(_counts(value, manifest.batch) for value in values):
        yield f"batch: no input has rows, so nothing says how long {manifest.batch!r} is"


def _value(manifest: Manifest, name: str, value: Value) -> Iterator[str]:
    where = f"values.{name}"
    if value.dtype not in DTYPES:
        yield f"{where}.dtype: {value.dtype!r} is none of {', '.join(DTYPES)}"
    unknown: set[str] = set()
    for size in value.shape:
        try:
            unknown |= names(size) - manifest.axes.keys()
        except ValueError as error:
            yield f"{where}.shape: {error}"
            return
    if unknown:
        yield f"{where}.shape: no such axes: {', '.join(sorted(unknown))}"
    of_rows = [size for size in value.shape if manifest.batch in names(size)]
    if len(of_rows) > 1 or (of_rows and value.place(manifest.batch) is None):
        yield f"{where}.shape: rows of {manifest.batch!r} cannot be told apart in {list(value.shape)}"


def _ids(manifest: Manifest) -> Iterator[str]:
    for name, (least, greatest) in manifest.ids.items():
        if name not in manifest.inputs:
            yield f"ids.{name}: there is no such input"
        elif name in manifest.values and "int" not in manifest.values[name].dtype:
            yield f"ids.{name}: {name!r} is {manifest.values[name].dtype}, which is looked up in no table"
        if not -_FAR <= least <= greatest < _FAR:
            yield f"ids.{name}: numbers from {least} to {greatest}"


def _counts(value: Value, batch: str) -> bool:
    try:
        return any(names(size) == {batch} for size in value.shape)
    except ValueError:
        return False


def _references(manifest: Manifest) -> Iterator[str]:
    named: list[tuple[str, str, str]] = [("segments", k, segment.name) for k, segment in manifest.segments.items()]
    named += [("stacks", k, stack.name) for k, stack in manifest.stacks.items()]
    yield from (f"{kind}.{key}.name: is {name!r}" for kind, key, name in named if key != name)
    for name, segment in manifest.segments.items():
        if segment.file not in manifest.files:
            yield f"segments.{name}.file: {segment.file!r} is not in files"
        if segment.encoding not in ENCODINGS:
            yield f"segments.{name}.encoding: {segment.encoding!r} is none of {', '.join(ENCODINGS)}"
    for key, file in manifest.take.items():
        dtype, _, axis = key.partition("/")
        if dtype not in DTYPES or not axis.isdecimal():
            yield f'take.{key}: a key looks like "float32/0"'
        if file not in manifest.files:
            yield f"take.{key}: {file!r} is not in files"
    for i, stage in enumerate(manifest.stages):
        if stage.when not in ("input", "capacity", "chunk"):
            yield f"stages[{i}].when: {stage.when!r} is none of input, capacity, chunk"
        if (stage.segment is None) == (stage.stack is None):
            yield f"stages[{i}]: has to name either a segment or a stack"
        elif stage.segment is not None and stage.segment not in manifest.segments:
            yield f"stages[{i}].segment: there is no segment {stage.segment!r}"
        elif stage.stack is not None and stage.stack not in manifest.stacks:
            yield f"stages[{i}].stack: there is no stack {stage.stack!r}"
    for name, stack in manifest.stacks.items():
        for segment_name in segments(stack):
            if segment_name not in manifest.segments:
                yield f"stacks.{name}: there is no segment {segment_name!r}"
        if not any(stage.stack == name for stage in manifest.stages):
            yield f"stacks.{name}: no stage runs it"


def _stack(stack: Stack) -> Iterator[str]:
    for kind, depths in (
        ("parts", [part.depth for part in stack.parts]),
        ("exits", [exit_.after for exit_ in stack.exits]),
    ):
        where = f"stacks.{stack.name}.{kind}"
        if not depths or depths[0] < 0 or any(a >= b for a, b in pairwise(depths)):
            yield f"{where}: depths have to increase, found {depths}"
        if depths and depths[-1] != stack.blocks:
            yield f"{where}: the last depth is {depths[-1]}, the stack has {stack.blocks} blocks"
    if stack.whole is not None and (stack.whole.depth, len(stack.whole.segments)) != (stack.blocks, 1):
        yield f"stacks.{stack.name}.whole: it has to be one segment of all {stack.blocks} blocks"
    loose = {exit_.after for exit_ in stack.exits} - {part.depth for part in stack.parts}
    if loose:
        yield f"stacks.{stack.name}.exits: no part ends at depth {', '.join(map(str, sorted(loose)))}"


def _steps(manifest: Manifest) -> Iterator[str]:
    """A part's ``steps`` take what the part takes, and give what it gives."""
    for name, stack in manifest.stacks.items():
        for i, part in enumerate(stack.runs):
            segments = [manifest.segments.get(each or "") for each in (*part.segments, part.steps)]
            if part.steps is None or None in segments:
                continue
            one, several = segments[0], segments[-1]
            assert one is not None
            assert several is not None
            where = f"stacks.{name}.{'whole' if part is stack.whole else f'parts[{i}]'}.steps: {part.steps!r}"
            full, outputs = part.depth == stack.blocks, set(one.outputs.values())
            scores = next((exit_.scores for exit_ in stack.exits if exit_.after == part.depth), {})
            picks = {scores.get(name) for name in (SCREENED, *(() if full else (PICK,)))} & outputs
            first = i == 0 or part is stack.whole
            if manifest.cache is None or not first or len(part.segments) != 1 or not (picks or full):
                yield f"{where} is for a first part of one segment, which picks tokens, of a bundle with caches"
                continue
            buffers = set(manifest.cache.buffers.values())
            made = {value if value in buffers else in_steps(value) for value in outputs} | (set() if picks else {NEXT})
            free = {measure for measure, value in scores.items() if value in outputs and not full}
            gates = {least_of(measure) for measure in free if measure_named(measure).gates}
            needed = {*one.inputs.values(), STEPS, FREELY, *gates}
            if missing := sorted((needed - {*several.inputs.values()}) | (made - {*several.outputs.values()})):
                yield f"{where} has nothing for {', '.join(missing)}"


def _kind(manifest: Manifest, name: str) -> tuple[object, ...]:
    value = manifest.values.get(name)
    return (value.dtype, len(value.shape), value.place(manifest.batch)) if value else ()


class _Flow:
    """Runs the plan in thought: which values are there when a segment runs."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._made: dict[str, str] = {}
        self._used: set[str] = set()

    def problems(self) -> Iterator[str]:
        manifest = self._manifest
        there: set[str] = set()
        for name in manifest.inputs:
            yield from self._make(name, "the inputs", there)
        if manifest.cache is not None:
            yield from _cache(manifest.cache, manifest)
            for name in manifest.cache.values:
                yield from self._make(name, "the cache", there)
        if manifest.learners:
            yield from self._make(WIDTH, "the width", there)
        last = len(manifest.stages) - 1
        final: Exit | None = None
        for i, stage in enumerate(manifest.stages):
            if stage.segment is not None:
                yield from self._run(stage.segment, there)
            elif stage.stack is not None:
                stack = manifest.stacks[stage.stack]
                yield from self._loop(stack, there, ends=i == last)
                final = stack.exits[-1] if i == last else None
        outputs = dict(manifest.outputs)
        if manifest.cache is not None and (final is None or manifest.cache.logits not in final.outputs):
            yield f"cache.logits: the last stage is no stack whose exits make {manifest.cache.logits!r}"
        if final is not None:
            for name, value in final.outputs.items():
                if outputs.pop(name, None) != value:
                    yield f"outputs.{name}: is not {value!r}, which full depth of the last stack makes it"
        yield from self._there(outputs.values(), there, "outputs")
        for name, item in manifest.learners.items():
            if item.count not in self._made:
                yield f"learners.{name}.count: nothing makes {item.count!r}"

    def _loop(self, stack: Stack, there: set[str], *, ends: bool) -> Iterator[str]:
        where = f"stacks.{stack.name}"
        inner = set(there)
        exits = {exit_.after: exit_ for exit_ in stack.exits}
        yield from self._there([stack.input], there, f"{where}.input")
        if stack.groups:
            yield from self._make(stack.places or "", f"{where}.places", inner)
        if stack.asked is not None:
            yield from self._make(stack.asked, f"{where}.asked", inner)
        for part in stack.parts:
            for segment in part.segments:
                yield from self._run(segment, inner)
            yield from self._there([part.output], inner, f"{where}, part {part.depth}, output")
            if part.depth in exits:
                place = f"{where}, exit after {part.depth}"
                yield from self._leave(exits[part.depth], inner, place, stack, ends=ends)
        outputs = {str(sorted(exit_.outputs)) for exit_ in stack.exits}
        if len(outputs) > 1:
            yield f"{where}.exits: their outputs differ: {' and '.join(sorted(outputs))}"
        last = stack.exits[-1].state
        if stack.output == last or stack.output not in self._made:
            yield from self._make(stack.output, where, there, again=stack.output == last)
        else:
            yield f"{where}.output: {stack.output!r} is not {last!r}, and {self._made[stack.output]} makes it"

    def _leave(self, exit_: Exit, inner: set[str], where: str, stack: Stack, *, ends: bool) -> Iterator[str]:
        here = set(inner)
        for segment in exit_.segments:
            yield from self._run(segment, here)
        if bool(exit_.outputs) != ends:
            yield f"{where}: " + ("has no outputs" if ends else "has outputs, but other stages follow")
        yield from self._there([exit_.state], here, f"{where}, state")
        yield from self._there(exit_.outputs.values(), here, f"{where}, outputs")
        stands_for = {exit_.state: stack.output} if not ends else {}
        stands_for |= {made: self._manifest.outputs.get(name, made) for name, made in exit_.outputs.items()}
        for made, full in stands_for.items():
            if _kind(self._manifest, made) != _kind(self._manifest, full):
                yield f"{where}: {made!r} and {full!r} differ in dtype, rank or place of rows"
        yield from self._there(exit_.scores.values(), here, f"{where}, scores")
        for measure, name in exit_.scores.items():
            if name not in self._manifest.values:
                continue  # which is said above
            rank, place = _kind(self._manifest, name)[1:]
            wide = self._manifest.values[name].shape[1] if rank == 2 else None
            by_token = isinstance(wide, str) or (wide is not None and wide == _scores(stack))
            dtype, expected = self._manifest.values[name].dtype, measure_named(measure).dtype
            if measure in MEASURES and dtype != expected:
                yield f"{where}, score {measure}: {name!r} is {dtype}, expected {expected}"
            if self._manifest.batch and (not (rank == 1 or by_token) or place != (0, 1)):
                yield f"{where}, score {measure}: {name!r} is neither [{self._manifest.batch}] nor with tokens"

    def _run(self, name: str, there: set[str]) -> Iterator[str]:
        segment: Segment = self._manifest.segments[name]
        if name in self._used:
            yield f"segments.{name}: runs at two places; a segment is one use of a file"
        self._used.add(name)
        yield from self._there(segment.inputs.values(), there, f"segments.{name}.inputs")
        for value in segment.outputs.values():
            yield from self._make(value, f"segment {name!r}", there)

    def _make(self, name: str, by: str, there: set[str], *, again: bool = False) -> Iterator[str]:
        if name not in self._manifest.values:
            yield f"values.{name}: missing, but {by} makes it"
        if name in self._made and not again:
            yield f"values.{name}: made by {self._made[name]} and by {by}"
        self._made.setdefault(name, by)
        there.add(name)

    def _there(self, wanted: Iterable[str], there: set[str], where: str) -> Iterator[str]:
        for name in wanted:
            if name not in there:
                known = name in self._manifest.values
                yield f"{where}: {name!r} is {'not made before, where it is seen' if known else 'no value'}"

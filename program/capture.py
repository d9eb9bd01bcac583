"""A model becomes a graph: ``torch.export``, then one flat ``fx`` graph with named inputs and outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from offramp.errors import CaptureError, ForwardError
from offramp.program.canonical.complex_pairs import made_real
from offramp.program.canonical.simplify import canonicalize
from offramp.program.dropout import same_as_eval, switch_off
from offramp.program.functional import functional
from offramp.program.graph import expression, shape
from offramp.program.program import Program, analyse
from offramp.program.silence import quiet
from offramp.program.unwrap import as_captured, plain, signature, takes_anything

log = logging.getLogger(__name__)

ExampleInputs = Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor
Dynamic = Mapping[str, Mapping[int, str]]
_TOLERANCE = 1e-4  # of an output's greatest value
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
)


def capture(
    module: Any, example_inputs: ExampleInputs, dynamic: Dynamic | None = None, *, training: bool = False
) -> Program:
    """Capture the forward of ``module`` as a program, and find its axes and stacks.

    Args:
        module: any ``nn.Module`` (a ``torch.fx.GraphModule`` too) whose forward takes and returns tensors, or what
            `offramp.program.unwrap.plain` makes one of: a compiled or data-parallel module, an ``ExportedProgram``, a
            pipeline. It is captured in eval mode and, where a ``config`` says otherwise, without a cache, hidden states
            and tuples; its mode and its configuration are restored. Its weights are shared, except those of a model in
            half or double precision or on another device: it is captured as a float32 copy on the CPU.
        example_inputs: tensors by the names of the forward's parameters, or in their order (floating point becomes
            float32, None is left out). Use a batch of at
            least two rows and sizes that differ from each other; a batch of one row is doubled for capture.
        dynamic: names of the axes that may vary, ``{"input_ids": {0: "batch", 1: "tokens"}}``; every other
            axis is then fixed. None lets every axis vary that the model lets vary (of inputs with four or
            more axes, such as images, only the first).
        training: keep the model's dropout, for ``program.module`` in training mode; all else sees the model as it
            is in eval mode.

    Raises:
        CaptureError: the forward cannot be captured (control flow that depends on data, say), returns
            something that is no tensor, number or text, or changes its buffers; or, for ``training``, it differs
            from the eval forward by more than dropout.
        ForwardError: the forward fails on the example inputs, whoever calls it.
    """
    module = plain(module)
    inputs = _named(module, example_inputs)
    if dynamic is not None:
        dynamic = _counted(dynamic, inputs)
    with as_captured(module), _returning_tensors(module, inputs):
        if dynamic is None:
            inputs = _doubled(module, inputs)
        module.train(training)
        exported = _export(module, inputs, dynamic)  # before any call: models cache tables of the first length
        module.eval()
        expected = _eager(module, inputs)
    graph_module = _flatten(exported, inputs, list(expected))
    if training:
        switch_off(graph_module.graph)
    canonicalize(graph_module)
    if made_real(graph_module):
        canonicalize(graph_module)
    if training:
        same_as_eval(graph_module, inputs, expected)
    else:
        _same_as_eager(graph_module, inputs, expected)
    example = {name: inputs[name] for name in [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]}
    names = _axis_names(graph_module, dynamic)
    return analyse(graph_module, example, expected, names)


def _counted(dynamic: Dynamic, inputs: Mapping[str, torch.Tensor]) -> Dynamic:
    """``dynamic`` with axes counted from the front; names and axes that are not there are errors."""
    unknown = sorted(set(dynamic) - set(inputs))
    if unknown:
        raise CaptureError(f"dynamic names inputs {unknown}, the example inputs are {sorted(inputs)}")
    places = [(name, axis, inputs[name].dim()) for name, axes in dynamic.items() for axis in axes]
    if wrong := [f"axis {axis} of {name}" for name, axis, rank in places if not -rank <= axis < rank]:
        raise CaptureError(f"dynamic names axes that are not there: {', '.join(wrong)}")
    return {name: {axis % inputs[name].dim(): word for axis, word in axes.items()} for name, axes in dynamic.items()}


@contextlib.contextmanager
def _returning_tensors(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """As long as it lasts, the forward returns its tensors by name, as `named_outputs` has them.

    If it takes anything it names ``inputs``. torch.export knows mappings and tuples, but neither dataclasses nor
    texts. It is the instance's forward that changes, so that the paths of submodules, which give names to stacks,
    stay what they are.
    """
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def named(*args: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        return named_outputs(forward(*args, **inputs))

    if takes_anything(module):
        names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
        named.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def _named(module: torch.nn.Module, example: ExampleInputs) -> dict[str, torch.Tensor]:
    parameters = list(signature(module).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        given: dict[str, Any] = dict(example)
        names = list(given) if takes_anything(module) else names
    else:
        if len(example) > len(names):
            raise CaptureError(f"{len(example)} example inputs for a forward with parameters {names}")
        given = dict(zip(names, example, strict=False))
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise CaptureError(
            f"the forward has no parameter {unknown}; its parameters are {names}",
            hint="a wrapper whose forward names them, if the forward takes more as keyword arguments",
        )
    given = {name: value for name, value in given.items() if value is not None}
    wrong = {name: type(value).__name__ for name, value in given.items() if not isinstance(value, torch.Tensor)}
    if wrong or not given:
        arrays = any(hasattr(given[name], "__array__") or isinstance(given[name], list) for name in wrong)
        raise CaptureError(
            f"example inputs must be tensors, found {wrong or 'none'}",
            hint='torch.as_tensor makes one of an array or a list; a tokenizer with return_tensors="pt"'
            if arrays
            else "wrap the model in a module whose forward takes tensors only and sets the rest itself",
        )
    return {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in given.items()
    }


def _doubled(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch.export fixes an axis of size one, so a batch of one row is captured as two."""
    if any(value.dim() == 0 or value.shape[0] != 1 for value in inputs.values()):
        return inputs
    doubled = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    try:
        with torch.no_grad():
            module(**doubled)
    except Exception as error:  # noqa: BLE001 (the model's own; one row is then captured)
        log.info("a batch of two rows does not run (%s): capturing one", error)
        return inputs
    return doubled


def named_outputs(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a forward's result by name: keys of mappings, fields of dataclasses, ``output0``, ... of tuples.

    None is left out, and so are numbers and texts, which do not depend on the contents of tensors.

    Raises:
        CaptureError: something in it is of another kind.
    """
    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    if value is None or isinstance(value, _CONSTANTS):
        return {}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(f"output{i}" if not name else str(i), item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    else:
        cache = hasattr(value, "get_seq_length")
        raise CaptureError(
            f"the forward returns outputs that are not tensors: {name or 'output'} is a {type(value).__name__}",
            hint="use_cache=False: offramp makes caches of its own (insert-cache)"
            if cache
            else "wrap the model in a module that returns tensors only",
        )
    for key, item in items:
        inner = named_outputs(item, f"{name}.{key}" if name else key)
        if twice := sorted(set(found) & set(inner)):
            raise CaptureError(f"the forward returns several outputs that would be called {twice}", hint="other keys")
        found |= inner
    return found


def _export(module: torch.nn.Module, inputs: dict[str, torch.Tensor], dynamic: Dynamic | None) -> ExportedProgram:
    if dynamic is not None:
        attempts = [{name: dict.fromkeys(dynamic.get(name, {}), Dim.AUTO) for name in inputs}]
    else:
        # of four axes and more (images) only the first is free, and what has the size of another input's tokens (masks)
        lengths = {size for value in inputs.values() if value.dim() < 4 for size in value.shape[1:] if size > 1}
        free = {
            name: {i: Dim.AUTO for i, size in enumerate(value.shape) if value.dim() < 4 or not i or size in lengths}
            for name, value in inputs.items()
        }
        rows = {value.shape[0] for value in inputs.values() if value.dim()}
        joint = {size: Dim(f"rows{size}") for size in rows if sum(v.shape[:1] == (size,) for v in inputs.values()) > 1}
        shared = {
            name: {axis: joint.get(inputs[name].shape[0], d) if axis == 0 else d for axis, d in dims.items()}
            for name, dims in free.items()
        }
        only_rows = {name: {axis: d for axis, d in dims.items() if axis == 0} for name, dims in free.items()}
        attempts = [shared, free, only_rows] if joint else [free, only_rows]
    first: Exception | None = None
    for dims in attempts:
        try:
            with quiet():
                return _functional(module, inputs, dims)
        except GuardOnDataDependentSymNode as error:
            first = error
            break
        except Exception as error:  # noqa: BLE001 (whatever the model raises; the first is reported below)
            log.info("torch.export failed with %s: %s", dims, error)
            first = first or error
    assert first is not None
    was_training = module.training
    module.eval()
    _eager(module, inputs)  # what the model itself refuses is not a matter of capture
    module.train(was_training)
    text = str(first).strip() or type(first).__name__
    place = next((line.strip() for line in text.splitlines() if "File " in line), "")
    raise CaptureError(
        f"torch.export cannot capture {type(module).__name__}: {text.splitlines()[0]}{' at ' + place if place else ''}",
        hint="Python control flow must not depend on the contents of tensors, and the forward must run "
        "without a cache (use_cache=False); see the cause above this error",
    ) from first


def _eager(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model itself computes; its own error becomes a `ForwardError`."""
    try:
        with torch.no_grad():
            return named_outputs(module(**inputs))
    except CaptureError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        others = (str(Path(torch.__file__).parent), __file__)
        frames = [item for item in traceback.extract_tb(error.__traceback__) if not item.filename.startswith(others)]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise ForwardError(
            f"{type(module).__name__} does not run on the example inputs ({shapes}): "
            f"{type(error).__name__}: {error}{place}",
            hint="example inputs that the model takes when it is called as module(**inputs)",
        ) from error


def _same_as_eager(
    graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise where the graph computes something else than the model: some code asks whether it is being traced.

    A model that draws random numbers is let through: no two of its answers are the same.
    """
    given = {str(n.target): inputs[str(n.target)] for n in graph_module.graph.find_nodes(op="placeholder")}
    with torch.no_grad():
        errors = _errors(graph_module(**given), expected)
        if not errors or _errors(graph_module(**given), graph_module(**given)):
            return
    raise CaptureError(
        f"the captured graph computes something else than the model: {', '.join(errors)}",
        hint="the model's code takes another way while it is traced, for masks that are left out for example: "
        "give every input that the model's own processor makes",
    )


def _errors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The outputs that differ, and by how much."""
    errors = []
    for name, value in expected.items():
        if not value.is_floating_point() or not value.numel():
            continue
        same = (found[name] == value) | (found[name].isnan() & value.isnan())
        error = float(torch.where(same, 0.0, (found[name] - value).abs()).max())
        finite = value[value.isfinite()].abs()
        if not error <= _TOLERANCE * max(1.0, float(finite.max()) if finite.numel() else 1.0):
            errors.append(f"{name} by {error:.1e}")
    return errors


class _Detaching(TorchFunctionMode):
    """``x.data`` is ``x.detach()``: torch.export takes the former for a constant that nothing made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _functional(module: torch.nn.Module, inputs: dict[str, torch.Tensor], dims: Any) -> ExportedProgram:
    with _Detaching():
        exported: ExportedProgram = torch.export.export(module, (), dict(inputs), dynamic_shapes=dims, strict=False)
    return functional(exported)


def _flatten(exported: ExportedProgram, inputs: Mapping[str, torch.Tensor], names: list[str]) -> fx.GraphModule:
    """The exported graph with weights as attributes, tensor inputs by name, and a dictionary of outputs."""
    signature = exported.graph_signature
    changed = [spec.target for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
    if changed:
        raise CaptureError(
            f"the forward changes its own state or inputs: {changed}",
            hint="offramp captures pure forwards; keep such buffers out of the eval forward",
        )
    attributes: dict[str, Any] = {}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    specs = dict(zip(exported.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node]
            if spec.kind == InputKind.USER_INPUT:
                if node.name in inputs:
                    env[node] = graph.placeholder(node.name)
                    env[node].meta = dict(node.meta)
                continue
            target = str(spec.target)
            tensors = exported.constants if spec.target in exported.constants else exported.state_dict
            attributes[target] = tensors[target]
            env[node] = graph.create_node("get_attr", target, name=node.name)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            returned = [arg for arg in node.args[0] if isinstance(arg, fx.Node)]
            graph.output({name: env[arg] for name, arg in zip(names, returned, strict=True)})
        else:
            if node.op == "get_attr":  # the body of a wrapper, inlined by canonicalize
                attributes[str(node.target)] = getattr(exported.graph_module, str(node.target))
            env[node] = graph.node_copy(node, env.__getitem__)
    graph_module = fx.GraphModule(attributes, graph, "Program")
    for name, tensor in attributes.items():
        if isinstance(tensor, torch.nn.Parameter):
            owner, _, leaf = name.rpartition(".")
            setattr(graph_module.get_submodule(owner), leaf, tensor)
    return graph_module


def _axis_names(graph_module: fx.GraphModule, dynamic: Dynamic | None) -> dict[Any, str]:
    """The names that the user gave to axes, by symbol; an axis that the model fixes is an error."""
    names: dict[Any, str] = {}
    if dynamic is None:
        return names
    for node in graph_module.graph.find_nodes(op="placeholder"):
        for axis, name in dynamic.get(str(node.target), {}).items():
            size = shape(node)[axis]
            if isinstance(expression(size), int):
                raise CaptureError(
                    f"axis {axis} of {node.target} ({name}) is fixed at {expression(size)} by the model",
                    hint="leave it out of dynamic, or give example inputs whose sizes are larger than one",
                )
            others = [symbol for symbol, known in names.items() if known == name and symbol != expression(size)]
            if others:
                raise CaptureError(
                    f"the axes called {name!r} are not the same for the model: axis {axis} of {node.target} is another",
                    hint="give axes that vary apart names of their own",
                )
            names[expression(size)] = name
    return names

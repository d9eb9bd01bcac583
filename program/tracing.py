"""A forward becomes one flat ``fx`` graph: ``torch.export``, then weights as attributes, inputs and outputs by name."""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._subclasses import fake_tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

from offramp.errors import CaptureError
from offramp.program.branches import choosing
from offramp.program.forward import eager
from offramp.program.functional import functional
from offramp.program.listed_rows import Lists, RowAloneError
from offramp.program.ops import TAKE_TOKENS
from offramp.program.silence import quiet
from offramp.program.unwrap import unchanged

log = logging.getLogger(__name__)

Dynamic = Mapping[str, Mapping[int, str]]
_CONSTANTS = 4096  # elements
_MANY = 8  # blocks
_ROWS = 2**31  # of a batch at most: without a bound torch.export multiplies its sizes beyond 64 bits
_FEW = 4  # integers of a row: fewer than a text has tokens
_one_at_a_time = threading.RLock()
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def exported(module: torch.nn.Module, inputs: dict[str, torch.Tensor], dynamic: Dynamic | None) -> ExportedProgram:
    """The functional graph of the module's forward, with as many free axes as the model lets vary.

    Raises:
        CaptureError: torch.export refuses the forward.
        ForwardError: the forward fails on the inputs by itself.
    """
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
        shared_by = {size: sum(value.shape[:1] == (size,) for value in inputs.values()) for size in rows}
        joint = {size: Dim(f"rows{size}", max=_ROWS) for size in rows if shared_by[size] > 1}
        shared = {
            name: {axis: joint.get(inputs[name].shape[0], d) if axis == 0 else d for axis, d in dims.items()}
            for name, dims in free.items()
        }
        only_rows = {name: {axis: d for axis, d in dims.items() if axis == 0} for name, dims in free.items()}
        attempts = [shared, free, only_rows] if joint else [free, only_rows]
    first: Exception | None = None
    for written in (False, True):  # each way of the first kind comes before any of the second, which takes as long
        for dims in attempts:
            try:
                with quiet(), unchanged(module):
                    return _functional(module, inputs, dims, written)
            except CaptureError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever the model raises; the first way's is reported below)
                log.info("torch.export failed with %s: %s", dims, error)
                guarded = isinstance(error, GuardOnDataDependentSymNode)
                if not written:
                    first = error if guarded else first or error
                if guarded:
                    break
    assert first is not None
    was_training = module.training
    module.eval()
    eager(module, inputs)  # what the model itself refuses is not a matter of capture
    module.train(was_training)
    text = str(first).strip() or type(first).__name__
    place = next((line.strip() for line in text.splitlines() if "File " in line), "")
    raise CaptureError(
        f"torch.export cannot capture {type(module).__name__}: {text.splitlines()[0]}{' at ' + place if place else ''}",
        hint=_hint(module, inputs, first),
    ) from first


def _hint(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], error: Exception) -> str:
    """What to try where torch.export failed."""
    if any(frame.filename == flex_attention.__file__ for frame in traceback.extract_tb(error.__traceback__)):
        return "attention by scaled_dot_product_attention, not by flex_attention (attn_implementation='sdpa', say)"
    if any(weight.is_inference() for weight in (*module.parameters(), *module.buffers())):
        return "make or load the model outside of torch.inference_mode(), which leaves tensors that no graph may hold"
    contents = (
        "Python control flow must not depend on the contents of tensors (torch.cond may), and the forward must run "
        "without a cache (use_cache=False); see the cause above this error"
    )
    numbers = [name for name, value in inputs.items() if _numbers(value)]
    if not numbers or not isinstance(error, GuardOnDataDependentSymNode):
        return contents
    return (  # torch does not say whose contents they are
        f"where the numbers in {' or '.join(numbers)} decide sizes, a wrapper around the model whose forward does "
        "not take them and writes them down as they are in the example (torch.tensor([[...]])); "
        f"where anything else decides: {contents}"
    )


def _numbers(value: torch.Tensor) -> bool:
    """Whether an input is of a few integers for each row: sizes of its image, say."""
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.numel() <= _FEW * (len(value) if value.dim() else 1)


class _Tracing(TorchFunctionMode):
    """What torch.export would take for a constant, or make one of.

    ``x.data`` is ``x.detach()``, which torch.export takes for something that nothing made. With ``lists`` the rows of a
    batch may be listed, ``torch.cat(list(x))``, without fixing how many there are. With ``kept`` a mask of rows (images
    that are no padding, say) drops none: one that does is an error. With ``written`` numbers that a forward counts
    (``torch.arange(4)``) are written down, so that what is computed of them alone may decide what it does next.
    """

    def __init__(self, lists: bool, kept: bool, written: bool) -> None:
        super().__init__()
        self._lists, self._kept, self._written = Lists() if lists else None, kept, written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        if self._written and func is torch.arange and (counted := _counted(*args, **(kwargs or {}))) is not None:
            return counted
        if self._kept and func is torch.Tensor.__getitem__ and _drops_rows(*args):
            return _all_kept(*args)
        found = self._lists(func, args, kwargs or {}) if self._lists else NotImplemented
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def _counted(*bounds: Any, dtype: torch.dtype | None = None, device: Any = None, **others: Any) -> torch.Tensor | None:
    """What ``torch.arange`` counts, on the CPU; None where that is not known, or it is asked for more."""
    names = ("start", "end", "step") if len(bounds) > 1 or "end" in others else ("end",)
    given = {"start": 0, "step": 1, **dict(zip(names, bounds, strict=False)), **others}
    if given.keys() != {"start", "end", "step"} or not all(isinstance(bound, int) for bound in given.values()):
        return None
    return torch.tensor(range(given["start"], given["end"], given["step"]), dtype=dtype or torch.int64)


def _drops_rows(_: torch.Tensor, index: Any) -> bool:
    """Whether a tensor's index is a mask of its rows, of which torch does not know what it holds."""
    if not isinstance(index, torch.Tensor) or index.dtype != torch.bool or index.dim() != 1:
        return False
    return getattr(index, "constant", None) is None


def _all_kept(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows, of which each that the mask drops is one that is not there, which is an error."""
    taken: torch.Tensor = TAKE_TOKENS(tensor.unsqueeze(1), (~mask).long().unsqueeze(1), 1)
    return taken.squeeze(1)


@contextmanager
def _constants() -> Iterator[None]:
    """Let what a forward writes down (the grid of an image, say), and computes of that alone, decide what it does next.

    torch knows the contents of constants of one element; a list of sizes has more.
    """
    before = getattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", None)
    if before is None:  # a torch that calls it otherwise: only constants of one element are known
        yield
        return
    with _one_at_a_time:
        fake_tensor.CONSTANT_NUMEL_LIMIT = _CONSTANTS
        try:
            yield
        finally:
            fake_tensor.CONSTANT_NUMEL_LIMIT = before


def _functional(module: torch.nn.Module, inputs: dict[str, torch.Tensor], dims: Any, written: bool) -> ExportedProgram:
    lists = True
    try:
        traced = _traced(module, inputs, dims, lists, written)
    except RowAloneError:
        lists = False
        traced = _traced(module, inputs, dims, lists, written)
    if traced.graph.find_nodes(op="call_function", target=TAKE_TOKENS) and not _runs(traced, inputs):
        traced = _traced(module, inputs, dims, lists, written, kept=False)
    return functional(traced)


@torch.no_grad()
def _runs(traced: ExportedProgram, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether all rows are kept of these inputs."""
    try:
        traced.module()(**inputs)
    except RuntimeError:
        return False
    return True


def _traced(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], dims: Any, lists: bool, written: bool, kept: bool = True
) -> ExportedProgram:
    # torch's table of fake results pays where blocks are many: to keep one takes longer than to compute it
    table = {"fake_tensor_cache_enabled": dynamo_config.fake_tensor_cache_enabled and _longest(module) >= _MANY}
    with _Tracing(lists, kept, written), choosing(), _constants(), dynamo_config.patch(table):
        found: ExportedProgram = torch.export.export(module, (), dict(inputs), dynamic_shapes=dims, strict=False)
    return found


def _longest(module: torch.nn.Module) -> int:
    """How many modules the model's longest list has."""
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    return max((len(item) for item in module.modules() if isinstance(item, lists)), default=0)


def flattened(traced: ExportedProgram, inputs: Mapping[str, torch.Tensor], names: list[str]) -> fx.GraphModule:
    """The exported graph with weights as attributes, tensor inputs by name, and a dictionary of outputs."""
    signature = traced.graph_signature
    specs = dict(zip(traced.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    made = [spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs]
    read = {spec.target for node, spec in specs.items() if node.users}  # what no call reads, none finds changed
    changed = [spec.target for spec, own in zip(signature.output_specs, made, strict=True) if not own]
    if kept := [target for target in changed if target in read or target not in signature.buffers]:
        raise CaptureError(
            f"the forward changes its own state or inputs: {kept}",
            hint="offramp captures pure forwards; keep such buffers out of the eval forward",
        )
    attributes: dict[str, Any] = {}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node]
            if spec.kind == InputKind.USER_INPUT:
                if node.name in inputs:
                    env[node] = graph.placeholder(node.name)
                    env[node].meta = dict(node.meta)
                continue
            target = str(spec.target)
            tensors = traced.constants if spec.target in traced.constants else traced.state_dict
            attributes[target] = tensors[target]
            env[node] = graph.create_node("get_attr", target, name=node.name)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            returned = [arg for arg in itertools.compress(node.args[0], made) if isinstance(arg, fx.Node)]
            graph.output({name: env[arg] for name, arg in zip(names, returned, strict=True)})
        else:
            if node.op == "get_attr":  # the body of a wrapper, inlined by canonicalize
                attributes[str(node.target)] = getattr(traced.graph_module, str(node.target))
            env[node] = graph.node_copy(node, env.__getitem__)
    graph_module = fx.GraphModule(attributes, graph, "Program")
    for name, tensor in attributes.items():
        if isinstance(tensor, torch.nn.Parameter):
            owner, _, leaf = name.rpartition(".")
            setattr(graph_module.get_submodule(owner), leaf, tensor)
    return graph_module

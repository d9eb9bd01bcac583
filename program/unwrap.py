"""What people call their model becomes a plain ``nn.Module`` on the CPU whose forward names its inputs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offramp.errors import CaptureError
from offramp.program.graph import aten

log = logging.getLogger(__name__)

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_WRAPPING = ("torch", "accelerate", "deepspeed")  # packages
_HALVES = (torch.float16, torch.bfloat16)
_SETTINGS = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}
_QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.", "torchao.", "bitsandbytes.")
_BEFORE = "the model before it was quantized: a bundle is made from float32 weights"


def plain(model: Any) -> nn.Module:
    """The module to capture.

    What wraps a module without changing what it computes is taken off: ``torch.compile``, ``DataParallel`` and
    its kind, a pipeline's ``model``. An ``ExportedProgram`` or its ``module()`` is called by the names of its inputs.
    A module with weights in half or double precision, or on another device, becomes a float32 copy on the CPU that
    shares nothing with it; any other module is returned itself.

    Raises:
        CaptureError: what it computes cannot be seen (TorchScript, quantized or sharded weights, weights without data,
            dropout that was exported switched on), or it is no model at all.
    """
    module = _unwrapped(model)
    _refuse_hidden(module)
    if isinstance(module, torch.fx.GraphModule) and hasattr(module, "_in_spec"):
        return _Exported(module)
    weights, tables = list(module.parameters()), list(module.buffers())
    other = any(item.dtype in _HALVES or item.device.type != "cpu" for item in (*weights, *tables))
    if other or any(item.dtype == torch.float64 for item in weights):
        log.info("%s is captured as a float32 copy on the CPU", type(module).__name__)
        try:
            copied: nn.Module = copy.deepcopy(module)
            return copied.cpu().float()  # not to(float32), which leaves of complex tables their real part
        except RuntimeError as error:
            raise CaptureError(
                f"{type(module).__name__} is not float32 on the CPU and cannot be copied: {error}",
                hint="capture module.float().cpu()",
            ) from error
    return module


def _unwrapped(module: Any) -> nn.Module:
    if isinstance(module, ExportedProgram):
        module = module.module()
    if not isinstance(module, nn.Module) and isinstance(getattr(module, "model", None), nn.Module):
        module = module.model
    while isinstance(module, nn.Module) and (inner := _wrapped(module)) is not None:
        module = inner
    if isinstance(module, nn.Module):
        return module
    if isinstance(module, type):
        raise CaptureError(f"{module.__name__} is a class, not a model", hint="an instance of it, with its weights")
    if isinstance(module, Mapping):
        raise CaptureError(
            f"a {type(module).__name__} of {len(module)} items is no model",
            hint="build the module and give it the weights with load_state_dict",
        )
    hint = "offramp.models.resolve knows names" if isinstance(module, str) else "a torch.nn.Module around it"
    raise CaptureError(f"a {type(module).__name__} is no model", hint=hint)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside one that only compiles it or spreads it over devices; one of the user's may change results."""
    if type(module).__module__.partition(".")[0] not in _WRAPPING:
        return None
    for name in ("_orig_mod", "module"):
        inner = dict(module.named_children()).get(name)
        if inner is not None and len(dict(module.named_children())) == 1 and takes_anything(module):
            return inner
    return None


def takes_anything(module: nn.Module) -> bool:
    """Whether the forward only passes on what it is given."""
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def signature(module: nn.Module) -> inspect.Signature:
    """The forward's parameters; of one that takes anything, those of the only module that it can pass them on to."""
    while takes_anything(module) and len(children := list(module.children())) == 1:
        (module,) = children
    return inspect.signature(module.forward)


def _refuse_hidden(module: nn.Module) -> None:
    """Raise where capture cannot see what the module, or a part of it, computes."""
    name = type(module).__name__
    for path, part in module.named_modules():
        where = f" (at {path})" if path else ""
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is a traced or scripted module{where}, whose code is not Python's",
                hint="the nn.Module that was given to torch.jit, with the same weights",
            )
        if type(part).__module__.startswith(_QUANTIZED):
            raise CaptureError(f"{name} is quantized: {type(part).__name__}{where}", hint=_BEFORE)
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(f"the weight {path} of {name} has no shape yet", hint="call the model once before")
        if tensor.is_meta:
            raise CaptureError(
                f"the weight {path} of {name} has no data: it is on the device meta",
                hint="load the weights: without init_empty_weights, and with device_map=None",
            )
        if tensor.is_quantized:
            raise CaptureError(f"the weight {path} of {name} is quantized", hint=_BEFORE)
        if is_traceable_wrapper_subclass(tensor):
            raise CaptureError(
                f"the weight {path} of {name} is a {type(tensor).__name__}, not a plain tensor",
                hint="the model before its weights were quantized, or the full weights of one that is sharded",
            )


class _Exported(nn.Module):
    """An exported module, called by the names of its inputs, whichever of them were positional."""

    def __init__(self, exported: torch.fx.GraphModule) -> None:
        super().__init__()
        for node in exported.graph.find_nodes(op="call_function", target=aten.dropout.default):
            if node.args[1] and node.args[2]:
                raise CaptureError("the model was exported with dropout switched on", hint="export module.eval()")
        self.exported = exported
        positional, named = exported._in_spec.children()
        names = [str(node.target) for node in exported.graph.find_nodes(op="placeholder")]
        if positional.num_leaves != positional.num_children or named.num_leaves != named.num_children:
            raise CaptureError("the exported model takes tensors inside of tuples or dicts", hint="export it flat")
        self._positional = names[: positional.num_children]
        self._named = list(named.context)

        def forward(**inputs: torch.Tensor) -> Any:
            positional = [inputs[name] for name in self._positional]
            return self.exported(*positional, **{name: inputs[name] for name in self._named})

        forward.__signature__ = called_by_names((*self._positional, *self._named))  # type: ignore[attr-defined]
        self.forward = forward

    def train(self, mode: bool = True) -> _Exported:
        """An exported module has no modes."""
        return self


def called_by_names(names: Iterable[str]) -> inspect.Signature:
    """The signature of a forward that is called by names."""
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])


@contextlib.contextmanager
def as_captured(module: nn.Module) -> Iterator[None]:
    """As long as it lasts, the module is what capture sees; afterwards it is as it was.

    It is in eval mode, nothing in it is compiled, and its configurations (any object called ``config``, and those
    inside it) ask for no cache and for nothing beside the answer. What torch.nn does with attention to save time
    hides what it computes: its fused encoder layer is one opaque operator, and `nn.Transformer` looks into a mask for
    whether it is the causal one, which a graph cannot. Both are off.
    """
    with contextlib.ExitStack() as stack:
        modes = {part: part.training for part in module.modules()}
        stack.callback(_restore_modes, modes)
        module.eval()
        for config in _configs(module):
            for name, value in _SETTINGS.items():
                if (
                    (known := getattr(config, name, None)) is not None
                    and known is not value
                    and _set(config, name, value)
                ):
                    stack.callback(_set, config, name, known)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        transformer = torch.nn.modules.transformer
        stack.callback(setattr, transformer, "_detect_is_causal_mask", transformer._detect_is_causal_mask)
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast("cpu", enabled=False))  # of a training loop around it
        yield


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """A forward may exchange parts, set attributes and fill lists and dictionaries; afterwards all are as they were.

    BigBird, for one, goes over to other attention at its first short input, and stays there. What is traced would leave
    tensors without contents behind, and a table as long as the first input would be all that a later trace sees.
    Only whether a part is training stays as it is then.
    """
    before = [(part, _without_mode(vars(part))) for part in module.modules()]
    held = _held(value for _, values in before for value in values.values())
    try:
        yield
    finally:
        for part, values in before:
            for name in _without_mode(vars(part)).keys() - values.keys():
                del vars(part)[name]
            vars(part).update(values)
        for container, then in held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(then)


def _without_mode(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "training"}


def _held(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The lists, dictionaries and sets in these, and in each other, with copies of them.

    A module's parts, buffers and hooks lie in such.
    """
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value, copy.copy(value)
        elif not isinstance(value, tuple):
            continue
        waiting += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _restore_modes(modes: Mapping[nn.Module, bool]) -> None:
    for part, mode in modes.items():
        part.training = mode


def _configs(module: nn.Module) -> list[Any]:
    """Every configuration of the module's parts, and those inside them."""
    found: dict[int, Any] = {}
    waiting = [getattr(part, "config", None) for part in module.modules()]
    while waiting:
        config = waiting.pop()
        if not hasattr(config, "__dict__") or isinstance(config, (nn.Module, type)) or id(config) in found:
            continue
        found[id(config)] = config
        waiting += [value for name, value in vars(config).items() if name.endswith("config")]
    return list(found.values())


def _set(config: Any, name: str, value: bool) -> bool:
    """Set it; False where the configuration does not let itself be changed."""
    try:
        setattr(config, name, value)
    except (AttributeError, ValueError, TypeError):
        return False
    return True

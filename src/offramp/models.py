"""How a command line names a model, and how the name becomes a module with example inputs.

========================== ==================================================================================
``path/file.py:factory``   a function of a file; its folder is importable, as under ``python path/file.py``
``package.module:factory`` a function of a module that can be imported from here
``hf:DIRECTORY_OR_ID``     a directory by ``save_pretrained``, or an id of the hub (needs transformers)
``zoo:NAME``               a model of `offramp.zoo`
========================== ==================================================================================

A factory takes no argument and returns ``(module, example_inputs)``: a ``torch.nn.Module``, and a dict (by
parameter name, or the one dict that a forward takes) or a tuple of tensors. What else stands for a module,
`offramp.program.unwrap.plain` knows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from offramp import zoo
from offramp.errors import (
    CaptureError,
    FactoryMissingError,
    FactoryResultError,
    ModelNameError,
    PretrainedModelError,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offramp.program import Program

    Inputs: TypeAlias = dict[str, Tensor] | tuple[Tensor, ...]
    Factory: TypeAlias = Callable[[], tuple[nn.Module, Inputs]]

log = logging.getLogger(__name__)


def resolve(name: str, note: Callable[[str], None] = log.warning) -> Factory:
    """The factory behind a name; calling it loads the model, which may take long.

    What needs no import is checked at once: the form, that a file exists, that the zoo has the model. The
    rest is checked by the call. Both raise `ModelError` or `offramp.zoo.ZooError`. What a model's own code
    raises passes through. ``note`` gets, a sentence each, what an ``hf:`` directory lacks: weights of its model.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "zoo":
        if rest not in zoo.names():
            raise zoo.UnknownModelError(f"the zoo has no model {rest!r}", hint=_zoo_names())
        return lambda: zoo.load(rest)
    if scheme == "hf" and rest:
        return lambda: _load_pretrained(rest, note)
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ModelNameError(
            f"{name!r} names no model",
            hint=f"hf:{name}"
            if Path(name, "config.json").is_file()
            else f"file.py:factory, package.module:factory, hf:DIRECTORY_OR_ID or {_zoo_names()}",
        )
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise FactoryMissingError(f"there is no file {place}", hint=f"a path seen from {Path.cwd()}")
        return lambda: _call(path.parent, lambda: _import_file(path), function, name)
    return lambda: _call(Path.cwd(), lambda: _import_module(place), function, name)


def settings(
    name: str,
    module: nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    ignore_generation: Collection[str] = (),
    note: Callable[[str], None] = log.warning,
) -> dict[str, Any]:
    """What a model brings along beside its weights: arguments of `offramp.save`, empty for a factory of your own.

    ``generation`` (of an ``hf:`` directory its generation_config), ``preprocessing`` of text, sound and images,
    ``labels`` of classes and ``files`` (the tokenizer)::

        module, inputs = models.resolve(name)()
        program = offramp.apply(offramp.capture(module, inputs), "insert-cache,insert-exits")
        offramp.save(program, path, **models.settings(name, module, inputs))

    Args:
        name: The model's name, as `resolve` takes it.
        module: The model, needed for ``hf:``.
        inputs: Its example inputs, needed too.
        ignore_generation: Settings of the generation_config that count as not set.
        note: Told, a sentence each, what cannot be taken along.

    Raises:
        PretrainedModelError: the generation_config asks for what a bundle cannot do.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "zoo":
        audio = zoo.audio(rest)
        files = {file.name: file for file in zoo.tokenizer_files(rest)}
        preprocessing = {"audio": dict(audio)} if audio else {}
        return {"generation": dict(zoo.generation(rest)), "preprocessing": preprocessing, "labels": {}, "files": files}
    if scheme != "hf" or module is None or not isinstance(inputs, Mapping):
        return {"generation": {}, "preprocessing": {}, "labels": {}, "files": {}}
    from offramp.pretrained import model, settings

    return settings.settings(model.processors(rest), module, inputs, ignore_generation, note)


def captured(
    name: str,
    module: nn.Module,
    inputs: Inputs,
    capture: Callable[[nn.Module, Any], Program],
    note: Callable[[str], None] = log.warning,
) -> tuple[Program, Inputs]:
    """The program that ``capture`` (`offramp.capture`) makes of a model, and the inputs that it takes.

    An ``hf:`` model's inputs are made up here: of those a mask of ones is left out where that lets lengths vary, and
    there is one row where the model fixes their number, which ``note`` says.
    """
    program = capture(module, inputs)
    if name.partition(":")[0] != "hf" or not isinstance(inputs, Mapping):
        return program, inputs
    from offramp.pretrained import masks, rows

    program, fewer = masks.without_masks(program, module, inputs, capture, note)
    program, fewer = rows.one_by_one(program, module, fewer, capture, note)
    return program, dict(fewer)


def check_generation(name: str, module: nn.Module, ignore_generation: Collection[str] = ()) -> None:
    """Refuse what `settings` does of the generation_config of an ``hf:`` model; of others there is none.

    Raises:
        PretrainedModelError: the generation_config asks for what a bundle cannot do.
    """
    if name.partition(":")[0] == "hf":
        from offramp.pretrained import generation_config

        generation_config.generation(module, ignore_generation)


def origin(name: str) -> dict[str, Any]:
    """Where a model came from and its ``licence``, None where that is not known: arguments of `offramp.save`.

    ``source`` is the name without the folders of this machine. The licence is what the zoo says, or the card
    (``README.md``) in an ``hf:`` directory.
    """
    scheme, colon, rest = name.partition(":")
    if scheme == "zoo":
        return {"source": name, "licence": zoo.licence(rest)}
    if scheme == "hf" and Path(rest).is_dir():
        return {"source": f"hf:{Path(rest).resolve().name}", "licence": _licence(Path(rest) / "README.md")}
    return {"source": name if scheme == "hf" else f"{Path(scheme).name}{colon}{rest}", "licence": None}


def _licence(about: Path) -> str | None:
    """``license`` in the head of a model card."""
    text = about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""
    head = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    found = re.search(r"^license:\s*(\S.*?)\s*$", head, re.MULTILINE)
    return found[1] if found else None


def _zoo_names() -> str:
    return " ".join(f"zoo:{name}" for name in zoo.names())


def _load_pretrained(source: str, note: Callable[[str], None]) -> tuple[nn.Module, dict[str, Tensor]]:
    try:
        from offramp.pretrained import model
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise PretrainedModelError(
            f"hf:{source} needs transformers, which is not installed", hint="pip install 'offramp[demo]'"
        ) from error
    return model.load(source, note)


def _call(folder: Path, load: Callable[[], ModuleType], function: str, name: str) -> tuple[nn.Module, Inputs]:
    with _importable(folder):
        module = load()
        factory = getattr(module, function, None)
        if not callable(factory):
            raise FactoryMissingError(
                f"{name!r}: {module.__name__} has no function {function}", hint=_functions(module)
            )
        return _checked(factory(), name)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """As long as it lasts, modules of this folder can be imported, before all others."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import_file(path: Path) -> ModuleType:
    name = f"_offramp_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FactoryMissingError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for the classes of a module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, and it misses a module of its own
        raise FactoryMissingError(
            f"there is no module {error.name}",
            hint=f"install it, name a file.py, or run where it lies (now {Path.cwd()})",
        ) from error


def _functions(module: ModuleType) -> str:
    found = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f"one of {', '.join(found)}" if found else "define one: it returns (module, example_inputs)"


def _checked(result: object, name: str) -> tuple[nn.Module, Inputs]:
    from torch import Tensor, nn

    from offramp.program.of_mapping import by_names
    from offramp.program.unwrap import plain

    hint = "return (module, example_inputs), a torch.nn.Module and a dict or tuple of tensors"
    if not isinstance(result, tuple) or len(result) != 2:
        raise FactoryResultError(f"{name!r} returned {_kind(result)}, expected a pair", hint=hint)
    module, inputs = result
    if not isinstance(module, nn.Module):
        try:
            module = plain(module)
        except CaptureError as error:
            raise FactoryResultError(f"{name!r} returned {_kind(module)} as the module", hint=hint) from error
    if isinstance(inputs, Tensor) or not isinstance(inputs, (Mapping, tuple, list)) or not inputs:
        raise FactoryResultError(f"{name!r} returned {_kind(inputs)} as example inputs", hint=hint)
    module, inputs = by_names(module, inputs)
    named = list(inputs.items()) if isinstance(inputs, Mapping) else list(enumerate(inputs))
    for key, value in named:
        if value is not None and not isinstance(value, Tensor):
            raise FactoryResultError(f"{name!r} returned {_kind(value)} as example input {key!r}", hint=hint)
    return module, dict(named) if isinstance(inputs, Mapping) else tuple(inputs)


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list, Mapping)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"

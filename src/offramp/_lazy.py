"""Names of a package that are imported when first used, so that what needs torch costs nothing where it is not used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping


def names_of(
    package: str, modules: Mapping[str, Collection[str]], needs: Collection[str] = (), extra: str = ""
) -> Callable[[str], object]:
    """A package's ``__getattr__``: ``modules`` maps its modules to the names that come from them.

    Where one of the packages ``needs`` is not installed, the error says which ``extra`` brings it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{module_of[name]}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in needs:
                raise
            raise ImportError(
                f"{package}.{name} needs {error.name}, which is not installed: pip install '{extra}'"
            ) from error
        return module if name == module_of[name] else getattr(module, name)

    return get

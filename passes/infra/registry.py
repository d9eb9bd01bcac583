"""Which passes there are: those of ``offramp.passes``, and those that installed packages bring.

A package brings a pass through an entry point of the group ``offramp.passes``, whose name is the pass's::

    [project.entry-points."offramp.passes"]
    scale-exits = "my_package.scale_exits:ScaleExits"
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from offramp.errors import SpecError
from offramp.passes.infra.contract import Pass

GROUP = "offramp.passes"


@cache
def registry() -> dict[str, type[Pass]]:
    """This package's passes by their names: the dataclasses with a ``name`` in the modules of ``offramp.passes``."""
    import offramp.passes as room

    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(room.__path__):
        if not module.ispkg:
            for item in vars(importlib.import_module(f"offramp.passes.{module.name}")).values():
                if isinstance(item, type) and issubclass(item, Pass) and "name" in vars(item):
                    found[item.name] = item
    return dict(sorted(found.items()))


def pass_named(name: str) -> type[Pass]:
    """The pass of that name; of other packages' passes only the one that is asked for is imported.

    Raises:
        SpecError: there is none or there are several, or the package that brings it cannot be imported.
    """
    own, outside = registry().get(name), [point for point in entry_points(group=GROUP) if point.name == name]
    if own is not None and not outside:
        return own
    if len(outside) == 1 and own is None:
        return _loaded(outside[0])
    if outside:
        raise SpecError(
            f"there are several passes named {name!r}, in {', '.join(['offramp'] * bool(own) + _packages(outside))}",
            hint="uninstall one of the packages",
        )
    known = {*registry(), *(point.name for point in entry_points(group=GROUP))}
    raise SpecError(f"unknown pass {name!r}; there are {', '.join(sorted(known))}")


def _loaded(point: EntryPoint) -> type[Pass]:
    where = f"the pass {point.name!r} of {_packages([point])[0]} ({point.value})"
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{where} cannot be imported: {error}", hint="install the package again") from error
    if not isinstance(found, type) or not issubclass(found, Pass) or getattr(found, "name", None) != point.name:
        raise SpecError(f"{where} is no offramp.passes.Pass of that name", hint="ask the package's authors")
    return found


def _packages(points: list[EntryPoint]) -> list[str]:
    return [point.dist.name if point.dist is not None else "a package without a name" for point in points]

"""An MLP's hidden units in the order of its learners: copies of its weights, which the site reads from then on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from offramp.passes.infra.editor import Editor
from offramp.program.analysis.sites import Site
from offramp.program.graph import attribute, shape, weights

#: The weights of a site's gate, behind the site's prefix.
_GATE = tuple(f"gate.{layer}.{name}" for layer in (0, 1) for name in ("weight", "bias", "width"))


def ranked(site: Site, module: torch.nn.Module, order: str, hidden: Tensor | None) -> Tensor:
    """The hidden units, the most important ones first, int64 [units].

    By ``activation`` that is the mean square of a unit in ``hidden`` [tokens, units] times the squared norm of what it
    writes: what leaving it out adds to the error. By ``importance`` it is the norms of what it reads and writes.
    """
    units = site.last.features
    if order == "given":
        return torch.arange(units)
    weighs = site.importance(module)
    if order == "activation" and hidden is not None:
        weight = attribute(module, str(site.last.weight.target)).detach().float()
        written = weight.square().sum(site.last.units_axis)
        weighs = hidden.float().square().mean(0) * written
    return weighs.argsort(descending=True, stable=True)


def reorder(editor: Editor, site: Site, prefix: str, order: Tensor, copies: dict[Any, fx.Node]) -> None:
    """Let the site read copies of its weights, hidden units in this order.

    ``copies`` are those that have been made, by weight, axis of the units, and order: sites that share weights share
    them.
    """
    module, units = editor.module, site.last.features
    changed = [(item.reader, item.weight, item.units_axis) for item in site.first]
    changed += [(item.node, item.bias, 0) for item in site.first if item.bias is not None]
    for node in site.inner:
        changed += [(node, each, len(shape(each)) - 1) for each in weights(node) if shape(each)[-1:] == (units,)]
    changed.append((site.last.reader, site.last.weight, 1 - site.last.units_axis))
    for node, weight, axis in changed:
        target, key = str(weight.target), (weight.target, axis, *order.tolist())
        if key not in copies:
            taken = {copy.target for copy in copies.values()}
            name = f"{prefix}.units.{target}" if _of_gate(target) else f"{prefix}.{target}"
            name = name if name not in taken else f"{name}_{axis}"
            value = attribute(module, target)
            places = torch.cat([order + start for start in range(0, value.shape[axis], units)])
            make = editor.parameter if isinstance(value, torch.nn.Parameter) else editor.buffer
            copies[key] = make(name, value.detach().index_select(axis, places), editor[node.name])
        editor.replace_uses(editor[weight.name], copies[key], [editor[node.name]])


def _of_gate(target: str) -> bool:
    """Whether a gate's weight has that name, or lies in what has."""
    return any(f"{name}.".startswith(f"{target}.") for name in _GATE)

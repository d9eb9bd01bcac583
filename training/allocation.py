"""How many learners each token takes where all tokens together may cost so much, for the least error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Allocation(NamedTuple):
    """Choices, int64 ``[tokens]`` for each site: ``argmin error + price cost``, and that price, of one unit of cost."""

    choices: list[Tensor]
    price: Tensor


def allocate(errors: Sequence[Tensor], costs: Sequence[Tensor], share: float) -> Allocation:
    """The choices of least error that cost a share of the most that they may cost (a Lagrangian, by bisection).

    ``errors`` are ``[tokens, choices]`` for each site, ``costs`` ``[choices]`` of one token. The price is negative
    where more learners do worse than the share allows.
    """
    unit = max(float(cost.max()) for cost in costs)
    grouped: dict[tuple[float, ...], list[int]] = {}  # sites of equal costs are chosen for at once
    for place, cost in enumerate(costs):
        grouped.setdefault(tuple((cost / unit).tolist()), []).append(place)
    together = [torch.cat([errors[place] for place in places]) for places in grouped.values()]
    prices = [together[0].new_tensor(cost) for cost in grouped]
    allowed = share * torch.stack([len(error) * cost.max() for error, cost in zip(together, prices, strict=True)]).sum()
    step = min(float(cost.diff().min()) for cost in prices)
    high = torch.stack([error.max() for error in together if error.numel()]).max() / step + 1
    low = -high

    def chosen(price: Tensor) -> list[Tensor]:
        return [(error + price * cost).argmin(-1) for error, cost in zip(together, prices, strict=True)]

    for _ in range(50):
        middle = (low + high) / 2
        spent = torch.stack([cost[k].sum() for k, cost in zip(chosen(middle), prices, strict=True)]).sum()
        low, high = torch.where(spent > allowed, middle, low), torch.where(spent > allowed, high, middle)
    found: dict[int, Tensor] = {}
    for places, k in zip(grouped.values(), chosen(high), strict=True):
        found |= zip(places, k.split([len(errors[place]) for place in places]), strict=True)
    return Allocation([found[place] for place in range(len(errors))], high / unit)

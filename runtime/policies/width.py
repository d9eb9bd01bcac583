"""`Width`: how many of its learners each token takes, by what they may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import WIDTH, Manifest, Stack
from offramp.errors import PolicyError
from offramp.runtime.policies.base import Never, Policy, as_policy, make_plain


@dataclass(frozen=True, slots=True)
class Width(Policy):
    """Adaptive width (ACM, arXiv 2312.10193): of its learners a token takes as many as it needs.

    The bundle's gates decide; ``Width(0.4)`` tells them to take 40% of all learners on average, over the tokens and the
    blocks. Gates that are not trained give every token the number that is nearest to it, two of four learners. It is
    the outermost policy: ``Width(0.4, Confidence(0.9))`` lets rows leave early too.

    Attributes:
        budget: The share of the learners, 0 to 1. Other policies take 1, which is all; but for those that trained gates
            find to be worth nothing.
        exits: Which rows leave where, a policy or a function; None for full depth.

    Raises:
        PolicyError: a budget outside 0 to 1; in `run`, a bundle without learners, or a `Width` inside another policy.
    """

    budget: float
    exits: Policy | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.exits is not None:
            object.__setattr__(self, "exits", as_policy(self.exits))
        if not 0 <= self.budget <= 1:
            raise PolicyError(f"budget={self.budget}: a share of the learners, from 0 to 1")
        if isinstance(self.exits, Width):
            raise PolicyError(f"{self!r}: one width for all stacks", hint=f"Width({self.budget}, Never())")

    def check(self, stacks: Mapping[str, Stack]) -> None:
        raise PolicyError(f"{self!r} is inside another policy", hint=f"Width({self.budget}, ...) around it")

    def to_dict(self) -> dict[str, Any]:
        found = {"name": "width", "budget": self.budget}
        return found if self.exits is None else {**found, "exits": self.exits.to_dict()}


def parted(policy: Policy, manifest: Manifest) -> tuple[Policy, Mapping[str, NDArray[np.float32]]]:
    """The policy of exits, and the width as a value by its name, where the bundle has learners.

    Raises:
        PolicyError: it has none, and the policy is a `Width`.
    """
    exits, budget = (policy.exits or Never(), policy.budget) if isinstance(policy, Width) else (policy, 1.0)
    if exits is not policy and not manifest.learners:
        raise PolicyError(f"{policy!r}: this bundle has no learners", hint="insert-acm before export")
    return exits, {WIDTH: np.full(1, budget, np.float32)} if manifest.learners else {}

"""Policies as text: ``never``, ``depth:encoder=2``, ``confidence:0.9,measure=top1``."""

from __future__ import annotations

from typing import Any

from offramp.errors import PolicyError
from offramp.runtime.policies.base import Policy
from offramp.runtime.policies.builtin import NAMED, from_dict

SPECS = (
    "never, depth:2, depth:encoder=2, confidence:0.9, confidence:0.9,measure=margin, "
    "confidence:1=0.95,2=0.9, entropy:0.3, patience:2, learned:0.5, decay:0.9,tokens=64, shallowdeep:2,threshold=0.9, "
    "adaptive:2,target=0.99, verify:2,drafts=4, budget:3.5, budget:milliseconds=20, width:0.4, "
    "width:0.4,confidence:0.9"
)
# What a value without a name sets, by policy.
_FIRST = {
    "depth": "depth",
    "confidence": "threshold",
    "entropy": "threshold",
    "learned": "threshold",
    "decay": "threshold",
    "patience": "patience",
    "shallowdeep": "after",
    "adaptive": "after",
    "verify": "after",
    "budget": "blocks",
    "width": "budget",
}


def parse(text: str) -> Policy:
    """The policy that a text names.

    ``NAME:VALUE,KEY=VALUE,...``: of depth the keys are stacks, of others their options, or numbers of blocks with
    thresholds of their own. Behind a width may come the policy of exits: ``width:0.4,confidence:0.9,measure=top1``.

    Raises:
        PolicyError: there is no such policy, or it has no such option.
    """
    name, _, rest = text.strip().partition(":")
    data: dict[str, Any] = {"name": name}
    if name not in NAMED:
        return from_dict(data)  # which says what there is
    if name == "width":
        rest, _, exits = rest.partition(",")
        if _is_policy(exits):
            data["exits"] = parse(exits).to_dict()
        elif exits:
            rest = f"{rest},{exits}"
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, sign, value = (item.strip() for item in part.partition("="))
        if not sign:
            first = _FIRST.get(name)
            if first is None or first in data:
                raise _unreadable(text, f"{part!r} is one value too many")
            data[first] = _number(key, text)
        elif name == "depth":
            depths = data.setdefault("depth", {})
            if not isinstance(depths, dict):
                raise _unreadable(text, "a depth for all stacks, or one for each")
            depths[key] = _number(value, text)
        elif key.isdigit():
            data.setdefault("thresholds", {})[key] = _number(value, text)
        else:
            data[key] = value if key == "measure" else _number(value, text)
    if name in _FIRST and not data.keys() - {"name", "exits"}:
        raise _unreadable(text, f"{name} needs a value")
    return from_dict(data)


def _is_policy(text: str) -> bool:
    name, sign, _ = text.partition(",")[0].partition(":")
    return bool(sign) or name.strip() in NAMED


def _number(text: str, spec: str) -> int | float:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise _unreadable(spec, f"{text!r} is no number") from None


def _unreadable(text: str, why: str) -> PolicyError:
    return PolicyError(f"cannot read the policy {text!r}: {why}", hint=SPECS)

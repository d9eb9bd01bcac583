"""Policies: what turns scores into "leave" or "go on"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp._lazy import names_of

if TYPE_CHECKING:
    from offramp.runtime.policies.builtin import from_dict

__all__ = ["from_dict"]

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, {"builtin": ("from_dict",)})

"""Graphs are fp32's: autocast of a loop around a call would make other dtypes of the operators that it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


def without_autocast(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The function, in whatever autocast it is called."""

    @functools.wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return called

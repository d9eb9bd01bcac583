"""Sizes as expressions over axes: ``"batch"``, ``"2*tokens + 1"``, ``"max(tokens, 4)//2"``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

_LONGEST = 200
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}


def names(expression: int | str) -> frozenset[str]:
    """The axes that an expression is made of.

    Raises:
        ValueError: it holds something other than axes, whole numbers, ``+ - * // %``, max and min.
    """
    return frozenset() if isinstance(expression, int) else frozenset(_names(_parse(expression)))


def evaluate(expression: int | str, sizes: Mapping[str, int]) -> int:
    """The value of an expression; KeyError where ``sizes`` lacks an axis, ValueError as in `names`."""
    if isinstance(expression, int):
        return expression
    return sizes[expression] if expression in sizes else _value(_parse(expression), sizes)


def solve(expression: str, axis: str, size: int, sizes: Mapping[str, int]) -> int | None:
    """The length of ``axis`` for which an expression linear in it is ``size``; None where there is none."""
    if expression == axis:
        return size
    at = [evaluate(expression, {**sizes, axis: length}) for length in (1, 2)]
    slope = at[1] - at[0]
    length = 1 + (size - at[0]) // slope if slope else 1
    return length if evaluate(expression, {**sizes, axis: length}) == size else None


@lru_cache(maxsize=1024)
def multiple(expression: int | str, axis: str) -> int | None:
    """How many times the length of ``axis`` a size is, whatever that is; None where it is no multiple of it alone."""
    if isinstance(expression, int) or names(expression) != {axis}:
        return None
    try:
        at = [evaluate(expression, {axis: length}) for length in (1, 2, 5)]
    except ValueError:  # it divides by zero
        return None
    return at[0] if at[0] > 0 and at == [at[0], 2 * at[0], 5 * at[0]] else None


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression of more than {_LONGEST} characters: {expression[:40]}...")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        _names(tree)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an expression") from error
    return tree


def _names(node: ast.expr) -> set[str]:
    match node:
        case ast.Name(id=name):
            return {name}
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return set()
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _names(left) | _names(right)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _names(operand)
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as items, keywords=[]) if name in _FUNCTIONS:
            return set().union(*(_names(item) for item in items))
    raise ValueError(f"{ast.unparse(node)!r} is not made of axes, whole numbers, + - * // %, max and min")


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(operand=operand):
            return -_value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            divisor = _value(right, sizes)
            if divisor == 0 and isinstance(op, ast.FloorDiv | ast.Mod):
                raise ValueError(f"{ast.unparse(node)!r} divides by zero")
            return _OPERATORS[type(op)](_value(left, sizes), divisor)
        case ast.Call(func=ast.Name(id=name), args=items):
            return _FUNCTIONS[name](*(_value(item, sizes) for item in items))
    raise ValueError(f"{ast.unparse(node)!r} is not an expression over axes")

"""Refusals of what makes no sense; traced values, of which nothing is known, pass."""

import math
from collections.abc import Callable
from typing import Any

import jax

from mgaug_jax.types import Array, Role


def known(value: Any) -> float | None:
    """The value of a number, NaN for what is none, None for a traced one."""
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except jax.errors.ConcretizationTypeError:
        return None
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return math.nan


def check_rate(name: str, value: float | Array) -> None:
    """Refuses what is not a finite number of 0 or more.

    Raises:
      ValueError: It is not.
    """
    number = known(value)
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r} was asked for; take a number of 0 or more.")


def check_fraction(name: str, value: float | Array) -> None:
    """Refuses what is not a number in (0, 1].

    Raises:
      ValueError: It is not.
    """
    number = known(value)
    if number is not None and not 0 < number <= 1:
        raise ValueError(
            f"{name}={value!r} was asked for, but it is a fraction of weights kept; take a number "
            "in (0, 1]."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuses what is not an integer from `least` to a million million.

    Raises:
      ValueError: It is not.
    """
    if type(value) is not int or not least <= value <= 10**12:
        raise ValueError(f"{name}={value!r} was asked for; take an integer of {least} or more.")


def check_probability(name: str, value: float | Array, below_one: bool = True) -> None:
    """Refuses what is not a number in [0, 1), or in [0, 1].

    Raises:
      ValueError: It is not.
    """
    number = known(value)
    if number is not None and not (0 <= number < 1 or (number == 1 and not below_one)):
        end = ")" if below_one else "]"
        raise ValueError(f"{name}={value!r} was asked for; take a number in [0, 1{end}.")


def check_positive(name: str, value: float | Array) -> None:
    """Refuses what is not a finite number above 0.

    Raises:
      ValueError: It is not.
    """
    number = known(value)
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r} was asked for; take a number above 0.")


def check_function(name: str, value: Any, example: str) -> None:
    """Refuses what cannot be called.

    Raises:
      ValueError: It cannot.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function such as {example}, not {value!r}.")


def check_leaves(leaves: Callable[[Role], bool], roles: Any) -> None:
    """Refuses a choice among a network's leaves, by their roles, that chooses none.

    Raises:
      ValueError: It chooses none.
    """
    if not any(leaves(role) for role in jax.tree.leaves(roles)):
        raise ValueError(
            "leaves= chooses none of this network's parameters, so nothing would happen; choose by "
            "what Net.roles says (prunable, width, head, block), or leave it out."
        )


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuses what is not of a type.

    Raises:
      ValueError: It is not.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} such as {example}, not {value!r}.")

"""Which settings a sweep tries: `LR=log(0.001,0.1,5); STD=0,0.3,1` to a list of points.

All entry points share this; it holds no flags.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from experiments.cli import BadInput

DESIGNS = ("grid", "random", "sobol")
RANGE = re.compile(r"(log|linear)\(([^(),]+),([^(),]+)(?:,([^(),]+))?\)")


class Axis(NamedTuple):
    """A number that is varied.

    Attributes:
      name: What it is called in the spec, or `outer_lr`.
      values: Those that a grid takes; None if only a range is known.
      low, high: The range.
      log: Whether it is spread evenly on a logarithmic scale.
      listed: Whether its values were given one by one.
    """

    name: str
    values: list[float] | None
    low: float
    high: float
    log: bool
    listed: bool = False


def parse(text: str) -> list[Axis]:
    """The axes of `a=1,2; b=log(0.1,10,3); c=linear(0,1)`.

    Raises:
      BadInput: It cannot be read, or names something twice.
    """
    axes: dict[str, Axis] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name.isidentifier():
            raise BadInput(f"{part!r} is not name=values, as in STD=0,0.3 or LR=log(0.001,0.1,5).")
        if name in axes:
            raise BadInput(f"--values gives {name} twice.")
        try:
            axes[name] = _axis(name, value)
        except ValueError as error:
            raise BadInput(
                f"{part!r} is not a list of numbers, nor log(low,high,count) or "
                f"linear(low,high,count) of numbers, low below high ({error})."
            ) from error
    if not axes:
        raise BadInput("--values is missing; give it as in LR=log(0.001,0.1,5); STD=0,0.3,1.")
    return list(axes.values())


def _axis(name: str, value: str) -> Axis:
    if found := RANGE.fullmatch(value.replace(" ", "")):
        kind, low, high = found[1], float(found[2]), float(found[3])
        if not -math.inf < low < high < math.inf or (kind == "log" and low <= 0):
            raise ValueError("the range is empty")
        log, count = kind == "log", found[4] and int(found[4])
        if count is not None and count < 2:
            raise ValueError("it takes two values or more")
        spaced = np.geomspace if log else np.linspace
        return Axis(name, spaced(low, high, count).tolist() if count else None, low, high, log)
    values = [float(word) for word in value.split(",")]
    if not np.isfinite(values).all():
        raise ValueError("all must be finite")
    log = len(values) > 2 and min(values) > 0 and max(values) > 20 * min(values)
    return Axis(name, values, min(values), max(values), log, listed=True)


def points(axes: list[Axis], design: str, count: int, seed: int) -> list[dict[str, float]]:
    """The settings: every combination of the axes' values, or `count` points of their ranges.

    Raises:
      BadInput: The design is unknown, or an axis does not say what it needs.
    """
    if design not in DESIGNS:
        raise BadInput(f"--design={design} is none of {', '.join(DESIGNS)}.")
    if design == "grid":
        for axis in axes:
            if axis.values is None:
                raise BadInput(f"a grid needs the number of values of {axis.name}: log(a,b,n).")
        lists = [axis.values or [] for axis in axes]
        names = [axis.name for axis in axes]
        return [dict(zip(names, each, strict=True)) for each in itertools.product(*lists)]
    if count < 1:
        raise BadInput(f"--points={count} must be 1 or more for a {design} design.")
    for axis in axes:
        if axis.listed:
            raise BadInput(f"a {design} design needs a range of {axis.name}: log(a,b).")
    unit = _unit(len(axes), design, count, seed)
    return [
        {axis.name: _at(axis, where) for axis, where in zip(axes, row, strict=True)} for row in unit
    ]


def _unit(dimensions: int, design: str, count: int, seed: int) -> np.ndarray:
    """`count` points of the unit cube."""
    if design == "random":
        return np.random.default_rng(seed).random((count, dimensions))
    from scipy.stats import qmc

    sobol = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed))
    return sobol.random_base2(max(0, math.ceil(math.log2(count))))[:count]


def _at(axis: Axis, where: float) -> float:
    if axis.log:
        return float(axis.low * (axis.high / axis.low) ** where)
    return float(axis.low + (axis.high - axis.low) * where)

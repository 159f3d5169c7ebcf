"""Methods and networks as text: `fomaml(lr=0.01,steps=5)|cp(keep=0.98)`.

The first call names an algorithm, each further one a modifier, applied from left to right.
Arguments are literals. The same string is the flag, the log record and the table row. Numbers that
change over training (`cp(..., start=1000)`, `noise(..., schedule='linear')`) read the meta-step,
so a spec parses to a function `step -> Method`.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp

from experiments.cli import BadInput
from experiments.vocabulary import (
    ALGORITHMS,
    MODIFIERS,
    NETS,
    REQUIRED,
    WORDS,
    Clock,
    Entry,
    Problem,
)
from mgaug_jax.types import Array, Method, Modifier, Net


def method(
    text: str,
    problem: Problem,
    steps: int | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Callable[[Array], Method]:
    """`step -> Method` of a spec string, checked by building it once; with another number of inner
    `steps`, if given. Names in place of literals stand for `numbers`, which may be traced.

    Raises:
      BadInput: The text does not parse, a name or argument is unknown, a value is refused, or the
        algorithm cannot make so many steps.
    """
    calls = _parse(text, numbers)
    name, options = calls[0]
    _known(name, ALGORITHMS, "algorithm")
    for modifier, _ in calls[1:]:
        _known(modifier, MODIFIERS, "modifier")
    if steps is not None:
        arguments = ALGORITHMS[name].arguments
        if "steps" not in arguments or name == "lslr":
            raise BadInput(
                f"{steps} inner steps were asked for in tests, but {name} has no steps, or a "
                "learned rate for each; leave --test_steps out."
            )
        place = str(arguments.index("steps"))
        options = {key: value for key, value in options.items() if key != place} | {"steps": steps}

    def at(step: Array) -> Method:
        built = _build(ALGORITHMS, name, options, problem)
        for modifier, arguments in calls[1:]:
            clock = Clock(step, problem.steps, problem.pixels)
            built = _build(MODIFIERS, modifier, arguments, clock)(built)
        return built

    with _refusals(text):
        at(jnp.zeros((), jnp.int32))
    return at


def modifier(text: str, clock: Clock, **fixed: Any) -> Modifier:
    """The modifier of a spec of one call, with the arguments `fixed` in place of written ones.

    Raises:
      BadInput: As `method`.
    """
    calls = _parse(text)
    name, options = calls[0]
    _known(name, MODIFIERS, "modifier")
    if len(calls) > 1:
        raise BadInput(f"{text!r} names more than one modifier.")
    arguments = MODIFIERS[name].arguments
    written = {arguments[int(o)] if o.isdigit() and int(o) < len(arguments) else o for o in options}
    if both := written & fixed.keys():
        raise BadInput(f"{text}: leave {', '.join(sorted(both))} out, which is set elsewhere.")
    with _refusals(text):
        return _build(MODIFIERS, name, options | fixed, clock)


def spans_run(text: str) -> bool:
    """Whether a spec's numbers depend on how many meta-steps the run has."""
    for name, options in _parse(text)[1:]:
        arguments = MODIFIERS[name].arguments
        given = {arguments[int(o)] if o.isdigit() else o: value for o, value in options.items()}
        if name == "dsd" and not given.keys() >= {"start", "stop"}:
            return True
        if any(given.get(word, "constant") != "constant" for word in ("schedule", "ramp")):
            return True
    return False


def uses(text: str, name: str) -> bool:
    """Whether a modifier of that name is in a spec."""
    return any(called == name for called, _ in _parse(text)[1:])


def names(text: str) -> set[str]:
    """The names that stand in place of literals in a spec that parses as Python."""
    try:
        calls = [node for node in ast.walk(ast.parse(text.strip())) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    values = [v for call in calls for v in (*call.args, *(word.value for word in call.keywords))]
    return {value.id for value in values if isinstance(value, ast.Name)}


def net(text: str, **fixed: Any) -> Callable[[int | None], Net]:
    """`way -> Net` of a network's spec, for images of shape `fixed["image"]` or `inputs` numbers.

    Raises:
      BadInput: As `method`.
    """
    calls = _parse(text)
    name, options = calls[0]
    _known(name, NETS, "network")
    if len(calls) > 1:
        raise BadInput(f"{text!r} names more than one network.")
    if (name == "mlp") != ("inputs" in fixed):
        kind, takes = ("numbers", "mlp") if "inputs" in fixed else ("images", "conv4 or resnet10")
        raise BadInput(f"{name} was asked for, but the data are {kind}; take {takes}.")

    def make(way: int | None) -> Net:
        if name == "mlp":
            return _build(NETS, name, options, **fixed)
        return _build(NETS, name, options, way, **fixed)

    with _refusals(text):
        make(2)
    return make


@contextmanager
def _refusals(text: str) -> Iterator[None]:
    """Whatever the library refuses, as `BadInput` that quotes the text."""
    try:
        yield
    except BadInput:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise BadInput(f"{text}: {error}") from error


def _parse(text: str, numbers: Mapping[str, Any] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The calls of `a(...)|b(...)`: names, and arguments by name or position."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(
            f"{text!r} is not a spec; write it like fomaml(lr=0.01,steps=5)|cp(keep=0.98)."
        ) from error
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    return [_call(text, call, numbers or {}) for call in [node, *reversed(calls)]]


def _call(text: str, node: ast.expr, numbers: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or any(word.arg is None for word in call.keywords):
        raise BadInput(
            f"{_quote(node)} in {text!r} is not a name with arguments, like cp(keep=0.98)."
        )
    arguments = [(str(i), value) for i, value in enumerate(call.args)]
    arguments += [(str(word.arg), word.value) for word in call.keywords]
    options: dict[str, Any] = {}
    for name, value in arguments:
        if name in options:
            raise BadInput(f"{call.func.id} was given {name} twice.")
        if isinstance(value, ast.Name) and value.id in numbers:
            options[name] = numbers[value.id]
            continue
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise BadInput(
                f"{_quote(value)} in {text!r} is not a literal; give a number, a quoted "
                "word or a tuple of numbers."
            ) from error
    return call.func.id, options


def _quote(node: ast.expr) -> str:
    try:
        return repr(ast.unparse(node))
    except RecursionError:
        return "an argument, nested too deeply to be shown,"


def _known(name: str, entries: Mapping[str, Any], kind: str) -> None:
    if name not in entries:
        raise BadInput(f"{name!r} is no {kind}; known: {', '.join(sorted(entries))}.")


def _build(entries: Mapping[str, Entry], name: str, options: dict[str, Any], *given, **fixed):
    """Calls an entry, its words turned into the functions they stand for."""
    entry = entries[name]
    taken: dict[str, Any] = {}
    for written, value in options.items():
        argument = written
        if written.isdigit() and int(written) < len(entry.arguments):
            argument = entry.arguments[int(written)]
        if argument not in entry.arguments:
            known = ", ".join(entry.arguments) or "none"
            what = f"no argument {written!r}"
            if written.isdigit():
                what = f"at most {len(entry.arguments)} arguments"
            raise BadInput(f"{name} takes {what}; its arguments: {known}.")
        if argument in taken:
            raise BadInput(f"{name} was given {argument} twice.")
        words = WORDS.get(argument)
        if words is not None:
            if not isinstance(value, str) or value not in words:
                raise BadInput(f"{name}: {argument} is one of {', '.join(words)}, not {value!r}.")
            value = words[value]
        taken[argument] = value
    for argument, what in REQUIRED.items():
        if argument in entry.arguments and argument not in taken:
            raise BadInput(f"{name} needs {argument}, {what.format(name=name)}.")
    return entry.build(*given, **fixed, **taken)

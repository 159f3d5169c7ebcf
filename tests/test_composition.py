"""Every algorithm, pruner and change with every other: it traces, or is refused with a sentence."""

import functools
import itertools

import grid
import jax
import optax
import pytest
from conftest import make_tasks
from grid import ALGORITHMS, CHANGES, PRUNERS, reasons

from mgaug_jax import trainer
from mgaug_jax.modifiers import compose


def built(algorithm, pruner, names):
    """A pruner, then changes from left to right."""
    method = PRUNERS[pruner](grid.small(algorithm))
    return compose(*(CHANGES[name] for name in reversed(names)))(method)


def trace(method, algorithm):
    """A step keeps the state's shapes."""
    tasks = make_tasks(jax.random.key(1), 2, shape=(8, 8, 1))
    if algorithm == "regression":
        one = lambda part: part._replace(y=part.y[..., :1])
        tasks = tasks._replace(support=one(tasks.support), query=one(tasks.query))
    learner = trainer(method, optax.adam(1e-3))
    state = jax.eval_shape(learner.init, jax.random.key(0))
    after, info = jax.eval_shape(learner.step, jax.random.key(0), state, tasks)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert info["loss"].shape == ()


@functools.cache
def groups(algorithm) -> list[tuple[str, ...]]:
    """Compositions, as large as they can be, in which every two changes that go together are."""
    fits = lambda names: not reasons(algorithm, names)
    left = [pair for pair in itertools.combinations(CHANGES, 2) if fits(pair)]
    found = []
    while left:
        group = list(left[0])
        for name in CHANGES:
            if name not in group and fits([*group, name]):
                group.append(name)
        found.append(tuple(name for name in CHANGES if name in group))
        left = [pair for pair in left if not set(pair) <= set(group)]
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_makes_no_sense_is_refused_at_construction_and_nothing_else(algorithm, pruner):
    """Every change alone and every two in either order: no step is needed to hear it."""
    base = PRUNERS[pruner](grid.small(algorithm))
    for names in [*((name,) for name in CHANGES), *itertools.permutations(CHANGES, 2)]:
        why = reasons(algorithm, names)
        change = compose(*(CHANGES[name] for name in reversed(names)))
        if not why:
            change(base)
            continue
        says = "|".join(grid.REFUSALS[reason] for reason in why)
        with pytest.raises(ValueError, match=rf"(?s)({says}).*\.$"):
            change(base)


@pytest.mark.parametrize("second", list(CHANGES)[1:])
def test_every_pair_of_changes_traces(second):
    """Alone together, on second-order MAML with CP, or on a regression where that is meant."""
    for first in itertools.takewhile(lambda name: name != second, CHANGES):
        algorithm = "regression" if "shift" in (first, second) else "maml"
        if not reasons(algorithm, (first, second)):
            trace(built(algorithm, "cp", (first, second)), algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_change_traces_with_every_algorithm(algorithm):
    """All at once that go together."""
    for names in groups(algorithm):
        trace(built(algorithm, "none", names), algorithm)
    alone = {name for name in CHANGES if not reasons(algorithm, (name,))}
    assert alone == set().union(*groups(algorithm))


@pytest.mark.parametrize("pruner", ["wp", "pp"])
def test_every_change_traces_over_every_other_pruner(pruner):
    for names in groups("maml"):
        trace(built("maml", pruner, names), "maml")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_full_grid_traces(algorithm, pruner):
    """Every two changes in some composition; the other way round than above, the pruner last."""
    for names in groups(algorithm):
        method = compose(PRUNERS[pruner], *(CHANGES[name] for name in names))
        trace(method(grid.small(algorithm)), algorithm)

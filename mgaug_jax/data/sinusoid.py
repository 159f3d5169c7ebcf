"""Sinusoid regression, with and without mutually exclusive tasks.

`sampler` is Finn's problem (2017), in which no two tasks agree on a target. `one_hot_sampler` is
that of MR-MAML (Yin et al. 2020): the amplitude comes from a grid and its index is an input, so a
network can answer from memory; `one_hot_test_sampler` tests with amplitudes off the grid and an
index that says nothing. `interval_sampler` is that of meta-augmentation (Rajendran et al. 2020):
ten fixed functions, each on an interval of its own, so that the input names the task.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_count
from mgaug_jax.types import Array, Examples, Task

Sample = Callable[[Array, Any], Task]
AMPLITUDES = 20
"""Size of the grid `linspace(0.1, 4, 20)`, and of the one-hot part of the inputs."""
NOISE = 0.1
"""Standard deviation of the noise on one-hot training targets and on the support of tests."""
STARTS = (4, -1, -2, 1, 3, -3, -5, 2, 0, -4)
"""Where the intervals of the ten functions begin; each is half a unit long."""
INTERVALS = {"train": (0, 1, 2, 3, 4, 5), "val": (6, 7), "test": (8, 9)}
"""Split -> its functions."""
GRID = 200
"""Query points of a one-hot test, equally spaced in [-4.5, 4.5]."""


def sample_task(key: Array, shot: int, queries: int) -> Task:
    """One task: `y = A sin(x - phase)` for `x [n, 1]` in [-5, 5), A in [0.1, 5), phase in [0, pi);
    n is `shot` for the support and `queries` for the query.
    """
    k_amplitude, k_phase, k_x = jax.random.split(key, 3)
    amplitude = jax.random.uniform(k_amplitude, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(k_phase, maxval=jnp.pi)
    x = jax.random.uniform(k_x, (shot + queries, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return Task(Examples(x[:shot], y[:shot]), Examples(x[shot:], y[shot:]))


def sample_one_hot_task(key: Array, shot: int, queries: int) -> Task:
    """One non-exclusive task: `y = A_i sin(x) + N(0, 0.1^2)`, A_i the i-th of 20 amplitudes, inputs
    `(x, one-hot of i)` `[n, 21]`.
    """
    k_index, k_x, k_noise = jax.random.split(key, 3)
    index = jax.random.randint(k_index, (), 0, AMPLITUDES)
    x = jax.random.uniform(k_x, (shot + queries, 1), minval=-5.0, maxval=5.0)
    y = jnp.linspace(0.1, 4, AMPLITUDES)[index] * jnp.sin(x)
    y = y + NOISE * jax.random.normal(k_noise, y.shape)
    x = _with_index(x, index)
    return Task(Examples(x[:shot], y[:shot]), Examples(x[shot:], y[shot:]))


def sample_one_hot_test(key: Array, shot: int) -> Task:
    """A test task: A from U(0.1, 4), a random index; noise on the support alone, and the query is a
    fixed grid, so that a perfect learner has error 0.
    """
    k_amplitude, k_index, k_x, k_noise = jax.random.split(key, 4)
    amplitude = jax.random.uniform(k_amplitude, minval=0.1, maxval=4.0)
    index = jax.random.randint(k_index, (), 0, AMPLITUDES)
    x = jax.random.uniform(k_x, (shot, 1), minval=-5.0, maxval=5.0)
    grid = jnp.linspace(-4.5, 4.5, GRID)[:, None]
    y = amplitude * jnp.sin(x) + NOISE * jax.random.normal(k_noise, x.shape)
    query = Examples(_with_index(grid, index), amplitude * jnp.sin(grid))
    return Task(Examples(_with_index(x, index), y), query)


def interval_functions() -> tuple[Array, Array]:
    """Amplitudes U(0.1, 5) and phases U(0, pi) `[10]`, drawn once and for all (the source's own
    draws cannot be had again: they come of another generator).
    """
    k_amplitude, k_phase = jax.random.split(jax.random.key(0))
    shape = (len(STARTS),)
    amplitudes = jax.random.uniform(k_amplitude, shape, minval=0.1, maxval=5.0)
    return amplitudes, jax.random.uniform(k_phase, shape, maxval=jnp.pi)


def sample_interval_task(key: Array, functions: Array, shot: int, queries: int) -> Task:
    """A task of one of `functions` (their numbers): `y = A_i sin(x - phase_i)`, x uniform over
    `[s_i, s_i + 0.5)`, in support and query.
    """
    k_index, k_x = jax.random.split(key)
    index = jax.random.choice(k_index, functions)
    amplitudes, phases = interval_functions()
    x = jnp.array(STARTS, float)[index] + 0.5 * jax.random.uniform(k_x, (shot + queries, 1))
    y = amplitudes[index] * jnp.sin(x - phases[index])
    return Task(Examples(x[:shot], y[:shot]), Examples(x[shot:], y[shot:]))


def move_targets(key: Array, task: Task) -> Task:
    """The task with all its targets 1 higher or 1 lower, the same in support and query."""
    by = 2.0 * jax.random.bernoulli(key) - 1
    return Task(*(part._replace(y=part.y + by) for part in task))


def _with_index(x: Array, index: Array) -> Array:
    one_hot = jax.nn.one_hot(index, AMPLITUDES, dtype=x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(one_hot, (len(x), AMPLITUDES))], axis=1)


def permute_index(key: Array, task: Task) -> Task:
    """The task with the index in its inputs shifted cyclically by a random number in 1..19."""
    shift = jax.random.randint(key, (), 1, AMPLITUDES)

    def shifted(part: Examples) -> Examples:
        index = jnp.roll(part.x[:, 1:], shift, axis=1)
        return part._replace(x=jnp.concatenate([part.x[:, :1], index], axis=1))

    return Task(*map(shifted, task))


def sampler(shot: int, queries: int, tasks: int) -> Sample:
    """`sample(key, data) -> tasks`, a meta-batch with leading axis T; `data` is not looked at. Task
    t depends on t and the key alone.

    Raises:
      ValueError: A size is not a positive integer.
    """
    return _batch(sample_task, tasks, shot=shot, queries=queries)


def one_hot_sampler(shot: int, queries: int, tasks: int) -> Sample:
    """As `sampler`, of `sample_one_hot_task`."""
    return _batch(sample_one_hot_task, tasks, shot=shot, queries=queries)


def one_hot_test_sampler(shot: int, tasks: int) -> Sample:
    """As `sampler`, of `sample_one_hot_test`."""
    return _batch(sample_one_hot_test, tasks, shot=shot)


def interval_sampler(shot: int, queries: int, tasks: int) -> Sample:
    """As `sampler`, of `sample_interval_task`; `data` are the numbers of a split's functions, as in
    `jnp.array(INTERVALS["train"])`, which are drawn with replacement. Validation and test have two
    each: an interval over their episodes says nothing of other functions.
    """
    return _batch(sample_interval_task, tasks, True, shot=shot, queries=queries)


def _batch(one: Callable[..., Task], tasks: int, takes_data: bool = False, **sizes: int) -> Sample:
    for name, value in {**sizes, "tasks": tasks}.items():
        check_count(name, value)

    def sample(key: Array, data: Any = None) -> Task:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(tasks))
        given = (data,) if takes_data else ()
        return jax.vmap(lambda key: one(key, *given, **sizes))(keys)

    return sample

"""Sinusoid regression (Finn et al., 2017), mutually exclusive: no two tasks agree on a target."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_count
from mgaug_jax.types import Array, Examples, Task


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


def sampler(shot: int, queries: int, tasks: int) -> Callable[[Array, Any], Task]:
    """`sample(key, data) -> tasks`, a meta-batch with leading axis T; `data` is not looked at. Task
    t depends on t and the key alone.

    Raises:
      ValueError: A size is not a positive integer.
    """
    for name, value in (("shot", shot), ("queries", queries), ("tasks", tasks)):
        check_count(name, value)

    def sample(key: Array, data: Any = None) -> Task:
        del data
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(tasks))
        return jax.vmap(lambda key: sample_task(key, shot, queries))(keys)

    return sample

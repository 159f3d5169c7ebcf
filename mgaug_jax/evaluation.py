"""Meta-test: the full network, unpruned and, unless asked, unperturbed, on many episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_count
from mgaug_jax.losses import accuracy
from mgaug_jax.sharding import over_tasks
from mgaug_jax.types import Array, MetaParams, Method, Task


class Scores(NamedTuple):
    """Query scores, one per episode `[E]`.

    Attributes:
      adapted: After the inner loop.
      initial: Before its first step (step 0). For ProtoNet, which has no steps, the same.
    """

    adapted: Array
    initial: Array


class Interval(NamedTuple):
    """A mean, the half width of its interval, the standard deviation and number of episodes."""

    mean: Array
    half_width: Array
    std: Array
    episodes: int


def interval(scores: Array, z: float = 1.96, group: int = 1) -> Interval:
    """`mean +- z std / sqrt(E)` over episodes `[E]`, std with E in the denominator (released code);
    95 % for z = 1.96, one standard error, of which MGAug's text speaks, for 1.

    With `group` of g, E and std are of means of g episodes each, in their order. For the same
    episodes that hardly moves the interval, while std is about 1 / sqrt(g) of that of episodes. The
    released code tests gradient-based methods on 601 batches of 4, so on four times as many.

    Raises:
      ValueError: The episodes are no whole number of groups.
    """
    check_count("group", group)
    if len(scores) % group:
        raise ValueError(f"{len(scores)} episodes make no groups of {group}; give a divisor.")
    means = jnp.mean(scores.reshape(-1, group), axis=1)
    std = jnp.std(means)
    return Interval(jnp.mean(means), z * std / len(means) ** 0.5, std, len(scores))


def evaluate(
    method: Method,
    key: Array,
    params: MetaParams,
    sample: Callable[[Array, Any], Task],
    data: Any,
    episodes: int | Array,
    score: Callable[[Array, Array], Array] = accuracy,
) -> Scores:
    """Scores of `episodes` tasks; episode e is `sample(fold_in(key, e), data)`.

    Args:
      method: Only its network, its algorithm and `test` are used, what is done to the gradients at
        meta-test: nothing, unless the method was told to.
      key: Seed of the episodes. The same key, sampler and data give the same episodes whatever
        the method, so that two runs can be compared pair by pair.
      params: Meta-parameters.
      sample: Gives tasks with a leading axis, of which the first is taken.
      data: What `sample` draws from.
      episodes: E for episodes 0..E-1, or their numbers `[E]`.
      score: `(outputs [n, d], y [n, d]) -> scalar`.
    """
    learner = method.algorithm(method.net, method.test)

    def episode(given: tuple[Array, MetaParams, Any], e: Array) -> Scores:
        key, params, data = given
        k_sample, k_adapt = jax.random.split(jax.random.fold_in(key, e))
        task = jax.tree.map(lambda leaf: leaf[0], sample(k_sample, data))
        judge = lambda fast: score(learner.predict(fast, task.query.x), task.query.y)
        return Scores(
            adapted=judge(learner.adapt(k_adapt, params, task.support)),
            initial=judge(learner.start(params, task.support)),
        )

    numbers = jnp.arange(episodes) if isinstance(episodes, int) else episodes
    return over_tasks(method, episode, (key, params, data), numbers)

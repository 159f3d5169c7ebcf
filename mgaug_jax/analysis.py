"""Does a perturbation do what its paper says? What a trained method's losses and gradients show.

Pure functions of meta-parameters and a batch of tasks; nothing here trains.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.meta import task_keys, view
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, MetaParams, Method, Task
from mgaug_jax.weighting import cosine


def between(a: MetaParams, b: MetaParams, at: Array) -> MetaParams:
    """`(1 - at) a + at b`."""
    return jax.tree.map(lambda x, y: (1 - at) * x + at * y, a, b)


def line_losses(
    method: Method, key: Array, a: MetaParams, b: MetaParams, tasks: Task, at: Array
) -> Array:
    """Query loss after unperturbed adaptation, mean over tasks, at points `at [L]` of the line from
    `a` (0) to `b` (1); `[L]`. A rise between the two means two optima.
    """
    learner = method.algorithm(method.net, method.test)

    def point(where: Array) -> Array:
        params = between(a, b, where)

        def one(key: Array, task: Task) -> Array:
            fast = learner.adapt(key, params, task.support)
            return learner.loss(learner.predict(fast, task.query.x), task.query.y)

        return jnp.mean(map_tasks(method.net, one, task_keys(key, tasks), tasks))

    return jax.lax.map(point, at)


def barrier(losses: Array) -> Array:
    """How far the largest loss `[L]` lies above the higher of its ends: 0 on a mere slope."""
    return jnp.max(losses) - jnp.maximum(losses[0], losses[-1])


class Diversity(NamedTuple):
    """How much tasks differ, and how sure the learner is, under a method's inner perturbation.

    Attributes:
      spread: Share of the task gradients' squared length that tasks do not share,
        `1 - mean_{i != j} <g_i, g_j> / mean_i |g_i|^2`: 0 for equal gradients, 1 in expectation for
        independent ones of mean 0.
      cosine: Mean cosine of two different tasks' gradients.
      entropy: Mean entropy of the query predictions after adaptation, in nats; NaN for outputs
        that are not classes.
    """

    spread: Array
    cosine: Array
    entropy: Array


def diversity(method: Method, key: Array, params: MetaParams, tasks: Task) -> Diversity:
    """`Diversity` over T tasks, each perturbed by `method.inner` as in training."""

    def one(key: Array, task: Task):
        seen = view(method, key, params, task)
        log_p = jax.nn.log_softmax(seen.logits)
        return seen.grads, -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))

    grads, entropy = map_tasks(method.net, one, task_keys(key, tasks), tasks)
    count = len(entropy)
    pairs_of = count * (count - 1)
    energy = optax.tree.norm(grads, squared=True)
    total = jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)
    shared = (optax.tree.norm(total, squared=True) - energy) / pairs_of
    pairs = jax.vmap(lambda a: jax.vmap(lambda b: cosine(a, b))(grads))(grads)
    classes = tasks.query.y.shape[-1] > 1
    return Diversity(
        spread=1 - shared / (energy / count),
        cosine=(jnp.sum(pairs) - jnp.trace(pairs)) / pairs_of,
        entropy=jnp.mean(entropy) if classes else jnp.full((), jnp.nan),
    )


def similarity_and_gain(
    method: Method,
    key: Array,
    params: MetaParams,
    tasks: Task,
    stored: MetaParams,
    test: Task,
    rate: float | Array,
    similarity: Callable[[MetaParams, MetaParams], Array] = cosine,
) -> tuple[Array, Array]:
    """For each of T training tasks: similarity of its gradient to the stored one, and how much the
    test task's query loss after adaptation falls by one meta-step of length `rate` along that
    gradient alone. Feedback supposes that the two go together.

    Args:
      method: Its network and algorithm; training perturbations take no part.
      key: Randomness of the inner loops.
      params: Meta-parameters.
      tasks: Training tasks, leaves `[T, ...]`.
      stored: The test task's gradient, as one row of `probe_gradients`.
      test: The test task. Its query is looked at, to judge.
      rate: Length of the step: gradients are normalised to 1.
      similarity: Of two gradients, a scalar.

    Returns:
      Similarities `[T]` and gains `[T]`.
    """
    plain = method._replace(inner=method.test, judge=None)
    k_tasks, k_test = jax.random.split(key)
    loss = lambda params: view(plain, k_test, params, test).loss
    before = loss(params)

    def one(key: Array, task: Task):
        grads = view(plain, key, params, task).grads
        length = rate / optax.tree.norm(grads)
        moved = jax.tree.map(lambda w, g: w - length * g, params, grads)
        return similarity(grads, stored), before - loss(moved)

    return map_tasks(method.net, one, task_keys(k_tasks, tasks), tasks)


def settling(losses: Array, window: int, within: float = 0.1) -> tuple[Array, Array]:
    """Convergence of a loss curve `[S]`: the first step whose running mean over `window` steps is
    within `within` of the way from the first such mean to the last, and the instability, the
    standard deviation of the last half around its running mean.
    """
    kernel = jnp.ones(window) / window
    smooth = jnp.convolve(losses, kernel, mode="valid")
    near = jnp.abs(smooth - smooth[-1]) <= within * jnp.abs(smooth[0] - smooth[-1])
    away = jnp.where(near, -1, jnp.arange(len(near)))
    first = jnp.max(away) + 1  # settled for good, not merely passing by
    half = len(smooth) // 2
    centre = losses[window // 2 : window // 2 + len(smooth)]
    return first, jnp.std((centre - smooth)[half:])


def drift(gradients: MetaParams, points: MetaParams) -> tuple[Array, Array]:
    """How the direction of the meta-gradient drifts along P points of training.

    Args:
      gradients: Meta-gradients of the same tasks at the points, leaves `[P, ...]`.
      points: The meta-parameters there.

    Returns:
      Cosines `[P - 1]`: of a gradient to that at the point before, and of every move between two
      points to minus the gradient where it starts (1: straight downhill).
    """
    part = lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)
    before = part(gradients, slice(None, -1))
    moves = jax.tree.map(lambda leaf: leaf[:-1] - leaf[1:], points)
    return jax.vmap(cosine)(part(gradients, slice(1, None)), before), jax.vmap(cosine)(
        moves, before
    )

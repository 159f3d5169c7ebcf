"""Feedback from meta-test to meta-train (Gogoi, Tiwari, Verma 2024).

The gradients of test tasks are stored; training tasks whose gradients point the same way weigh more
in the meta-gradient. The source says no more than that, so all else is our reading: cosine of the
whole flattened gradients, weights of mean 1, gradients of the adapted network on the *support* set
of the test task: its meta-gradient, through the inner loop for second-order methods. A test task's
query labels are what it is judged by: `on_query` uses them, and is a leak.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_function, check_positive
from mgaug_jax.meta import task_keys, view
from mgaug_jax.sharding import over_tasks
from mgaug_jax.types import Array, MetaParams, Method, Modifier, Task

Weights = Callable[[Array], Array]
"""`similarities [T] -> weights [T]` of mean 1."""


def on_support(task: Task) -> Task:
    """The task judged by the examples it adapts on: nothing of its query is looked at."""
    return Task(task.support, task.support)


def on_query(task: Task) -> Task:
    """The task judged by its query: a leak of the labels it will be tested by."""
    return task


def probe_gradients(
    method: Method,
    key: Array,
    params: MetaParams,
    tasks: Task,
    judge: Callable[[Task], Task] = on_support,
) -> MetaParams:
    """Meta-gradients of P test tasks, one by one, `[P, ...]`: adapted by the full network as at
    meta-test, then judged as `judge` says.

    Args:
      method: Its network and algorithm; sub-networks and training perturbations take no part.
      key: Randomness of the inner loops.
      params: Meta-parameters.
      tasks: Leaves `[P, ...]`.
      judge: `on_support`, or `on_query` (a leak).
    """
    plain = method._replace(inner=method.test, judge=None)

    def one(params: MetaParams, key: Array, task: Task) -> MetaParams:
        return view(plain, key, params, judge(task)).grads

    return over_tasks(method, one, params, task_keys(key, tasks), tasks)


def cosine(a: MetaParams, b: MetaParams) -> Array:
    """`<a, b> / (|a| |b|)` of two trees, each as one flat vector; 0 if either is 0.

    Raises:
      ValueError: The trees differ.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            "The stored gradients are of other parameters than the method has; take them by "
            "probe_gradients of the whole method, mr_weights and the like included."
        )
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(norms > 0, optax.tree.vdot(a, b) / norms, 0)


def softmax_weights(temperature: float | Array = 0.1) -> Weights:
    """Weights `T softmax(c / temperature)`: equal as the temperature grows, the most similar task
    alone as it goes to 0. It may be traced.

    Raises:
      ValueError: `temperature` is not a number above 0.
    """
    check_positive("temperature", temperature)
    return lambda similarities: len(similarities) * jax.nn.softmax(similarities / temperature)


def rectified_weights(similarities: Array) -> Array:
    """`relu(c)` divided by its mean; equal weights where no task is similar."""
    positive = jax.nn.relu(similarities)
    mean = jnp.mean(positive)
    return jnp.where(mean > 0, positive / mean, 1)


def feedback(
    stored: MetaParams,
    *,
    weights: Weights | None = None,
    similarity: Callable[[MetaParams, MetaParams], Array] = cosine,
) -> Modifier:
    """Weighs training tasks by the similarity of their gradients to those of test tasks.

    `(1/T) sum_t w_t g_t`, `g_t` the gradient of task t with its sub-networks, `w_t` the mean over
    the P test tasks of `weights(similarity to test task p)`.

    Args:
      stored: `probe_gradients(...)`, leaves `[P, ...]`; may be traced, so that refreshing it
        compiles nothing again.
      weights: `softmax_weights(temperature)` (default, at .1), or `rectified_weights`.
      similarity: Of two gradients, a scalar.

    Raises:
      ValueError: Feedback was asked for twice, or no function is given where one belongs.
    """
    weights = softmax_weights() if weights is None else weights
    check_function("weights", weights, "weighting.softmax_weights()")
    check_function("similarity", similarity, "weighting.cosine")

    def weigh(addends: MetaParams) -> Array:
        task_gradients = jax.tree.map(lambda leaf: len(leaf) * leaf, addends)

        def one(test_gradient: MetaParams) -> Array:
            return weights(jax.vmap(lambda g: similarity(g, test_gradient))(task_gradients))

        return jnp.mean(jax.vmap(one)(stored), axis=0)

    def modify(method: Method) -> Method:
        if method.weigh is not None:
            raise ValueError(
                "Feedback was asked for twice, but tasks have one weight each. Stack the stored "
                "gradients of all test tasks and give them to one feedback."
            )
        return method._replace(weigh=weigh)

    return modify

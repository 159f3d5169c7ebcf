"""TAML (Jamal, Qi 2019): an initial network that favours no task.

Either its predictions are unsure before adaptation and sure after it (entropy), or its losses on
the tasks of a batch are alike (inequality, by indices from economics). Both concern the full
network before its first inner step; sub-networks take no part. The source was not at hand: that
losses and predictions are those of the query is our reading, and so is the default index (Theil).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_function, check_rate, known
from mgaug_jax.losses import squared_error
from mgaug_jax.types import Array, Learner, MetaParams, Method, Modifier, Task, Term

Index = Callable[[Array], Array]
"""`losses [T] -> scalar`: 0 where all are equal, and the same at any scale."""
LEAST = 1e-6
"""Losses are clamped to at least this."""


# --- indices --------------------------------------------------------------------------------


def generalised_entropy(a: float) -> Index:
    """`GE(a) = mean((l / mean l)^a - 1) / (a (a - 1))`; its limits are Theil's index at a = 1 and
    the mean log deviation `-mean ln(l / mean l)` at 0.

    Raises:
      ValueError: `a` is not a finite number.
    """
    if not math.isfinite(math.nan if (number := known(a)) is None else number):
        raise ValueError(f"a={a!r} was asked for; take a finite number, as 1 for Theil's index.")

    def index(losses: Array) -> Array:
        share = losses / jnp.mean(losses)
        if a == 1:
            return jnp.mean(share * jnp.log(share))
        if a == 0:
            return -jnp.mean(jnp.log(share))
        return jnp.mean(share**a - 1) / (a * (a - 1))

    return index


theil = generalised_entropy(1)
"""`mean((l / mean l) ln(l / mean l))`."""


def atkinson(aversion: float) -> Index:
    """`1 - (mean l^(1 - eps))^(1 / (1 - eps)) / mean l`, eps the `aversion`; at 1 its limit,
    `1 - (geometric mean) / mean l`.

    Raises:
      ValueError: `aversion` is negative or not a number (nor may it be traced).
    """
    check_rate("aversion", aversion)
    if known(aversion) is None:
        raise ValueError(f"aversion={aversion!r} chooses a formula; take a number, such as 0.5.")

    def index(losses: Array) -> Array:
        share = losses / jnp.mean(losses)
        if aversion == 1:
            return 1 - jnp.exp(jnp.mean(jnp.log(share)))
        return 1 - jnp.mean(share ** (1 - aversion)) ** (1 / (1 - aversion))

    return index


def gini(losses: Array) -> Array:
    """`sum_ij |l_i - l_j| / (2 T sum l)`."""
    pairs = jnp.abs(losses[:, None] - losses)
    return jnp.sum(pairs) / (2 * len(losses) * jnp.sum(losses))


def log_variance(losses: Array) -> Array:
    """`mean (ln l - mean ln l)^2`."""
    return jnp.var(jnp.log(losses))


# --- modifiers ------------------------------------------------------------------------------


def inequality(weight: float | Array, *, index: Index = theil) -> Modifier:
    """TAML by inequality: the objective plus `weight index(losses of the initial network)`, of the
    query (our reading), each at least 1e-6 (ours).

    Args:
      weight: lambda; 0 leaves the method as it is. May be traced.
      index: `theil`, `generalised_entropy(a)`, `atkinson(eps)`, `gini` or `log_variance`.

    Raises:
      ValueError: `weight` is negative or not a number, or `index` no function.
    """
    check_function("index", index, "taml.theil")

    def measure(key: Array, learner: Learner, params: MetaParams, task: Task) -> Array:
        del key
        outputs = learner.predict(learner.start(params, task.support), task.query.x)
        return learner.loss(outputs, task.query.y)

    return _term(weight, measure, lambda losses: index(jnp.maximum(losses, LEAST)))


def entropy(weight: float | Array) -> Modifier:
    """TAML by entropy: the objective plus `weight (H(adapted) - H(initial))`, H the mean entropy of
    the predictions of the query (our reading) in nats. Where the inner loop is random (noise,
    `mr_weights`), the adapted network is another draw of it than the one whose loss counts.

    Raises:
      ValueError: `weight` is negative or not a number, the method has no inner steps, or its loss
        is the squared error or (at the first step) its outputs are no classes.
    """
    none = (
        "The entropy of predictions was asked for, but these outputs are no classes; use the "
        "inequality form of TAML."
    )

    def measure(key: Array, learner: Learner, params: MetaParams, task: Task) -> Array:
        def of(fast: Any) -> Array:
            outputs = learner.predict(fast, task.query.x)
            if outputs.shape[-1] < 2:
                raise ValueError(none)
            log_p = jax.nn.log_softmax(outputs)
            return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))

        adapted = learner.adapt(key, params, task.support)
        return of(adapted) - of(learner.start(params, task.support))

    add = _term(weight, measure, jnp.mean)

    def modify(method: Method) -> Method:
        learner = method.algorithm(method.net, method.inner)
        if learner.loss is squared_error:
            raise ValueError(none)
        if learner.path is None:
            raise ValueError(
                "TAML by entropy compares predictions before and after the inner loop, but "
                "protonet has none; use the inequality form, or maml."
            )
        return add(method)

    return modify


def _term(weight: float | Array, measure, combine: Index) -> Modifier:
    check_rate("weight", weight)

    def modify(method: Method) -> Method:
        if known(weight) == 0:
            return method
        term = Term(measure, lambda values: weight * combine(values))
        return method._replace(terms=(*method.terms, term))

    return modify

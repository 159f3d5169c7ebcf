"""PAC-Bayes bounds on the error of pruned meta-learners: MGAug's Theorem 1 (Eq. 8), term by term.

With probability 1 - delta over T tasks of m_t samples each, the expected error on a new task is at
most `empirical + environment + task` (`meta_bound`). All divergences are in nats, all errors are
0-1 or otherwise in [0, 1], and every number may be traced.

The theorem needs more care than its statement takes (`mgaug_jax.divergences` has the terms):

- `(1 - rho)/2 |omega_t|^2` is a divergence only if prior and posterior share one law of masks that
  has not seen the task: PP and WP. The mask of CP is chosen by the task's own samples and has to be
  paid for (`catfish_kl`); the printed term without that price is a diagnostic, not a bound.
- It supposes that Gaussian noise is added to the kept weights. The error of the noise-free network
  is not the bound's empirical term (`pruned_errors` is).
- It draws the prior from the hyper-posterior and yet centres it at 0. Centred at 0 there is nothing
  to learn at the hyper level (`no_hyper_kl`); around the meta-parameters, see `centred_kl`.
- One sub-network and one fixed rate are assumed, T counts independent tasks, and priors and
  hyper-prior must not depend on the tasks that the bound is evaluated on.
- Batch norm leaves the scale of a kernel arbitrary, so its norm says little by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgaug_jax.checks import check_count, check_rate, known
from mgaug_jax.divergences import Number
from mgaug_jax.losses import accuracy
from mgaug_jax.types import Array, Examples, Net, Params

# --- the empirical error --------------------------------------------------------------------


def pruned_errors(
    key: Array,
    net: Net,
    weights: Params,
    masks: Callable[[Array], Params],
    examples: Examples,
    std: Number = 1.0,
    draws: int = 16,
) -> Array:
    """0-1 errors on one task's samples of networks `s (w + std eps)`, one of each draw: `[draws]`.

    Args:
      key: Randomness of masks and noise.
      net: The network.
      weights: Posterior mean, the same whatever the mask: the learner adapts first, then prunes.
      masks: `key -> mask`, a draw of the law that the divergence supposes; for CP the task's mask,
        whatever the key.
      examples: All samples that the bound counts.
      std: Of the noise.
      draws: Number of networks.
    """
    check_rate("std", std)
    check_count("draws", draws)

    def error(key: Array) -> Array:
        k_mask, k_noise = jax.random.split(key)
        noise = optax.tree.random_like(k_noise, weights, jax.random.normal)
        drawn = jax.tree.map(lambda m, w, e: m * (w + std * e), masks(k_mask), weights, noise)
        return 1 - accuracy(net.apply(drawn, examples.x), examples.y)

    return jax.lax.map(error, jax.random.split(key, draws))


class Estimate(NamedTuple):
    """A mean and the ends of its interval."""

    mean: Array
    low: Array
    high: Array


def monte_carlo(errors: Array, delta: Number = 0.01) -> Estimate:
    """Mean of independent errors in [0, 1] of any shape, with Hoeffding's interval.

    It covers the expectation with probability 1 - delta (`high` alone: 1 - delta/2). With `high` as
    its empirical term a bound fails with probability delta/2 more.
    """
    _check_delta(delta)
    half = jnp.sqrt(jnp.log(2 / delta) / (2 * errors.size))
    mean = jnp.mean(errors)
    return Estimate(mean, jnp.maximum(mean - half, 0), jnp.minimum(mean + half, 1))


# --- bounds ---------------------------------------------------------------------------------


def _check_delta(delta: Number) -> None:
    number = known(delta)
    if number is not None and not 0 < number <= 1:
        raise ValueError(f"delta={delta!r} was asked for; take a probability above 0, as 0.1.")


def _check_several(name: str, value: Number) -> None:
    number = known(jnp.min(value) if isinstance(value, jax.Array | np.ndarray) else value)
    if number is not None and not 2 <= number <= 1e9:  # more would leave int32
        raise ValueError(
            f"{name}={value!r} was given, but the bound divides by one less; take from 2 to 1e9."
        )


def slack(kl: Number, samples: Number, delta: Number) -> Array:
    """`sqrt((KL + log(m / delta)) / (2 (m - 1)))`, McAllester's, for m samples.

    Raises:
      ValueError: `delta` is no probability, or there are fewer than 2 samples.
    """
    _check_delta(delta)
    _check_several("samples", samples)
    return jnp.sqrt((kl + jnp.log(samples / delta)) / (2 * (samples - 1)))


def mcallester(empirical: Number, kl: Number, samples: Number, delta: Number = 0.1) -> Array:
    """McAllester's bound on the error of one task's stochastic predictor: `empirical + slack`."""
    return empirical + slack(kl, samples, delta)


def environment_term(hyper_kl: Number, tasks: Number, delta: Number = 0.1) -> Array:
    """Eq. 8: `sqrt((D(Q || P) + log(2 T / delta)) / (2 (T - 1)))`: `slack` at delta/2."""
    _check_delta(delta)
    return slack(hyper_kl, tasks, delta / 2)


def task_term(
    hyper_kl: Number, kl: Number, samples: Number, tasks: Number, delta: Number = 0.1
) -> Array:
    """Eq. 8: mean over tasks of `sqrt((D(Q || P) + log(2 T m_t / delta) + KL_t) / (2 (m_t - 1)))`.

    `slack` for every task at delta/(2 T).

    Args:
      hyper_kl: D(Q || P).
      kl: KL_t of every observed task, `[T]`, or one number for all.
      samples: m_t, `[T]` or one number: as many as the empirical error counts.
      tasks: T.
      delta: 1 - confidence.
    """
    _check_delta(delta)
    _check_several("tasks", tasks)
    return jnp.mean(slack(hyper_kl + kl, samples, delta / (2 * tasks)))


class Bound(NamedTuple):
    """The right-hand side of Eq. 8; `total` above 1 says nothing (vacuous)."""

    empirical: Array
    environment: Array
    task: Array

    @property
    def total(self) -> Array:
        """Their sum, the bound."""
        return self.empirical + self.environment + self.task


def meta_bound(
    empirical: Array,
    hyper_kl: Number,
    kl: Number,
    samples: Number,
    tasks: Number,
    delta: Number = 0.1,
) -> Bound:
    """Theorem 1 (Eq. 8): `er(Q) <= empirical + environment + task` with probability 1 - delta.

    Args:
      empirical: Errors of the stochastic pruned learner on the observed tasks, averaged here: `[T]`
        or their mean. A mean of draws needs `monte_carlo`.
      hyper_kl: D(Q || P), from `divergences.gaussian_hyper_kl` or `no_hyper_kl`.
      kl: KL_t, `[T]` or one number, `weight_kl`, `centred_kl` or `catfish_kl`.
      samples: m_t, `[T]` or one number.
      tasks: T.
      delta: 1 - confidence.

    Raises:
      ValueError: `delta` is no probability, or there are fewer than 2 tasks or samples.
    """
    return Bound(
        jnp.mean(empirical),
        environment_term(hyper_kl, tasks, delta),
        task_term(hyper_kl, kl, samples, tasks, delta),
    )


def mr_maml_bound(
    empirical: Array, kl: Number, samples: Number, tasks: Number, delta: Number = 0.1
) -> Array:
    """Theorem 1 of MR-MAML (Yin et al. 2020, Eq. 9), for weights that tasks share.

    `mean empirical + (sqrt(1 / 2(K - 1)) + sqrt(1 / 2(n - 1))) sqrt(KL + log(n (K + 1) / delta))`.
    Errors are those of K points per task that adaptation has not seen, so adapted weights cost
    nothing; `kl` is that of the shared weights' posterior from a prior (the sum of
    `bottleneck.divergence`).

    Args:
      empirical: Errors on the points kept for it, `[n]` or their mean.
      kl: In nats.
      samples: K.
      tasks: n.
      delta: 1 - confidence.

    Raises:
      ValueError: `delta` is no probability, or there are fewer than 2 tasks or samples.
    """
    _check_delta(delta)
    _check_several("samples", samples)
    _check_several("tasks", tasks)
    rates = jnp.sqrt(1 / (2 * (samples - 1))) + jnp.sqrt(1 / (2 * (tasks - 1)))
    return jnp.mean(empirical) + rates * jnp.sqrt(kl + jnp.log(tasks * (samples + 1) / delta))


def over_grid(
    bound: Callable[[Any, Number], Bound], grid: Any, delta: Number = 0.1
) -> tuple[Bound, Any]:
    """The least of the bounds at the points of a grid, which together hold with 1 - delta.

    A number may be chosen by looking at the bound only if every choice pays: each of G points is
    evaluated at delta/G (union bound), one after the other.

    Args:
      bound: `(point, delta) -> Bound`.
      grid: Points, fixed before the data: a tree of arrays with leading axis G.
      delta: 1 - confidence.

    Returns:
      The bound with the least total, and its point.
    """
    size = len(jax.tree.leaves(grid)[0])
    bounds = jax.lax.map(lambda point: bound(point, delta / size), grid)
    best = jnp.argmin(bounds.total)
    return jax.tree.map(lambda leaf: leaf[best], (bounds, grid))

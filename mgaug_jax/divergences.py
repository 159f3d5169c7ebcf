"""Divergences that PAC-Bayes bounds of pruned meta-learners pay: of priors, weights and masks.

In nats, exact for Gaussians; every number may be traced. `mgaug_jax.bounds` says what they are for
and where the statement of MGAug's Theorem 1 needs care.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import gammaln

from mgaug_jax import pruning
from mgaug_jax.checks import check_fraction, check_positive, check_rate
from mgaug_jax.types import Array, Net, Params, Pruner

Number = float | Array


# --- divergences of Gaussians and of hyper-posteriors ---------------------------------------


def gaussian_kl(square: Number, size: Number, std: Number, prior_std: Number) -> Array:
    """`KL(N(a, std^2 I) || N(b, prior_std^2 I))` of `square = |a - b|^2` in dimension `size`.

    Raises:
      ValueError: A standard deviation is not above 0.
    """
    check_positive("std", std)
    check_positive("prior_std", prior_std)
    ratio = jnp.asarray(std / prior_std)
    return square / (2 * prior_std**2) + size * ((ratio**2 - 1) / 2 - jnp.log(ratio))


def gaussian_hyper_kl(params: Params, std: Number, prior_std: Number) -> Array:
    """D(Q || P) of hyper-posterior `N(params, std^2 I)` and hyper-prior `N(0, prior_std^2 I)`.

    Amit and Meir's choice, exact. At their numbers, 1e-3 and 100, it is 11 nats for every weight;
    least is paid with `std` close to `prior_std`.
    """
    square, size = optax.tree.norm(params, squared=True), optax.tree.size(params)
    return gaussian_kl(square, size, std, prior_std)


def released_hyper_kl(params: Params, std: Number, prior_std: Number) -> Array:
    """The formula of Amit and Meir's code for D(Q || P), which counts one dimension for all.

    As an objective it lacks constants only. As a number in a bound it is no divergence for more
    than one weight, and the bound it gives can fail: a diagnostic.
    """
    return gaussian_kl(optax.tree.norm(params, squared=True), 1, std, prior_std)


def no_hyper_kl(params: Params, std: Number, prior_std: Number) -> Array:
    """0: hyper-posterior and hyper-prior are one, both fixed before the bound's tasks are seen.

    So for a prior centred at 0, Eq. 8 as printed, or at meta-parameters learned on other tasks.
    """
    del params, std, prior_std
    return jnp.zeros(())


# --- how likely a weight is kept ------------------------------------------------------------
# Trees of probabilities in the form of masks: leaves that are never pruned hold the scalar 1.


def bernoulli_keep(net: Net, params: Params, keep: Number) -> Params:
    """Pr(kept) of every weight under `pruning.bernoulli_parameters`: `keep = 1 - rho`."""
    check_fraction("keep", keep)
    return _of_prunable(net, params, lambda size: keep)


def subset_keep(
    net: Net, params: Params, keep: Number, select: pruning.Select = pruning.exact
) -> Params:
    """Pr(kept) of every weight where a fixed number per layer goes, `pruning.random_parameters`.

    The share that `select` keeps, which is `keep` up to rounding.
    """
    check_fraction("keep", keep)
    rate = jnp.asarray(keep)
    return _of_prunable(net, params, lambda size: 1 - select.count(size, rate) / size)


def width_keep(net: Net, params: Params, keeps: Array) -> Params:
    """Pr(kept) of every weight under `pruning.width`, its rate uniform on `keeps [R]`.

    The first channels are always kept, the last ones least often.
    """
    nothing: Any = None
    masks = jax.vmap(lambda keep: pruning.width(nothing, net, params, nothing, keep))(keeps)
    return jax.tree.map(lambda mask: jnp.mean(mask, axis=0), masks)


def only_masked(keep: Params) -> Params:
    """`keep` with 0 for the leaves that are never pruned, so that no divergence counts them.

    The reading of `|omega_t|` as the norm of what is masked. Weights left out must be the same for
    every task and without noise, or the bound is none.
    """
    return jax.tree.map(lambda p: p if p.ndim else jnp.zeros_like(p), keep)


def _of_prunable(net: Net, params: Params, value: Callable[[int], Number]) -> Params:
    def leaf(role, w: Array) -> Array:
        return jnp.full(w.shape, value(w.size), w.dtype) if role.prunable else jnp.ones((), w.dtype)

    return jax.tree.map(leaf, net.roles, params)


# --- divergences of pruned weights ----------------------------------------------------------


def weight_kl(
    weights: Params,
    keep: Params,
    std: Number = 1.0,
    prior_std: Number = 1.0,
    spread: Number = 0.0,
) -> Array:
    """KL of `s (w + std eps)` against `s (prior_std eps)`, s of one law of masks, eps ~ N(0, I).

    Jointly over mask and weights: `E_s KL = sum_j Pr(s_j = 1) KL_j`; with unit noise and equal
    probabilities the paper's `(1 - rho)/2 |w|^2`. Only the probability of each weight matters, so
    PP in both readings and WP differ in `keep` alone. The mask must not depend on the samples.

    Args:
      weights: Posterior mean minus prior mean; `omega_t` for a prior at 0 (Eq. 8 as printed).
      keep: Pr(kept), from `bernoulli_keep`, `subset_keep` or `width_keep`.
      std: Of the posterior's noise.
      prior_std: Of the prior's noise.
      spread: Standard deviation of the prior's mean around the point that `weights` counts from;
        the result is then the mean divergence over priors.

    Raises:
      ValueError: A standard deviation is not above 0, or the spread is negative.
    """
    check_rate("spread", spread)

    def leaf(p: Array, w: Array) -> Array:
        p = jnp.broadcast_to(p, w.shape)
        return gaussian_kl(jnp.sum(p * (w**2 + spread**2)), jnp.sum(p), std, prior_std)

    return jnp.asarray(optax.tree.sum(jax.tree.map(leaf, keep, weights)))


def centred_kl(
    adapted: Params,
    initial: Params,
    keep: Params,
    std: Number = 1.0,
    prior_std: Number = 1.0,
    spread: Number = 0.0,
) -> Array:
    """`weight_kl` with the prior around the meta-parameters, as Amit and Meir have it and Eq. 8 has
    not: only how far adaptation moves the weights counts.

    The price of the meta-parameters goes to the hyper level: `gaussian_hyper_kl(initial, spread,
    ...)`, or 0 with `spread=0` if they were learned on tasks that the bound does not count. With a
    spread the posterior must be one for all priors drawn. The environment term speaks of learners
    that are functions of the drawn prior: for it, adapt from drawn priors and average this with
    `initial` the draw and `spread=0`.
    """
    moved = jax.tree.map(jnp.subtract, adapted, initial)
    return weight_kl(moved, keep, std, prior_std, spread)


def mask_kl(mask: Params, free_counts: bool = False) -> Array:
    """What a mask chosen by the task's samples costs: `sum_l log C(n_l, k_l)`, k_l of n_l pruned.

    The divergence of one mask from the uniform law on masks with as many pruned per layer.

    Args:
      mask: 0/1 leaves; the scalar 1 for leaves that are never pruned.
      free_counts: Whether k_l depends on the samples too, as where equal scores are kept
        (`pruning.released`): another `log(n_l + 1)` per layer.
    """

    def leaf(m: Array) -> Array:
        if not m.ndim:
            return jnp.zeros(())
        kept = jnp.sum(m)
        choices = gammaln(m.size + 1.0) - gammaln(kept + 1) - gammaln(m.size - kept + 1)
        return choices + free_counts * jnp.log(m.size + 1.0)

    return jnp.asarray(optax.tree.sum(jax.tree.map(leaf, mask)))


def catfish_kl(
    weights: Params,
    mask: Params,
    std: Number = 1.0,
    prior_std: Number = 1.0,
    free_counts: bool = False,
) -> Array:
    """KL for CP, whose mask the task's samples chose: the mask's price and that of the kept
    weights, `sum_l log C(n_l, k_l) + |m w|^2 / 2` with unit noise.

    Not in the paper. The first part grows with rho faster than the second falls, so that pruning
    does not tighten this bound. Arguments as in `mask_kl` and `weight_kl`.
    """
    return mask_kl(mask, free_counts) + weight_kl(weights, mask, std, prior_std)


def literal_catfish_kl(
    weights: Params, mask: Params, std: Number = 1.0, prior_std: Number = 1.0
) -> Array:
    """Eq. 8's term read for CP: `|m w|^2 / 2` of the realised mask, which is taken for free.

    A diagnostic: the bound it gives can fail. (With rho for the mask, `(1 - rho)/2 |w|^2`, it is
    `weight_kl` of `subset_keep`, and fails as well.)
    """
    return weight_kl(weights, mask, std, prior_std)


# --- pruners as a bound sees them -----------------------------------------------------------


class Law(NamedTuple):
    """How masks come about, and hence what they cost.

    Attributes:
      prune: Makes the mask of a task.
      keep: `(net, params, keep) -> Pr(kept)` of masks that have not seen the task's samples; None
        if they choose the mask, which then has to be paid for.
    """

    prune: Pruner
    keep: Callable[[Net, Params, Number], Params] | None

    def kl(
        self,
        net: Net,
        weights: Params,
        mask: Params,
        keep: Number,
        std: Number = 1.0,
        prior_std: Number = 1.0,
    ) -> Array:
        """`catfish_kl` of the task's mask, or `weight_kl` of the law, which needs no mask."""
        if self.keep is None:
            return catfish_kl(weights, mask, std, prior_std)
        return weight_kl(weights, self.keep(net, weights, keep), std, prior_std)


LAWS = {
    "wp": Law(
        pruning.width,
        lambda net, params, keep: width_keep(net, params, jnp.asarray(keep)[None]),
    ),
    "pp": Law(pruning.random_parameters(), subset_keep),
    "bernoulli": Law(pruning.bernoulli_parameters, bernoulli_keep),
    "cp": Law(pruning.catfish(select=pruning.exact), None),
}
"""The pruners at one rate; `exact` counts, so that none depends on the samples."""

"""Gradient perturbation (Gogoi, Tiwari, Verma 2024): noise and DropGrad on the way to a rule.

A perturbation is a pure function `(key, gradients, weights) -> gradients`. A *site* says where a
method applies it: `inner`, `inner_update`, `outer`, `outer_update` or `test`. Every task, inner
step and leaf draws from a key of its own. The source's text was not at hand in full: where it is
silent, the docstrings say which reading is taken.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_function, check_probability, check_rate, known
from mgaug_jax.types import (
    Array,
    Method,
    Modifier,
    Params,
    Perturb,
    Transform,
    Wrap,
)

Site = Callable[[Method, Perturb], Method]
"""`(method, perturbation) -> method` that applies it somewhere."""
Distribution = Callable[..., Array]
"""`(key, shape, dtype) -> draws` of mean 0 and variance 1."""
Scale = Callable[[Params, Params], Params]
"""`(gradients, weights) -> a scalar per leaf`: the unit that sigma is given in."""
Factors = Callable[..., Array]
"""`(key, shape, dtype, rate, ramp) -> multipliers` of mean 1."""


# --- around an optimiser --------------------------------------------------------------------


def before(perturb: Perturb) -> Wrap:
    """Perturbs the gradients that the rule is handed."""

    def wrap(rule: Transform) -> Transform:
        def update(updates, state, params=None, *, key, **extra):
            k_here, k_rule = jax.random.split(key)
            return rule.update(perturb(k_here, updates, params), state, params, key=k_rule, **extra)

        return Transform(rule.init, update)  # pyright: ignore[reportArgumentType]

    return wrap


def after(perturb: Perturb) -> Wrap:
    """Perturbs the updates that the rule gives."""

    def wrap(rule: Transform) -> Transform:
        def update(updates, state, params=None, *, key, **extra):
            k_here, k_rule = jax.random.split(key)
            updates, state = rule.update(updates, state, params, key=k_rule, **extra)
            return perturb(k_here, updates, params), state

        return Transform(rule.init, update)  # pyright: ignore[reportArgumentType]

    return wrap


# --- sites ----------------------------------------------------------------------------------


def _site(slot: str, place: Callable[[Wrap, Perturb], Wrap]) -> Site:
    def site(method: Method, perturb: Perturb) -> Method:
        wrap = place(getattr(method, slot), perturb)
        if slot != "outer":
            method.algorithm(method.net, wrap)  # a learner without an inner loop refuses here
        return method._replace(**{slot: wrap})

    return site


def _at(site: Site, perturb: Perturb, nothing: bool) -> Modifier:
    """The perturbation at its site. One that is known to do `nothing` is left out, since a compiler
    may round even `g + 0` otherwise, by contracting it with what stands beside it. What is left out
    draws no key, so that a number known here and traced there means other draws for the rest.
    """

    def modify(method: Method) -> Method:
        changed = site(method, perturb)  # refuses where there is no such site
        return method if nothing else changed

    return modify


# Both ways, what was applied first acts first.
def _on_gradients(held: Wrap, perturb: Perturb) -> Wrap:
    return lambda rule: held(before(perturb)(rule))


def _on_updates(held: Wrap, perturb: Perturb) -> Wrap:
    return lambda rule: after(perturb)(held(rule))


inner = _site("inner", _on_gradients)
"""The gradient of every inner step of training: `theta - lr (g + eps)`, the paper's main method."""
inner_update = _site("inner", _on_updates)
"""The update of every inner step of training: `theta - lr g + eps`, the other reading. For SGD the
same as `inner` at `sigma = lr sigma_inner`."""
outer = _site("outer", _on_gradients)
"""The meta-gradient, before the outer optimiser."""
outer_update = _site("outer", _on_updates)
"""The outer optimiser's update."""
test = _site("test", _on_gradients)
"""The gradient of every inner step at meta-test, where otherwise nothing is perturbed."""


# --- noise ----------------------------------------------------------------------------------


def gaussian(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """N(0, 1)."""
    return jax.random.normal(key, shape, dtype)


def laplace(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Laplace of variance 1."""
    return jax.random.laplace(key, shape, dtype) * 0.5**0.5


def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """U(-sqrt 3, sqrt 3)."""
    return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)


def student_t(key: Array, shape: tuple[int, ...], dtype: Any, freedom: float = 5.0) -> Array:
    """Student's t of variance 1, with `freedom` > 2 degrees of freedom.

    Raises:
      ValueError: `freedom` is 2 or less, where the variance is infinite.
    """
    if not freedom > 2:
        raise ValueError(f"freedom={freedom!r} was asked for, but the variance needs more than 2.")
    return jax.random.t(key, freedom, shape, dtype) * ((freedom - 2) / freedom) ** 0.5


def _rms(tree: Params) -> Array:
    leaves = jax.tree.leaves(tree)
    size = sum(leaf.size for leaf in leaves)
    return jax.lax.stop_gradient(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves) / size))


def unit(grads: Params, weights: Params) -> Params:
    """Sigma as it is, in the unit of the gradient."""
    del weights
    return jax.tree.map(lambda g: jnp.ones((), g.dtype), grads)


def gradient_rms(grads: Params, weights: Params) -> Params:
    """Sigma in units of the gradient's root mean square over all leaves: 1 / sigma is the
    signal-to-noise ratio, whatever the problem's scale. A constant to derivatives. Entries that do
    not move count: the zeros of pruned weights, the body's gradient in ANIL.
    """
    del weights
    rms = _rms(grads)
    return jax.tree.map(lambda g: rms, grads)


def leaf_rms(grads: Params, weights: Params) -> Params:
    """As `gradient_rms`, leaf by leaf."""
    del weights
    return jax.tree.map(_rms, grads)


def weight_rms(grads: Params, weights: Params) -> Params:
    """Sigma in units of the weights' root mean square over all leaves, for `inner_update`."""
    rms = _rms(weights)
    return jax.tree.map(lambda g: rms, grads)


def noise(
    std: float | Array,
    *,
    site: Site = inner,
    distribution: Distribution = gaussian,
    relative_to: Scale = unit,
) -> Modifier:
    """`g + sigma eps`, eps of mean 0 and variance 1, drawn anew per task, step and leaf.

    At an inner site every sub-network draws its own; at an outer one the sum of all is perturbed.

    Args:
      std: sigma, the standard deviation, in the unit that `relative_to` gives; 0 changes nothing,
        bit for bit (a traced 0 to the last digit or two of a compiled program). May be traced, so
        `trainer(lambda step: noise(schedule(step))(method), ...)` lets it follow any schedule.
      site: Where: `inner` (the paper's main method), `inner_update`, `outer`, `outer_update`,
        `test`.
      distribution: `gaussian` (paper), `laplace`, `uniform`, `student_t`, or your own.
      relative_to: `unit`, `gradient_rms`, `leaf_rms` or `weight_rms`.

    Raises:
      ValueError: `std` is negative or not a number, the method has no such site, or what should be
        a function is none.
    """
    check_rate("std", std)
    check_function("site", site, "perturb.inner")
    check_function("distribution", distribution, "perturb.gaussian")
    check_function("relative_to", relative_to, "perturb.unit")

    def perturb(key: Array, grads: Params, weights: Params) -> Params:
        eps = optax.tree.random_like(key, grads, distribution)
        add = lambda g, scale, e: g + jnp.asarray(std, g.dtype) * scale * e
        return jax.tree.map(add, grads, relative_to(grads, weights), eps)

    return _at(site, perturb, known(std) == 0)


def by_memory(std: float | Array, gains: Array, factor: float | Array) -> Array:
    """The next sigma, without a sweep: as much noise as it takes that nothing is memorised.

    `std * factor ** clip(z / 2 - 1, -1, 1)`, z the mean of the gains over its standard error: sigma
    grows where memory is told from none (z above 2) and shrinks where it is not. A rule of ours:
    which sigma to take is an open question of the source. On one-hot sinusoids we found that outer
    noise keeps memory from being built and hardly undoes it, so start with more noise than is
    needed, and let sigma move more slowly than training does. Where nothing is learned without
    memory the rule ends learning too.

    Args:
      std: sigma so far.
      gains: Label memory of n training tasks, `[n]`: what the network gains by their own labels
        over permuted ones, in accuracy or any other score.
      factor: Above 1, the largest of one turn.
    """
    twice = 2 * jnp.std(gains, ddof=1) / len(gains) ** 0.5
    beyond = (jnp.mean(gains) - twice) / jnp.maximum(twice, jnp.finfo(twice.dtype).tiny)
    return std * factor ** jnp.clip(beyond, -1, 1)


# --- DropGrad -------------------------------------------------------------------------------


def bernoulli_factors(key: Array, shape, dtype, rate: Array, ramp: Array) -> Array:
    """0 with probability p = `ramp * rate`, else 1 / (1 - p)."""
    keep = 1 - ramp * rate
    return jax.random.bernoulli(key, keep, shape) / keep.astype(dtype)


def gaussian_factors(key: Array, shape, dtype, rate: Array, ramp: Array) -> Array:
    """N(1, p / (1 - p)) for p = `rate`, its standard deviation times `ramp`."""
    return 1 + ramp * jnp.sqrt(rate / (1 - rate)) * jax.random.normal(key, shape, dtype)


def drop_grad(
    rate: float | Array,
    *,
    site: Site = inner,
    factors: Factors = gaussian_factors,
    ramp: float | Array = 1.0,
) -> Modifier:
    """DropGrad (Tseng et al. 2020), MGAug's "GradDrop": `g * n` entry by entry, `E n = 1`.

    Which form and site MGAug's row has is not known; that it is the original is our reading.

    Args:
      rate: p, in [0, 1); the variance of n is p / (1 - p) in both forms. 0 changes nothing.
      site: `inner` (original); MGAug's text reads like `outer`.
      factors: `gaussian_factors` (the released default) or `bernoulli_factors`.
      ramp: From 0 to 1 over training in the original's linear schedule; may be traced. It scales
        p in the Bernoulli form and the standard deviation in the Gaussian one, as released.

    Raises:
      ValueError: `rate` is outside [0, 1), `ramp` outside [0, 1], the method has no such site,
        or what should be a function is none.
    """
    check_function("site", site, "perturb.inner")
    check_function("factors", factors, "perturb.gaussian_factors")
    check_probability("rate", rate)
    check_probability("ramp", ramp, below_one=False)

    def perturb(key: Array, grads: Params, weights: Params) -> Params:
        del weights
        draw = lambda key, shape, dtype: factors(
            key, shape, dtype, jnp.asarray(rate, dtype), jnp.asarray(ramp, dtype)
        )
        return jax.tree.map(jnp.multiply, grads, optax.tree.random_like(key, grads, draw))

    return _at(site, perturb, known(rate) == 0 or known(ramp) == 0)

"""What is done to the weights between meta-steps: decay, a fresh optimiser, magnitude pruning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mgaug_jax.checks import (
    check_count,
    check_fraction,
    check_function,
    check_leaves,
    check_rate,
    known,
)
from mgaug_jax.perturb import outer, outer_update
from mgaug_jax.types import Array, MetaParams, Method, Modifier, Params, Role, Transform


def l2(weight: float | Array, *, leaves: Callable[[Role], bool] = lambda role: True) -> Modifier:
    """Coupled L2: `g + weight w` before the outer optimiser, the control of every comparison.

    Args:
      weight: 0 changes nothing; may be traced.
      leaves: Which of the network's leaves are pulled, by their roles.

    Raises:
      ValueError: `weight` is negative or not a number, or `leaves` no function or matches none.
    """
    check_rate("weight", weight)
    check_function("leaves", leaves, "lambda role: not role.head")

    def modify(method: Method) -> Method:
        pull = _on_leaves(method, leaves, lambda g, w: g + jnp.asarray(weight, g.dtype) * w)
        return method if known(weight) == 0 else outer(method, pull)

    return modify


def weight_decay(
    rate: float | Array, *, leaves: Callable[[Role], bool] = lambda role: True
) -> Modifier:
    """Decoupled weight decay (Loshchilov, Hutter 2019): `w <- w + update - rate w`.

    Args:
      rate: Of one meta-step: what AdamW calls the weight decay times the learning rate, whatever
        the learning rate is (AdamW's falls with it). 0 changes nothing; may be traced.
      leaves: As in `l2`.

    Raises:
      ValueError: `rate` is negative or not a number, or `leaves` no function or matches none.
    """
    check_rate("rate", rate)
    check_function("leaves", leaves, "lambda role: not role.head")

    def modify(method: Method) -> Method:
        pull = _on_leaves(method, leaves, lambda u, w: u - jnp.asarray(rate, u.dtype) * w)
        return method if known(rate) == 0 else outer_update(method, pull)

    return modify


def fresh_optimizer(method: Method) -> Method:
    """The outer optimiser made anew at every meta-step: with Adam, steps of `lr sign(g)`. MR-MAML's
    sinusoid code does this, and its numbers hang on it. A schedule inside the optimiser starts
    anew as well, and so stays at its first value.
    """

    def fresh(rule: Transform) -> Transform:
        def update(updates, state, params: Any = None, **extra):
            del state
            return rule.update(updates, rule.init(params), params, **extra)

        return Transform(rule.init, update)  # pyright: ignore[reportArgumentType]

    return method._replace(outer=lambda rule: method.outer(fresh(rule)))


# --- MetaPruning (Tian et al. 2020), as its abstract has it; the schedules are ours ---------------


def iterative_hard_thresholding(keep: float | Array, step: Array, *, every: int = 10) -> Modifier:
    """After every `every`-th meta-step all but the `keep` largest weights of a layer become 0;
    which they are may change every time. It has the last word on a meta-step, wherever it is put.

    Of the source only the abstract could be read: layer by layer, by magnitude and every 10 steps
    are our reading.

    Args:
      keep: Fraction of a layer's prunable weights that stay.
      step: The meta-step, usually traced.
      every: Steps from one thresholding to the next.

    Raises:
      ValueError: `keep` is no fraction, or `every` no positive integer.
    """
    check_fraction("keep", keep)
    check_count("every", every)
    due = (step + 1) % every == 0
    return _thresholded(lambda w, after: jnp.where(due, _largest(after, keep), after))


def dense_sparse_dense(keep: float | Array, step: Array, *, start: int, stop: int) -> Modifier:
    """Dense training up to step `start`, then only the `keep` largest weights of every layer, the
    others held at 0, and from step `stop` all of them again.

    They are 0 between meta-steps, whatever else changes the step: the inner loop moves them still,
    and the outer optimiser goes on collecting their moments. That, layer by layer and by magnitude,
    is our reading; of the source only the abstract could be read.

    Args:
      keep: Fraction of a layer's prunable weights that stay.
      step: The meta-step, usually traced.
      start: First step of the sparse phase.
      stop: First step after it.

    Raises:
      ValueError: `keep` is no fraction, or the phases are not in order.
    """
    check_fraction("keep", keep)
    check_count("start", start)
    check_count("stop", stop, start + 1)

    def change(w: Array, after: Array) -> Array:
        held = jnp.where(w == 0, 0, after)
        sparse = jnp.where(step == start - 1, _largest(after, keep), held)
        return jnp.where((step >= start - 1) & (step < stop), sparse, after)

    return _thresholded(change)


def _largest(w: Array, keep: float | Array) -> Array:
    """`w` with all but its `round(keep n)` entries of largest magnitude at 0, ties by position."""
    order = jnp.argsort(-jnp.abs(w.ravel()), stable=True)
    ranks = jnp.zeros(w.size, jnp.int32).at[order].set(jnp.arange(w.size, dtype=jnp.int32))
    return jnp.where(ranks.reshape(w.shape) < jnp.round(keep * w.size), w, 0)


def _thresholded(change: Callable[[Array, Array], Array]) -> Modifier:
    """Prunable weights become `change(weights, weights after the step)`."""

    def modify(method: Method) -> Method:
        roles, earlier = method.net.roles, method.project
        if not any(role.prunable for role in jax.tree.leaves(roles)):
            raise ValueError(
                "Weights were to be thresholded, but this network has none to prune; use one with "
                "kernels, such as conv4 or mlp, or leave it out."
            )

        def project(before: Params, after: Params) -> Params:
            after = after if earlier is None else earlier(before, after)
            one = lambda role, w, moved: change(w, moved) if role.prunable else moved
            return jax.tree.map(one, roles, before, after)

        return method._replace(project=project)

    return modify


def _on_leaves(method: Method, leaves, change: Callable[[Array, Array], Array]):
    """A perturbation: `change(gradient or update, weights)` of the chosen leaves of the network."""
    check_leaves(leaves, method.net.roles)

    def perturb(key: Array, grads: MetaParams, params: MetaParams) -> MetaParams:
        del key
        one = lambda role, g, w: change(g, w) if leaves(role) else g
        net: Params = jax.tree.map(one, method.net.roles, grads.net, params.net)
        return grads._replace(net=net)

    return perturb

"""Which weights a sub-network loses: WP, PP, CP and their controls (MGAug, section 4.2).

A pruner makes one mask of one task; `mgaug` vmaps it over sub-networks and keep rates. `keep` is
the fraction of weights kept, in (0, 1], and may be traced. Masks hold 1 for kept and 0 for pruned;
leaves that are not pruned hold the scalar 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mgaug_jax.types import Array, Net, Params, Probe

Select = Callable[[Array, Array], Array]
"""`(scores [n], keep) -> kept [n] bool`: which of the scores ranked together stay."""
Scores = Callable[[Params, Probe], Params]
"""`(params, probe) -> scores` in the tree of `params`."""


# --- scores ---------------------------------------------------------------------------------


def adapted(params: Params, probe: Probe) -> Params:
    """MMCA as released: |g theta|, g the query gradient *after* adaptation, theta the initial
    weights. For ProtoNet, which does not adapt, it is Eq. 5 exactly.
    """
    return jax.tree.map(lambda g, w: jnp.abs(g * w), probe.grads, params)


def initial(params: Params, probe: Probe) -> Params:
    """MMCA as printed (Eq. 5): |theta dL/dtheta|, both at the initial weights."""
    grads = jax.grad(probe.query_loss)(params)
    return jax.tree.map(lambda g, w: jnp.abs(g * w), grads, params)


def leave_one_out(params: Params, probe: Probe) -> Params:
    """MMCA by definition (Eq. 4): |L(theta) - L((1 - e_j) theta)| for every entry j.

    One forward pass per weight: for small networks, as the reference of `initial`.
    """
    flat, unravel = ravel_pytree(params)
    loss = probe.query_loss(params)

    def difference(j: Array) -> Array:
        return jnp.abs(loss - probe.query_loss(unravel(flat.at[j].set(0))))

    return unravel(jax.lax.map(difference, jnp.arange(flat.size)))


# --- which scores go ------------------------------------------------------------------------


def _excess(size: int, keep: Array) -> Array:
    """`size (1 - keep)`, nudged up by the rounding of `keep` so that a floor meets the integer
    meant: 8000 (1 - .99) is 80, which float32 takes for 79.9999.
    """
    keep = jnp.asarray(keep)
    return size * (1 - keep) + size * jnp.finfo(keep.dtype).eps


def released(scores: Array, keep: Array) -> Array:
    """The released code's rule: what is at most the k-th largest score, k = floor(n (1 - keep)), is
    kept. So k - 1 of n distinct scores go (none for k = 0), and ties at the threshold stay.
    """
    k = jnp.floor(_excess(scores.size, keep)).astype(int)
    return scores <= jnp.sort(scores, descending=True)[jnp.maximum(k - 1, 0)]


def exact(scores: Array, keep: Array) -> Array:
    """Eq. 6: the round(n (1 - keep)) largest of n scores go, half rounded up; among equal scores
    the earlier entry goes first.
    """
    ranks = jnp.zeros(scores.size, int).at[jnp.argsort(-scores)].set(jnp.arange(scores.size))
    return ranks >= jnp.floor(_excess(scores.size, keep) + 0.5)


# --- masks of a whole network ---------------------------------------------------------------


def per_layer(net: Net, scores: Params, keep: Array, select: Select = released) -> Params:
    """Masks that rank each prunable leaf on its own."""

    def mask(role, leaf: Array) -> Array:
        if not role.prunable:
            return jnp.ones((), leaf.dtype)
        return select(leaf.ravel(), keep).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(mask, net.roles, scores)


def globally(net: Net, scores: Params, keep: Array, select: Select = released) -> Params:
    """Masks that rank the entries of all prunable leaves together."""
    chosen = jax.tree.map(lambda role, leaf: leaf if role.prunable else None, net.roles, scores)
    if not jax.tree.leaves(chosen):
        return per_layer(net, scores, keep, select)
    flat, unravel = ravel_pytree(chosen)
    masks = unravel(select(flat, keep).astype(flat.dtype))
    one = lambda role, leaf, mask: mask if role.prunable else jnp.ones((), leaf.dtype)
    return jax.tree.map(one, net.roles, scores, masks)


# --- pruners --------------------------------------------------------------------------------


def catfish(scores: Scores = adapted, ranking=per_layer, select: Select = released):
    """CP: prunes the weights with the highest meta-memorisation score (Definition 2, Eq. 6).

    Args:
      scores: `adapted` (released code), `initial` (paper), `leave_one_out`, or your own.
      ranking: `per_layer` (paper and code) or `globally`.
      select: `released` (k - 1, ties kept) or `exact`.
    """

    def prune(key: Array, net: Net, params: Params, probe: Probe, keep: Array) -> Params:
        del key
        return ranking(net, jax.lax.stop_gradient(scores(params, probe)), keep, select)

    return prune


def lowest(scores: Scores = adapted) -> Scores:
    """Turns scores around, so that as many weights go, but those that memorise least: the
    control of Remark 1, `catfish(lowest(adapted))`.
    """
    return lambda params, probe: jax.tree.map(jnp.negative, scores(params, probe))


def random_parameters(select: Select = exact):
    """PP: prunes weights at random, a fixed number per layer, without rescaling the rest."""

    def prune(key: Array, net: Net, params: Params, probe: Probe, keep: Array) -> Params:
        del probe
        leaves, tree = jax.tree.flatten(params)
        keys = tree.unflatten(jax.random.split(key, len(leaves)))
        noise = jax.tree.map(lambda k, leaf: jax.random.uniform(k, leaf.shape), keys, params)
        return per_layer(net, noise, keep, select)

    return prune


def bernoulli_parameters(key: Array, net: Net, params: Params, probe: Probe, keep: Array):
    """PP in its other reading: every weight stays with probability `keep`, independently."""
    del probe
    leaves, tree = jax.tree.flatten(params)
    keys = tree.unflatten(jax.random.split(key, len(leaves)))

    def mask(role, k: Array, leaf: Array) -> Array:
        if not role.prunable:
            return jnp.ones((), leaf.dtype)
        return jax.random.bernoulli(k, keep, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(mask, net.roles, keys, params)


def width(key: Array, net: Net, params: Params, probe: Probe, keep: Array) -> Params:
    """WP: keeps the first round(C keep) channels of every hidden layer, at least one.

    Kernel outputs, biases and batch-norm parameters of the other channels are masked, so their
    activations are zero and the sub-network equals one with the channels cut out (GradAug).
    """
    del key, probe

    def mask(role, leaf: Array) -> Array:
        if role.width is None:
            return jnp.ones((), leaf.dtype)
        channels = leaf.shape[role.width]
        kept = jnp.maximum(jnp.floor(channels * keep + 0.5), 1)
        shape = [-1 if axis == role.width else 1 for axis in range(leaf.ndim)]
        return (jnp.arange(channels) < kept).astype(leaf.dtype).reshape(shape)

    return jax.tree.map(mask, net.roles, params)

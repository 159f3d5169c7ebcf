"""Which weights a sub-network loses: WP, PP, CP and their controls (MGAug, section 4.2).

A pruner makes one mask of one task; `mgaug` vmaps it over sub-networks and keep rates. `keep` is
the fraction of weights kept, in (0, 1], and may be traced. Masks hold 1 for kept and 0 for pruned;
leaves that are not pruned hold the scalar 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mgaug_jax.checks import check_function
from mgaug_jax.types import Array, Net, Params, Probe

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


@dataclasses.dataclass(frozen=True)
class Select:
    """A rule that says which of the scores ranked together stay.

    Attributes:
      count: `(n, keep) -> number of n scores that go`.
      mask: `(scores [n], number that go) -> kept [n] bool`.
    """

    count: Callable[[int, Array], Array]
    mask: Callable[[Array, Array], Array]

    def __call__(self, scores: Array, keep: Array) -> Array:
        """`kept [n] bool` of `scores [n]`."""
        return self.mask(scores, self.count(scores.size, keep))


def _share(n: int, keep: Array, plus: float = 0) -> Array:
    """floor(n (1 - keep) + plus), exact for the rate that was meant.

    In float32 8000 (1 - .99) is 79.9999. There the rate is taken in millionths and multiplied in
    integers, by thousands, so that nothing overflows; a float64 product is right but for its last
    bits.
    """
    keep = jnp.asarray(keep)
    if keep.dtype == jnp.float64:
        return jnp.floor(n * (1 - keep) + plus + n * jnp.finfo(keep.dtype).eps).astype(int)
    rate = jnp.round((1 - keep.astype(jnp.float32)) * 1e6).astype(int)
    (n1, n0), (r1, r0) = divmod(n, 1000), jnp.divmod(rate, 1000)
    return n1 * r1 + (n1 * r0 + n0 * r1 + n0 * r0 // 1000 + round(1000 * plus)) // 1000


def _keep_ties(scores: Array, number: Array) -> Array:
    """The scores up to the one that follows the `number` largest, and all that equal it."""
    # All that is compared comes out of one sort. XLA may compute `scores` anew beside it, rounded
    # otherwise, and the score that is the threshold would be above it (seen: one weight too many).
    values, order = jax.lax.sort_key_val(-scores, jnp.arange(scores.size))
    return jnp.zeros(scores.size, bool).at[order].set(values >= values[number])


def _by_rank(scores: Array, number: Array) -> Array:
    """All but the `number` largest; among equal scores the earlier goes first."""
    ranks = jnp.zeros(scores.size, int).at[jnp.argsort(-scores)].set(jnp.arange(scores.size))
    return ranks >= number


def _released(n: int, keep: Array) -> Array:
    return jnp.maximum(_share(n, keep) - 1, 0)


released = Select(_released, _keep_ties)
"""The released code's rule: the threshold is the k-th largest score, k = floor(n (1 - keep)), and
stays with all that equal it. So k - 1 of n distinct scores go, and none for k = 0."""
released_by_rank = Select(_released, _by_rank)
"""As many as `released`, also where scores are equal: for controls at equal counts."""
exact = Select(lambda n, keep: _share(n, keep, 0.5), _by_rank)
"""Eq. 6: the round(n (1 - keep)) largest of n scores go, half rounded up."""


# --- masks of a whole network ---------------------------------------------------------------


def per_layer(net: Net, scores: Params, keep: Array, select: Select = released) -> Params:
    """Masks that rank each prunable leaf on its own."""

    def mask(role, leaf: Array) -> Array:
        if not role.prunable:
            return jnp.ones((), leaf.dtype)
        return select(leaf.ravel(), keep).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(mask, net.roles, scores)


def globally(net: Net, scores: Params, keep: Array, select: Select = released) -> Params:
    """Masks that rank the entries of all prunable leaves together; as many go as by `per_layer`."""
    chosen = jax.tree.map(lambda role, leaf: leaf if role.prunable else None, net.roles, scores)
    layers = jax.tree.leaves(chosen)
    if not layers:
        return per_layer(net, scores, keep, select)
    flat, unravel = ravel_pytree(chosen)
    number = sum(select.count(layer.size, keep) for layer in layers)
    masks = unravel(select.mask(flat, jnp.asarray(number)).astype(flat.dtype))
    one = lambda role, leaf, mask: mask if role.prunable else jnp.ones((), leaf.dtype)
    return jax.tree.map(one, net.roles, scores, masks)


# --- pruners --------------------------------------------------------------------------------


def catfish(scores: Scores = adapted, ranking=per_layer, select: Select = released):
    """CP: prunes the weights with the highest meta-memorisation score (Definition 2, Eq. 6).

    Args:
      scores: `adapted` (released code), `initial` (paper), `leave_one_out`, or your own.
      ranking: `per_layer` (paper and code) or `globally`.
      select: `released` (k - 1, ties kept), `released_by_rank` or `exact`.

    Raises:
      ValueError: One of them is no function.
    """
    check_function("scores", scores, "pruning.adapted")
    check_function("ranking", ranking, "pruning.per_layer")
    check_function("select", select, "pruning.exact")

    def prune(key: Array, net: Net, params: Params, probe: Probe, keep: Array) -> Params:
        del key
        return ranking(net, jax.lax.stop_gradient(scores(params, probe)), keep, select)

    return prune


def lowest(scores: Scores = adapted) -> Scores:
    """Turns scores around, so that those weights go that memorise least: the control of Remark 1.

    At equal counts with `select=released_by_rank`, for the weights of dead channels all score zero
    and `released` keeps ties.
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
    activations are zero and the sub-network equals one with the channels cut out (GradAug). GradAug
    adds a channel where rounding leaves fewer than .9 C keep, which it does at 4 and fewer alone;
    our reading of MGAug, which names the fraction, leaves that out.
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

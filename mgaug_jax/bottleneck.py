"""MR-MAML on weights (Yin et al. 2020): what is not adapted may hold little information.

The encoder, the blocks that the inner loop does not move, has Gaussian weights `N(mu, s^2)` with
learned mean and scale, whose divergence from N(0, 1) is a cost: what it says about the training
tasks has to be paid for, and the adapted rest is left to carry it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_count, check_rate, known
from mgaug_jax.methods import freeze
from mgaug_jax.perturb import outer
from mgaug_jax.types import (
    Array,
    Examples,
    Learner,
    MetaParams,
    Method,
    Modifier,
    Net,
    Params,
    Role,
    Wrap,
)

Leaves = Callable[[Role], bool]


def divergence(mean: Array, scale: Array) -> Array:
    """`KL(N(mean, scale^2) || N(0, 1))`, summed over entries, in nats (Eq. 5)."""
    return jnp.sum(-jnp.log(scale) + (jnp.square(scale) + jnp.square(mean) - 1) / 2)


def mr_weights(beta: float | Array, *, blocks: int = 1, start: float = -20.0) -> Modifier:
    """MR-MAML(W): the objective plus `beta KL(N(mu, s^2) || N(0, 1))` of the encoder's kernels.

    The encoder is every block but the last `blocks`, which alone are adapted, the head among them.
    Its kernels are drawn once per task and network, the same for support and query (paper); its
    biases and norms are plain. `mu` is `params.net`; `s = softplus(params.extra["scale"])`. A test
    task draws once as well, where the paper averages over several draws; step 0 is at the mean.
    The divergence reaches the gradient and not the loss that a step reports. For MGAug's networks
    the source gives no recipe: this choice of blocks is ours.

    Args:
      beta: Weight of the divergence; may be traced.
      blocks: How many of the last blocks adapt.
      start: First `params.extra["scale"]`, at least -80, below which float32 knows no scale: at -20
        the encoder is all but deterministic (released).

    Raises:
      ValueError: `beta` is negative or not a number, `start` is too small or not a number, the
        network names no blocks or has no more than `blocks`, or the method's inner loop does not
        move every weight (protonet, anil, or a second `mr_weights`).
    """
    check_rate("beta", beta)
    check_count("blocks", blocks)
    number = known(start)
    if number is not None and not -80 <= number < math.inf:
        raise ValueError(f"start={start!r} was asked for; take a number of -80 or more.")

    def modify(method: Method) -> Method:
        depth = method.net.depth
        if depth <= blocks:
            raise ValueError(
                f"mr_weights leaves all but the last {blocks} blocks to the encoder, but this "
                f"network names {depth}. Use conv4, resnet10 or an mlp of more layers."
            )
        if not method.algorithm(method.net, method.inner).whole:
            raise ValueError(
                "mr_weights says itself what the inner loop moves, so it takes one that moves "
                "every weight; use maml, not protonet or anil, and mr_weights once."
            )
        encoder = lambda role: role.block < depth - blocks
        drawn = lambda role: encoder(role) and role.prunable
        base = freeze(encoder)(method).algorithm

        def algorithm(net: Net, inner: Wrap) -> Learner:
            return _randomised(base(net, inner), net.roles, drawn, start)

        def pull(key: Array, grads: MetaParams, params: MetaParams) -> MetaParams:
            del key
            cost = lambda net, scale: beta * _total_divergence(net, scale, method.net.roles, drawn)
            more = jax.grad(cost, argnums=(0, 1))(params.net, params.extra["scale"])
            net, scale = jax.tree.map(jnp.add, (grads.net, grads.extra["scale"]), more)
            return MetaParams(net, {**grads.extra, "scale": scale})

        return outer(method._replace(algorithm=algorithm), pull)

    return modify


def _total_divergence(net: Params, scale: Params, roles, drawn: Leaves) -> Array:
    one = lambda role, w, s: divergence(w, jax.nn.softplus(s)) if drawn(role) else jnp.zeros(())
    return sum(jax.tree.leaves(jax.tree.map(one, roles, net, scale)), start=jnp.zeros(()))


def _randomised(base: Learner, roles, drawn: Leaves, start: float) -> Learner:
    """The learner that meets every task with a draw of its weights."""

    def init(key: Array) -> MetaParams:
        params = base.init(key)
        scale = lambda role, w: jnp.full_like(w, start) if drawn(role) else jnp.zeros((), w.dtype)
        return params._replace(
            extra={**params.extra, "scale": jax.tree.map(scale, roles, params.net)}
        )

    def draw(key: Array, params: MetaParams) -> tuple[Array, MetaParams]:
        k_inner, k_draw = jax.random.split(key)
        leaves, tree = jax.tree.flatten(params.net)
        keys = jax.tree.unflatten(tree, list(jax.random.split(k_draw, len(leaves))))

        def one(role: Role, w: Array, s: Array, key: Array) -> Array:
            if not drawn(role):
                return w
            return w + jax.nn.softplus(s) * jax.random.normal(key, w.shape, w.dtype)

        net = jax.tree.map(one, roles, params.net, params.extra["scale"], keys)
        return k_inner, params._replace(net=net)

    def adapt(key: Array, params: MetaParams, support: Examples):
        return base.adapt(*draw(key, params), support)

    def path(key: Array, params: MetaParams, support: Examples):
        assert base.path is not None
        return base.path(*draw(key, params), support)

    return base._replace(init=init, adapt=adapt, path=path)

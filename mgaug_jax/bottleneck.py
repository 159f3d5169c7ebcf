"""MR-MAML (Yin et al. 2020): what is not adapted may hold, or say, little.

The encoder, the blocks that the inner loop does not move, has Gaussian weights (W) or Gaussian
outputs (A), whose divergence from N(0, 1) is a cost: what it says about the training tasks has to
be paid for, and the adapted rest is left to carry it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_count, check_rate, known
from mgaug_jax.judging import with_judge
from mgaug_jax.learners import transductive
from mgaug_jax.meta import adapted_loss
from mgaug_jax.methods import freeze
from mgaug_jax.perturb import outer
from mgaug_jax.types import (
    Array,
    Examples,
    Learner,
    Make,
    MetaParams,
    Method,
    Modifier,
    Net,
    Params,
    Role,
    Task,
    Term,
    Wrap,
)

Leaves = Callable[[Role], bool]


def divergence(mean: Array, scale: Array) -> Array:
    """`KL(N(mean, scale^2) || N(0, 1))` of every entry, in nats."""
    return -jnp.log(scale) + (jnp.square(scale) + jnp.square(mean) - 1) / 2


def mr_weights(beta: float | Array, *, blocks: int = 1, start: float = -20.0) -> Modifier:
    """MR-MAML(W): the objective plus `beta KL(N(mu, s^2) || N(0, 1))`, summed over the
    encoder's kernels (Eq. 5).

    The encoder is every block but the last `blocks`, which alone are adapted, the head among them.
    Its kernels are drawn once per task and network, the same for support and query (paper); its
    biases and norms are plain. `mu` is `params.net`; `s = softplus(params.extra["scale"])`. A test
    task draws once as well (our reading), where the paper averages the predictions of several
    draws: a mean over tests is then that of the predictor whose weights are drawn, which the
    source's bound is about. Step 0 is at the mean. The divergence reaches the gradient and not the
    loss that a step reports. For MGAug's networks the source gives no recipe: this choice of blocks
    is our reading.

    Args:
      beta: Weight of the divergence, counted once beside the mean over tasks (where a source sums
        over T tasks, its beta is T times this one); may be traced.
      blocks: How many of the last blocks adapt.
      start: First `params.extra["scale"]`, at least -80, below which float32 knows no scale: at -20
        the encoder is all but deterministic (released).

    Raises:
      ValueError: `beta` is negative or not a number, `start` is too small or not a number, the
        network names no blocks or has no more than `blocks`, or the method's inner loop does not
        move every weight (protonet, anil, or a second `mr_weights`).
    """
    _check(beta, blocks, start)

    def modify(method: Method) -> Method:
        encoder = _encoder("mr_weights", method, blocks)
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


def _check(beta, blocks: int, start) -> None:
    check_rate("beta", beta)
    check_count("blocks", blocks)
    number = known(start)
    if number is not None and not -80 <= number < math.inf:
        raise ValueError(f"start={start!r} was asked for; take a number of -80 or more.")


def _encoder(name: str, method: Method, blocks: int) -> Leaves:
    """All but the last blocks, in a method that leaves to `name` what is adapted."""
    depth = method.net.depth
    if depth <= blocks:
        raise ValueError(
            f"{name} leaves all but the last {blocks} blocks to the encoder, but this network "
            f"names {depth}. Use conv4, resnet10 or an mlp of more layers."
        )
    if not method.algorithm(method.net, method.inner).whole:
        raise ValueError(
            f"{name} says itself what the inner loop moves, so it takes one that moves every "
            "weight; use maml, not protonet or anil, and one of mr_weights and mr_activations."
        )
    return lambda role: role.block is not None and role.block < depth - blocks


def _total_divergence(net: Params, scale: Params, roles, drawn: Leaves) -> Array:
    def one(role: Role, w: Array, s: Array) -> Array:
        return jnp.sum(divergence(w, jax.nn.softplus(s))) if drawn(role) else jnp.zeros(())

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


class Coded(NamedTuple):
    """An adapted network, and the linear layers between its encoder and the rest."""

    fast: Any
    code: Params


def mr_activations(beta: float | Array, *, blocks: int = 1, start: float = 0.0) -> Modifier:
    """MR-MAML(A): codes `z ~ N(mu, s^2)` between the encoder and the rest, and the objective plus
    `beta KL(N(mu, s^2) || N(0, 1))` (Eq. 3), the mean over the entries of the queries' codes and
    over tasks (as released; a sum would be as many times larger).

    The encoder is every block but the last `blocks`, which alone are adapted, the head among them.
    Of its output h, with c channels along its last axis, are made `mu = h M + m` and
    `s = softplus(h A + b)`, M and A `[c, c]`, m and b `[c]` in `params.extra["code"]`, not adapted
    either. M starts as the identity, A and m at 0, so that at first a test meets the plain network
    (ours: the source makes codes of 5 numbers). Support and query draw codes of their own in
    training; a test is at the mean, and so is what CP sees before the inner loop. Sub-networks draw
    too, on the channels they have; the divergence is of the full network.

    Args:
      beta: Weight of the divergence; may be traced. 5 on the source's sinusoids.
      blocks: How many of the last blocks adapt.
      start: First b, at least -80.

    Raises:
      ValueError: As `mr_weights`; or the outer loss was replaced already, or predictions are
        inductive.
    """
    _check(beta, blocks, start)

    def modify(method: Method) -> Method:
        encoder = _encoder("mr_activations", method, blocks)
        cut = method.net.depth - blocks
        base = freeze(encoder)(method).algorithm

        def algorithm(net: Net, inner: Wrap) -> Learner:
            make = lambda net: base(net, inner)
            # `_rest`, which the judge adapts on codes, has no part
            return make(net) if net.part is None else _coded(make, net, cut, start)

        def draw(key: Array, net: Net, params: MetaParams, part: Examples) -> Examples:
            mean, scale = _encode(net, cut, params.net, params.extra["code"], part.x)
            return part._replace(x=mean + scale * jax.random.normal(key, mean.shape, mean.dtype))

        def judge(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
            k_adapt, *k_codes = jax.random.split(key, 3)
            codes = Task(*(draw(k, net, params, p) for k, p in zip(k_codes, task, strict=True)))
            return adapted_loss(k_adapt, _rest(net, cut), make, params, codes)

        def cost(key: Array, learner: Learner, params: MetaParams, task: Task) -> Array:
            del key, learner
            code = _encode(method.net, cut, params.net, params.extra["code"], task.query.x)
            return beta * jnp.mean(divergence(*code))

        return with_judge(
            judge,
            lambda net, learner: learner.forward is transductive,
            "mr_activations draws codes inside the network, which takes transductive batch norm; "
            "leave forward=inductive out.",
        )(method._replace(algorithm=algorithm, terms=(*method.terms, Term(cost, jnp.mean))))

    return modify


def _encode(net: Net, cut: int, weights: Params, code: Params, x: Array) -> tuple[Array, Array]:
    """Mean and scale of the codes of `x`, 0 on channels that a sub-network lacks."""
    assert net.part is not None
    h = net.part(weights, x, 0, cut)
    present = 1 if net.mask is None else _last(net.mask, net.roles, cut)
    linear = lambda layer: h @ layer["kernel"] + layer["bias"]
    return present * linear(code["mean"]), present * jax.nn.softplus(linear(code["scale"]))


def _rest(net: Net, cut: int) -> Net:
    """The adapted blocks alone, whose inputs are codes; it names no blocks of its own."""
    part, depth = net.part, net.depth
    assert part is not None
    decode = lambda weights, z: part(weights, z, cut, depth)
    return net._replace(apply=decode, part=None, depth=0)


def _coded(make: Make, net: Net, cut: int, start: float) -> Learner:
    """The learner that `make` makes, of a network whose every code is at its mean."""
    plain = make(net)

    def at(code: Params) -> Learner:
        def apply(weights: Params, x: Array) -> Array:
            return _rest(net, cut).apply(weights, _encode(net, cut, weights, code, x)[0])

        return make(net._replace(apply=apply))

    def init(key: Array) -> MetaParams:
        params = plain.init(key)
        c = len(_last(params.net, net.roles, cut))
        mean = {"kernel": jnp.eye(c), "bias": jnp.zeros(c)}
        scale = {"kernel": jnp.zeros((c, c)), "bias": jnp.full(c, start, jnp.float32)}
        return params._replace(extra={**params.extra, "code": {"mean": mean, "scale": scale}})

    def begin(params: MetaParams, support: Examples) -> Coded:
        code = params.extra["code"]
        return Coded(at(code).start(params, support), code)

    def adapt(key: Array, params: MetaParams, support: Examples) -> Coded:
        code = params.extra["code"]
        return Coded(at(code).adapt(key, params, support), code)

    def path(key: Array, params: MetaParams, support: Examples) -> Coded:
        code = params.extra["code"]
        along = at(code).path
        assert along is not None
        fast = along(key, params, support)
        steps = len(jax.tree.leaves(fast)[0])
        return Coded(fast, jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), code))

    def predict(fast: Coded, x: Array) -> Array:
        return at(fast.code).predict(fast.fast, x)

    made = plain._replace(init=init, start=begin, adapt=adapt, predict=predict)
    return made._replace(path=path, weights=None)


def _last(leaves: Params, roles, cut: int) -> Array:
    """Of a tree like the network's, the vector of the encoder's last channels."""
    pairs = zip(jax.tree.leaves(leaves), jax.tree.leaves(roles), strict=True)
    return next(leaf for leaf, role in pairs if role.block == cut - 1 and role.width == 0)

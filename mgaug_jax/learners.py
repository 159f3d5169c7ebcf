"""Inner loops: gradient descent on the support set, and class prototypes.

A learner sees one task and one network, and knows nothing of the outer loop. What becomes of its
gradients on their way into its optimiser (first order, noise) is handed to it as `inner`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_count, check_function, check_kind
from mgaug_jax.losses import cross_entropy
from mgaug_jax.types import (
    Array,
    Examples,
    Forward,
    Learner,
    Loss,
    MetaParams,
    Net,
    Params,
    Wrap,
    identity,
)


class Fast(NamedTuple):
    """Task parameters, and the support set a prediction may be normalised by."""

    params: Params
    support: Examples


def transductive(net: Net, params: Params, support: Examples, x: Array) -> Array:
    """Batch norm of the queries by their own statistics, as the released code does."""
    del support
    return net.apply(params, x)


def inductive(net: Net, params: Params, support: Examples, x: Array) -> Array:
    """Batch norm of the queries by the support's statistics: one query's prediction does not
    depend on the others.

    Raises:
      ValueError: The network cannot choose its statistics (`apply_by_first` is None).
    """
    _check_forward(net, inductive)
    assert net.apply_by_first is not None
    n = len(support.x)
    return net.apply_by_first(params, jnp.concatenate([support.x, x]), n)[n:]


def _check_forward(net: Net, forward: Forward) -> None:
    check_kind("net", net, Net, "nets.conv4(way=5)")
    check_function("forward", forward, "transductive")
    if forward is inductive and net.apply_by_first is None:
        raise ValueError(
            "inductive normalises the queries by the support's statistics, but this network "
            "cannot choose its statistics. Use conv4 or resnet10, or transductive."
        )


def descend(
    net: Net,
    inner: Wrap,
    *,
    steps: int,
    rule: Callable[[dict], optax.GradientTransformation],
    extra: Callable[[Params], dict] = lambda params: {},
    loss: Loss = cross_entropy,
    forward: Forward = transductive,
) -> Learner:
    """`theta <- theta + inner(rule)(grad loss(theta; support))`, `steps` times from `params.net`.

    Args:
      net: The network. Weights that its `mask` lacks, and `fixed` ones, stay where they are,
        whatever `inner` adds.
      inner: Around `rule`; step i is handed `key=fold_in(key, i)`.
      steps: Number of inner steps, static.
      rule: `params.extra -> optax transform`, the inner optimiser. Adam and its kin need
        `eps_root > 0` under MAML: the second derivative at a zero gradient is NaN without it.
      extra: `initial weights -> params.extra`, what is learned beside the weights.
      loss: Of the support, and of the query in the outer loop.
      forward: `transductive` or `inductive` prediction of the queries.

    Raises:
      ValueError: `steps` is not a positive integer, or `forward` asks too much of the network.
    """
    check_count("steps", steps)
    check_function("inner", inner, "identity")
    check_function("rule", rule, "lambda extra: optax.sgd(0.1)")
    check_function("extra", extra, "lambda params: {}")
    check_function("loss", loss, "losses.cross_entropy")
    _check_forward(net, forward)

    def init(key: Array) -> MetaParams:
        params = net.init(key)
        return MetaParams(params, extra(params))

    def moves(updates: Params) -> Params:
        chosen = jax.tree.map(
            lambda u, role: jnp.zeros_like(u) if role.fixed else u, updates, net.roles
        )
        return chosen if net.mask is None else jax.tree.map(jnp.multiply, chosen, net.mask)

    def descent(key: Array, params: MetaParams, support: Examples, keep) -> tuple[Params, Any]:
        """The last weights, and what `keep` keeps of every step's."""
        tx = inner(optax.with_extra_args_support(rule(params.extra)))

        def fit(theta: Params) -> Array:
            return loss(net.apply(theta, support.x), support.y)

        def step(carry, i: Array):
            theta, state = carry
            grads = jax.grad(fit)(theta)
            updates, state = tx.update(grads, state, theta, key=jax.random.fold_in(key, i))
            theta = optax.apply_updates(theta, moves(updates))
            return (theta, state), keep(theta)

        carry = params.net, tx.init(params.net)
        (theta, _), kept = jax.lax.scan(step, carry, jnp.arange(steps))
        return theta, kept

    def adapt(key: Array, params: MetaParams, support: Examples) -> Fast:
        return Fast(descent(key, params, support, lambda theta: None)[0], support)

    def path(key: Array, params: MetaParams, support: Examples) -> Fast:
        thetas = descent(key, params, support, lambda theta: theta)[1]
        return Fast(thetas, jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), support))

    return Learner(
        init=init,
        start=lambda params, support: Fast(params.net, support),
        adapt=adapt,
        predict=lambda fast, x: forward(net, fast.params, fast.support, x),
        loss=loss,
        path=path,
        weights=lambda fast: fast.params,
        forward=forward,
        whole=not any(role.fixed for role in jax.tree.leaves(net.roles)),
    )


class Prototypes(NamedTuple):
    """The embedding's parameters, the class means `[W, d]`, and the support they are of."""

    params: Params
    means: Array
    support: Examples


def prototypes(net: Net, inner: Wrap, *, forward: Forward = transductive) -> Learner:
    """ProtoNet: logits `-|z - c_n|^2`, `c_n` the mean support embedding of class n (Snell 2017).

    Support and query are embedded by separate calls, each with its own batch statistics. There is
    no inner gradient for `inner` to change, so anything but `identity` is refused.

    Raises:
      ValueError: `inner` is not `identity`, or `forward` asks too much of the network.
    """
    _check_forward(net, forward)
    if inner is not identity:
        raise ValueError(
            "A change of the inner-loop gradients was asked for, but protonet has no inner loop. "
            "Leave it out, or change the meta-gradient: site='outer' in a spec, outer in Python."
        )

    def embed(params: MetaParams, support: Examples) -> Prototypes:
        sums = support.y.T @ net.apply(params.net, support.x)
        return Prototypes(params.net, sums / jnp.sum(support.y, axis=0)[:, None], support)

    def predict(fast: Prototypes, x: Array) -> Array:
        z = forward(net, fast.params, fast.support, x)
        return -jnp.sum(jnp.square(z[:, None] - fast.means), axis=-1)

    return Learner(
        init=lambda key: MetaParams(net.init(key), {}),
        start=embed,
        adapt=lambda key, params, support: embed(params, support),
        predict=predict,
        loss=cross_entropy,
        forward=forward,
    )

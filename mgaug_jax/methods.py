"""The algorithms by name: each a composition of a learner and a transform of its gradients."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_count, check_function, check_kind, check_leaves, check_rate
from mgaug_jax.learners import descend, prototypes, transductive
from mgaug_jax.losses import cross_entropy
from mgaug_jax.perturb import before
from mgaug_jax.types import (
    Algorithm,
    Array,
    Forward,
    Learner,
    Loss,
    Method,
    Modifier,
    Net,
    Params,
    Role,
    Wrap,
    identity,
)


def maml(
    net: Net,
    *,
    lr: float | Array = 0.01,
    steps: int = 5,
    loss: Loss = cross_entropy,
    forward: Forward = transductive,
) -> Method:
    """MAML (Finn et al. 2017): SGD inner loop, meta-gradient through it (second order).

    Args:
      net: A network with as many outputs as ways.
      lr: Inner learning rate, for the *mean* loss over the support. Rates quoted for code that
        sums over classes and divides by the shot must be multiplied by the number of ways.
      steps: Inner steps.
      loss: `cross_entropy`, or `squared_error` for regression.
      forward: `transductive` batch norm (the released code), or `inductive`.

    Raises:
      ValueError: `lr` is negative or not a number, or `steps` is not a positive integer.
    """
    check_rate("lr", lr)
    return _gradient_method(net, steps, lambda extra: optax.sgd(lr), loss, forward)


def fomaml(net: Net, **options) -> Method:
    """First-order MAML: `first_order(maml(net, ...))`. Arguments as for `maml`."""
    return first_order(maml(net, **options))


def first_order(method: Method) -> Method:
    """The method with its inner gradients detached: nothing is differentiated twice.

    Raises:
      ValueError: It has no inner loop.
    """
    detach = before(lambda key, grads, weights: jax.lax.stop_gradient(grads))
    algorithm = lambda net, inner: method.algorithm(net, lambda rule: detach(inner(rule)))
    algorithm(method.net, method.inner)  # a learner without an inner loop refuses here
    return method._replace(algorithm=algorithm)


def anil(net: Net, **options) -> Method:
    """ANIL (Raghu et al. 2020): MAML whose inner loop moves the head alone; arguments as there.

    Raises:
      ValueError: The network does not say which layer is its head; or as `maml`.
    """
    check_kind("net", net, Net, "nets.conv4(way=5)")
    if not any(role.head for role in jax.tree.leaves(net.roles)):
        raise ValueError(
            "anil adapts the head alone, but this network names none. Give the name of its last "
            "layer (from_linen(module, shape, head='Dense_1')), or use maml."
        )
    return freeze(lambda role: not role.head)(maml(net, **options))


def freeze(leaves: Callable[[Role], bool]) -> Modifier:
    """The inner loop moves no weight whose role is among `leaves`; the outer loop does.

    Raises:
      ValueError: `leaves` is no function or matches none, or the method's outer loss needs an inner
        loop that moves every weight.
    """
    check_function("leaves", leaves, "lambda role: not role.head")

    def fixed(role: Role) -> Role:
        return dataclasses.replace(role, fixed=role.fixed or leaves(role))

    def modify(method: Method) -> Method:
        check_leaves(leaves, method.net.roles)

        def algorithm(net: Net, inner: Wrap) -> Learner:
            return method.algorithm(net._replace(roles=jax.tree.map(fixed, net.roles)), inner)

        algorithm(method.net, method.inner)  # an outer loss that needs every weight refuses here
        return method._replace(algorithm=algorithm)

    return modify


def meta_sgd(
    net: Net,
    *,
    lr: float | Array = 0.01,
    steps: int = 1,
    loss: Loss = cross_entropy,
    forward: Forward = transductive,
) -> Method:
    """Meta-SGD (Li et al. 2017): `theta - a * grad`, with `a` learned entry by entry.

    `a` starts at `lr` everywhere (the paper's own start could not be verified) and lives in
    `params.extra["lr"]`; its sign is free. Second order; one inner step is the paper's.

    Raises:
      ValueError: As `maml`.
    """
    check_rate("lr", lr)

    def rates(params: Params) -> dict[str, Params]:
        return {"lr": jax.tree.map(lambda leaf: jnp.full_like(leaf, lr), params)}

    def rule(extra):
        scaled = lambda updates, _: jax.tree.map(lambda u, a: -a * u, updates, extra["lr"])
        return optax.stateless(scaled)

    return _gradient_method(net, steps, rule, loss, forward, extra=rates)


def lslr(
    net: Net,
    *,
    lr: float | Array = 0.01,
    steps: int = 5,
    loss: Loss = cross_entropy,
    forward: Forward = transductive,
) -> Method:
    """MAML with a learned rate per leaf and inner step (MAML++, Antoniou et al. 2019), in
    `params.extra["lr"]`, leaves `[steps]`, all `lr` at first. Second order.

    Raises:
      ValueError: As `maml`.
    """
    check_rate("lr", lr)
    check_count("steps", steps)

    def rates(params: Params) -> dict[str, Params]:
        return {"lr": jax.tree.map(lambda leaf: jnp.full(steps, lr, leaf.dtype), params)}

    def rule(extra) -> optax.GradientTransformation:
        def update(updates, state, params=None):
            del params
            return jax.tree.map(lambda u, a: -a[state] * u, updates, extra["lr"]), state + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)

    return _gradient_method(net, steps, rule, loss, forward, extra=rates)


def protonet(net: Net, *, forward: Forward = transductive) -> Method:
    """ProtoNet (Snell et al. 2017) on an embedding network (`way=None`); `forward` as in `maml`."""
    return _method(net, partial(prototypes, forward=forward))


def _gradient_method(net: Net, steps, rule, loss, forward, **options) -> Method:
    algorithm = partial(descend, steps=steps, rule=rule, loss=loss, forward=forward, **options)
    return _method(net, algorithm)


def _method(net: Net, algorithm: Algorithm) -> Method:
    method = Method(net, algorithm, identity, None, jnp.mean)
    algorithm(net, method.inner)  # refuses bad settings here, not at the first step
    return method

"""Other outer losses: MetaMix (Yao et al. 2021), MAML++'s multi-step loss, Reptile.

Each takes the place of the query loss, for the full network and every sub-network, with its own
draws. A method has one outer loss, so a second is refused.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_positive, check_probability
from mgaug_jax.learners import transductive
from mgaug_jax.types import Array, Judge, Learner, MetaParams, Method, Modifier, Net, Task

Law = Callable[[Array], Array]
"""`key -> lambda`, a mixing weight in [0, 1]."""


def beta_law(alpha: float | Array = 2.0) -> Law:
    """Beta(alpha, alpha): 2 for classes, .5 for the regression of the source.

    Raises:
      ValueError: `alpha` is not a number above 0.
    """
    check_positive("alpha", alpha)
    return lambda key: jax.random.beta(key, alpha, alpha)


def metamix(*, law: Law | None = None) -> Modifier:
    """MetaMix: the outer loss on a mixture of query and support, in front of one random block.

    `h = lambda h_query + (1 - lambda) h_support[perm]` before block l, l uniform over the blocks
    (0: the input), each part having passed the blocks before it by itself; targets are mixed alike,
    which for the cross entropy is the mixture of the two losses. The inner loop is unmixed. One
    lambda, l and permutation per task and network. With as many queries as supports `perm` is a
    permutation (source); else supports are drawn uniformly with replacement (ours). Batch norm is
    by each part's own statistics. The accuracy that a step reports compares the mixture's outputs
    with the query's labels.

    Args:
      law: Of lambda; `beta_law(2)` unless given.

    Raises:
      ValueError: The network names no blocks, the method's predictions are not a network's outputs
        or are inductive, or its outer loss was replaced already.
    """
    law = law or beta_law()

    def judge(key: Array, net: Net, learner: Learner, params: MetaParams, task: Task):
        assert net.part is not None  # `fits` says so
        assert learner.weights is not None
        k_adapt, k_law, k_layer, k_pairs = jax.random.split(key, 4)
        theta = learner.weights(learner.adapt(k_adapt, params, task.support))
        lam, layer = law(k_law), jax.random.randint(k_layer, (), 0, net.depth)
        pairs = _pairs(k_pairs, len(task.query.x), len(task.support.x))
        mix = lambda query, support: lam * query + (1 - lam) * support[pairs]
        h, s = task.query.x, task.support.x
        for i in range(net.depth):
            h = jnp.where(layer == i, mix(h, s), h)
            h = net.part(theta, h, i, i + 1)
            s = net.part(theta, s, i, i + 1) if i < net.depth - 1 else s
        return learner.loss(h, mix(task.query.y, task.support.y)), h

    return with_judge(
        judge,
        lambda net, learner: (
            net.part is not None and learner.weights is not None and learner.forward is transductive
        ),
        "metamix mixes query and support in front of one of the network's blocks, which takes a "
        "network that names its blocks (conv4, resnet10, mlp), an inner loop (not protonet) and "
        "transductive batch norm.",
    )


def _pairs(key: Array, queries: int, supports: int) -> Array:
    """Which support every query is mixed with."""
    if queries == supports:
        return jax.random.permutation(key, supports)
    return jax.random.randint(key, (queries,), 0, supports)


def multi_step_loss(last: float | Array = 0.0) -> Modifier:
    """MAML++'s multi-step loss: the query loss after every inner step, `sum_i v_i L(theta_i)`.

    Args:
      last: From 0, equal weights `v_i = 1 / steps`, to 1, the last step alone (plain MAML); between
        them linear. The source anneals it over the first epochs. May be traced.

    Raises:
      ValueError: `last` is outside [0, 1], the method has no inner steps, or its outer loss was
        replaced already.
    """
    check_probability("last", last, below_one=False)

    def judge(key: Array, net: Net, learner: Learner, params: MetaParams, task: Task):
        del net
        assert learner.path is not None
        path = learner.path(key, params, task.support)
        outputs = jax.vmap(lambda fast: learner.predict(fast, task.query.x))(path)
        losses = jax.vmap(lambda outputs: learner.loss(outputs, task.query.y))(outputs)
        weights = jnp.full(len(losses), (1 - last) / len(losses)).at[-1].add(last)
        return jnp.dot(weights, losses), outputs[-1]

    return with_judge(
        judge,
        lambda net, learner: learner.path is not None,
        "A loss of every inner step was asked for, but protonet has no inner steps. Leave it out, "
        "or use maml.",
    )


def reptile() -> Modifier:
    """Reptile (Nichol et al. 2018) on a gradient method: the meta-gradient is the way back from the
    adapted to the initial weights, `theta - theta_T`, so that outer SGD at rate eps is the source's
    step. The inner loop sees support and query together; the loss reported is the query's after it.
    What else is learned (rates of Meta-SGD) gets no gradient.

    Raises:
      ValueError: The inner loop does not move every weight (at the first step, if what keeps it
        from that is put on top), or the outer loss was replaced already.
    """

    def judge(key: Array, net: Net, learner: Learner, params: MetaParams, task: Task):
        del net
        assert learner.weights is not None
        everything = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), task.support, task.query)
        fixed = jax.lax.stop_gradient(params)
        fast = learner.adapt(key, fixed, everything)
        outputs = learner.predict(fast, task.query.x)
        back = optax.tree.sub(fixed.net, learner.weights(fast))
        way = jnp.asarray(optax.tree.vdot(params.net, jax.lax.stop_gradient(back)))
        # worth nothing, but its gradient is `back`
        loss = learner.loss(outputs, task.query.y)
        return jax.lax.stop_gradient(loss) + (way - jax.lax.stop_gradient(way)), outputs

    return with_judge(
        judge,
        lambda net, learner: learner.whole,
        "reptile learns by the way of the inner loop, which must move every weight; use maml, not "
        "protonet, anil, freeze or mr_weights.",
    )


def with_judge(
    judge: Judge, fits: Callable[[Net, Learner], bool] = lambda *_: True, refusal: str = ""
) -> Modifier:
    """The method with `judge` for its outer loss, if it `fits`.

    Raises:
      ValueError: It does not (`refusal`), or the outer loss was replaced already.
    """

    def check(net: Net, learner: Learner) -> None:
        if not fits(net, learner):
            raise ValueError(refusal)

    def checked(key: Array, net: Net, learner: Learner, params: MetaParams, task: Task):
        check(net, learner)  # once more, for what a modifier on top has made of the learner
        return judge(key, net, learner, params, task)

    def modify(method: Method) -> Method:
        check(method.net, method.algorithm(method.net, method.inner))
        if method.judge is not None:
            raise ValueError(
                "Two outer losses were asked for, but a method has one; keep one of metamix, "
                "multi_step_loss, maxup and reptile."
            )
        return method._replace(judge=checked)

    return modify

"""Other outer losses: MetaMix with Channel Shuffle (Yao et al. 2021), MAML++'s multi-step loss,
Reptile.

Each takes the place of the query loss, for the full network and every sub-network, with its own
draws. A method has one outer loss, so a second is refused.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_function, check_positive, check_probability, known
from mgaug_jax.learners import transductive
from mgaug_jax.losses import squared_error
from mgaug_jax.types import (
    Array,
    Examples,
    Judge,
    Learner,
    Make,
    MetaParams,
    Method,
    Modifier,
    Net,
    Params,
    Task,
    Wrap,
)

Law = Callable[[Array], Array]
"""`key -> lambda`, a mixing weight in [0, 1]."""
GROUPS = 6
"""Of channels, of which Channel Shuffle exchanges one."""


def beta_law(alpha: float | Array = 2.0) -> Law:
    """Beta(alpha, alpha): 2 for classes, .5 for the regression of the source.

    Raises:
      ValueError: `alpha` is not a number above 0.
    """
    check_positive("alpha", alpha)
    return lambda key: jax.random.beta(key, alpha, alpha)


def metamix(*, law: Law | None = None, shuffle: float | Array = 0.0) -> Modifier:
    """MetaMix: the outer loss on a mixture of query and support, in front of one random block.

    `h = lambda h_query + (1 - lambda) h_support[perm]` before block l, l uniform over the blocks
    (0: the input), each part having passed the blocks before it by itself; targets are mixed alike,
    which for the cross entropy is the mixture of the two losses. The inner loop is unmixed. One
    lambda, l and permutation per task and network. With as many queries as supports `perm` is a
    permutation (source); else supports are drawn uniformly with replacement (ours). Batch norm is
    by each part's own statistics. The accuracy that a step reports compares the mixture's outputs
    with the query's labels.

    Channel Shuffle makes new classes of a task's: in front of block l > 0, in the inner loop and
    before mixing, every class takes one group of channels from the class after it in a random
    cycle, the same group for all, and keeps its label. The groups are fixed, six of about equal
    size (as released; the source's text draws channels at random). Where the released code decides
    for a whole meta-batch, each task and network decides by itself.

    Args:
      law: Of lambda; `beta_law(2)` unless given.
      shuffle: Probability of Channel Shuffle; 1/2 in the source after a warm-up without. May be
        traced. Classes must have equally many examples, which is refused at the first step.

    Raises:
      ValueError: The network names no blocks, the method's predictions are not a network's outputs
        or are inductive, its outer loss was replaced already, or `shuffle` is outside [0, 1] or
        asked of a regression or a network of one block.
    """
    law = beta_law() if law is None else law
    check_function("law", law, "judging.beta_law()")
    check_probability("shuffle", shuffle, below_one=False)
    shuffles = known(shuffle) != 0

    def judge(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
        part_of = net.part
        assert part_of is not None  # `fits` says so
        k_adapt, k_law, k_layer, k_pairs, k_shuffle = jax.random.split(key, 5)
        lam, layer = law(k_law), jax.random.randint(k_layer, (), 0, net.depth)
        exchange = lambda part: lambda h: h
        if shuffles:
            layer, exchange = _channel_shuffle(k_shuffle, shuffle, net.depth, layer, task)
        at_layer = lambda i, change: lambda h: jnp.where(layer == i, change(h), h)

        def inner(theta: Params, x: Array) -> Array:
            for i in range(net.depth):
                x = part_of(theta, at_layer(i, exchange(task.support))(x), i, i + 1)
            return x

        learner = make(net._replace(apply=inner) if shuffles else net)
        assert learner.weights is not None
        theta = learner.weights(learner.adapt(k_adapt, params, task.support))
        pairs = _pairs(k_pairs, len(task.query.x), len(task.support.x))
        mix = lambda query, support: lam * query + (1 - lam) * support[pairs]
        h, s = task.query.x, task.support.x
        for i in range(net.depth):
            mixed = lambda h, s=s: mix(exchange(task.query)(h), exchange(task.support)(s))
            h = part_of(theta, at_layer(i, mixed)(h), i, i + 1)
            s = part_of(theta, s, i, i + 1) if i < net.depth - 1 else s
        return learner.loss(h, mix(task.query.y, task.support.y)), h

    def fits(net: Net, learner: Learner) -> bool:
        mixes = net.part is not None and learner.weights is not None
        classes = learner.loss is not squared_error and net.depth > 1
        return mixes and learner.forward is transductive and (classes or not shuffles)

    return with_judge(
        judge,
        fits,
        "metamix mixes query and support in front of one of the network's blocks, which takes a "
        "network that names its blocks (conv4, resnet10, mlp), an inner loop (not protonet) and "
        "transductive batch norm; its channel shuffle takes classes and more than one block.",
    )


def _channel_shuffle(key: Array, rate, depth: int, layer: Array, task: Task):
    """The block to mix in front of, and what is done there to `h` of a part of the task: its
    channels exchanged, with probability `rate`.
    """
    k_on, k_layer, k_order, k_group = jax.random.split(key, 4)
    on = jax.random.bernoulli(k_on, rate)
    layer = jnp.where(on, jax.random.randint(k_layer, (), 1, depth), layer)
    order = jax.random.permutation(k_order, task.support.y.shape[-1])
    group = jax.random.randint(k_group, (), 0, GROUPS)

    def exchange(part: Examples) -> Callable[[Array], Array]:
        givers = donors(part.y, order)
        return lambda h: jnp.where(on & in_group(h.shape[-1], group), h[givers], h)

    return layer, exchange


def in_group(channels: int, group: Array) -> Array:
    """`bool [channels]`, the channels of a group: twice three, the first of three taking what does
    not divide (6, 5, 5, 6, 5, 5 of 32; 12, 10, 10, 12, 10, 10 of 64).
    """
    sizes = []
    for half in (channels // 2, channels - channels // 2):
        sizes += [half - 2 * (half // 3), half // 3, half // 3]
    stops = jnp.cumsum(jnp.array(sizes))
    place = jnp.arange(channels)
    return (place < stops[group]) & (place >= stops[group] - jnp.array(sizes)[group])


def donors(y: Array, order: Array) -> Array:
    """For every example of `y [n, W]` the one of the same place in the next class of the cycle
    `order [W]`.

    Raises:
      ValueError: There is one column, so no classes, or they cannot have equally many examples.
    """
    n, way = y.shape
    if way < 2:
        raise ValueError(
            "Channels were to be exchanged between classes, but these targets are no classes; "
            "leave shuffle out."
        )
    if n % way:
        raise ValueError(
            f"Channels were to be exchanged between {way} classes of equally many examples, but "
            f"there are {n}; leave shuffle out."
        )
    label = jnp.argmax(y, axis=-1)
    by_class = jnp.argsort(label, stable=True)
    place = jnp.argsort(by_class) % (n // way)
    following = order[(jnp.argsort(order) + 1) % way]
    return by_class.reshape(way, -1)[following[label], place]


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

    def judge(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
        learner = make(net)
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

    Raises:
      ValueError: The inner loop does not move every weight, more than weights is learned (rates of
        Meta-SGD), or the outer loss was replaced already.
    """

    def fits(net: Net, learner: Learner) -> bool:
        del net
        return learner.whole and not jax.eval_shape(learner.init, jax.random.key(0)).extra

    def judge(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
        learner = make(net)
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
        fits,
        "reptile learns by the way of the inner loop, which must move every weight and is all that "
        "is learned; use maml, not protonet, anil, meta_sgd, lslr, freeze or mr_weights.",
    )


def with_judge(
    judge: Judge, fits: Callable[[Net, Learner], bool] = lambda *_: True, refusal: str = ""
) -> Modifier:
    """The method with `judge` for its outer loss, if it `fits`; so must every learner made later,
    by a modifier on top.

    Raises:
      ValueError: It does not (`refusal`), or the outer loss was replaced already.
    """

    def modify(method: Method) -> Method:
        if method.judge is not None:
            raise ValueError(
                "Two outer losses were asked for, but a method has one; keep one of metamix, "
                "multi_step_loss, maxup, reptile and mr_activations."
            )

        def algorithm(net: Net, inner: Wrap) -> Learner:
            learner = method.algorithm(net, inner)
            if not fits(net, learner):
                raise ValueError(refusal)
            return learner

        algorithm(method.net, method.inner)
        return method._replace(judge=judge, algorithm=algorithm)

    return modify

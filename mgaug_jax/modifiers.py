"""Meta-Gradient Augmentation: `Method -> Method` modifiers that add pruned sub-networks."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgaug_jax import pruning
from mgaug_jax.checks import check_count, check_fraction, check_function, known
from mgaug_jax.types import Array, Method, Modifier, Net, Params, Probe, Pruner, Views


def keep_rates(
    key: Array, subnets: int, low: float | Array, high: float | Array, cap: float | Array
) -> Array:
    """`[low, U(low, high), ...]`, each at most `cap`, in descending order `[U]`: one sub-network
    always has the strongest pruning, the others a random weaker one.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(subnets - 1))
    drawn = jax.vmap(lambda k: jax.random.uniform(k, minval=low, maxval=high))(keys)
    rates = jnp.append(drawn, jnp.asarray(low, drawn.dtype))
    return jnp.minimum(jnp.sort(rates, descending=True), cap)


def total(losses: Array) -> Array:
    """Eq. 7: the full network's loss plus every sub-network's."""
    return jnp.sum(losses)


def worst(losses: Array) -> Array:
    """MGAug-MaxUp as we read it: the largest loss of all views, so that only the network that does
    worst on the task sends its gradient. The variant's definition is in neither the paper nor the
    released code.
    """
    return jnp.max(losses)


def full_and_worst(losses: Array) -> Array:
    """A variant of `worst`: the full network's loss plus the worst sub-network's."""
    return losses[0] + jnp.max(losses[1:])


def mgaug(
    pruner: Pruner,
    *,
    keep: float | Array,
    high: float | Array = 1.0,
    cap: float | Array = 0.999,
    subnets: int = 3,
    sizes: Sequence[int] = (),
    reduce: Callable[[Array], Array] = total,
    active: bool | Array = True,
) -> Modifier:
    """Adds the query gradients of `subnets` pruned sub-networks to the meta-gradient (Eq. 3, 7).

    Each sub-network starts from the same initial weights, masked in every forward pass, adapts on
    the support and is scored on the query. Nothing is pruned for good: the mask is drawn anew for
    every task, and meta-test uses the full network.

    Args:
      pruner: Makes one mask, for instance `pruning.catfish()`.
      keep: Fraction of weights the most pruned sub-network keeps (w_min); in (0, 1].
      high: The others keep a fraction drawn per task from U(keep, high).
      cap: Largest fraction kept; .999 in the released gradient-based learners, .99 in ProtoNet. At
        1 a sub-network may be the full network.
      subnets: U.
      sizes: Resolutions of the sub-networks' images; each draws one per meta-step, support and
        query alike. Empty: the images as they are. Only the drawn size is computed, except under
        a `vmap` of the whole step, where every size is.
      reduce: `total` (Eq. 7), or the MaxUp readings `worst` and `full_and_worst`.
      active: Whether the sub-networks take part; may be traced, so that
        `trainer(lambda step: cp(keep=.98, active=step >= 1000)(method), ...)` switches on late.

    Raises:
      ValueError: A number outside its range, sub-networks asked for twice, or a network in which
        the pruner finds nothing to prune, or no function where one belongs.
    """
    for name, value in (("keep", keep), ("high", high), ("cap", cap)):
        check_fraction(name, value)
    if (least := known(keep)) is not None and (most := known(high)) is not None and least > most:
        raise ValueError(f"keep={keep} is the smallest fraction kept but exceeds high={high}.")
    if not isinstance(active, bool | np.bool_ | jax.Array):
        raise ValueError(f"active={active!r} was asked for; take True, False or a traced one.")
    check_function("pruner", pruner, "pruning.catfish()")
    check_function("reduce", reduce, "modifiers.total")
    check_count("subnets", subnets)
    if not isinstance(sizes, tuple | list):
        raise ValueError(f"sizes={sizes!r} must be a tuple of pixels, as in (84, 64, 48).")
    for size in sizes:
        check_count("a size in sizes", size)

    def masks(key: Array, net: Net, params: Params, probe: Probe) -> Params:
        k_rates, k_masks = jax.random.split(key)
        rates = keep_rates(k_rates, subnets, keep, high, cap)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(k_masks, jnp.arange(subnets))
        one = lambda key, rate: pruner(key, net, params, probe, rate)
        return jax.vmap(one)(keys, rates)

    def modify(method: Method) -> Method:
        if method.views is not None:
            raise ValueError(
                "Sub-networks were asked for twice, but a method has one kind of them. "
                "Keep one of the pruners."
            )
        _check_prunes(pruner, method.net)
        return method._replace(views=Views(subnets, masks, tuple(sizes), reduce, active))

    return modify


def cp(*, scores=pruning.adapted, ranking=pruning.per_layer, select=pruning.released, **options):
    """MGAug with catfish pruning. `scores`, `ranking` and `select` as in `pruning.catfish`, the
    rest as in `mgaug`.
    """
    return mgaug(pruning.catfish(scores, ranking, select), **options)


def pp(*, pruner: Pruner | None = None, **options) -> Modifier:
    """MGAug with random parameter pruning, `pruning.random_parameters()` unless `pruner` is given;
    the rest as in `mgaug`.
    """
    return mgaug(pruning.random_parameters() if pruner is None else pruner, **options)


def wp(**options) -> Modifier:
    """MGAug with random width pruning. Arguments as in `mgaug`."""
    return mgaug(pruning.width, **options)


def compose(*modifiers: Modifier) -> Modifier:
    """One modifier of several, the last applied first: `compose(a, b)(m)` is `a(b(m))`.

    Raises:
      ValueError: One of them is no function.
    """
    for modifier in modifiers:
        check_function("a modifier", modifier, "cp(keep=0.98)")
    return functools.reduce(lambda f, g: lambda method: f(g(method)), modifiers, lambda m: m)


def _check_prunes(pruner: Pruner, net: Net) -> None:
    """Refuses a network of which every mask is the scalar 1."""
    params = jax.eval_shape(net.init, jax.random.key(0))

    def mask(key: Array, params: Params) -> Params:
        loss = lambda params: jnp.asarray(optax.tree.sum(params))
        return pruner(key, net, params, Probe(params, loss), jnp.ones(()))

    masks = jax.eval_shape(mask, jax.random.key(0), params)
    if all(leaf.ndim == 0 for leaf in jax.tree.leaves(masks)):
        raise ValueError(
            "A pruner was asked for, but this network has nothing it could prune: no convolution "
            "kernels, and no dense kernels known to be hidden. If it has hidden layers, name its "
            "last one, as in from_linen(module, shape, head='Dense_1')."
        )

"""Theorem 1 on a trained run: what adaptation, pruning and noise make of every task.

All samples of a task count, m = W (K + Q). Adaptation sees the support and CP the query too, as the
theorem allows: whatever saw them is paid for. `mgaug_jax.bounds` says where the theorem needs care;
two points more belong to networks with batch norm and to episodes:

- A prediction has to depend on one example alone, so batch norm takes its statistics from a fixed
  `reference`, images that no task counts (`fixed_norm`). Adaptation may do as it likes with its
  support, and uses the support's own statistics.
- Episodes hold equally many examples of every class, drawn without replacement. Means of such
  samples scatter no more than those of independent ones (Hoeffding 1963).
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import cli, loading, runs, store
from experiments.linear import upper
from mgaug_jax import bounds, divergences, meta
from mgaug_jax.divergences import Law, Number
from mgaug_jax.losses import accuracy
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, Examples, MetaParams, Method, Net, Params, Probe, Task


def fixed_norm(net: Net, reference: Array) -> Net:
    """The network with batch norm by the statistics of `reference [n, ...]`.

    Raises:
      ValueError: The network cannot choose its statistics.
    """
    by_first = net.apply_by_first
    if by_first is None:
        raise ValueError(
            "Batch norm by fixed statistics was asked for, but this network cannot choose its "
            "statistics. Use conv4 or resnet10."
        )
    n = len(reference)
    return net._replace(
        apply=lambda params, x: by_first(params, jnp.concatenate([reference, x]), n)[n:]
    )


def trained(home: str | Path) -> tuple[runs.Setup, MetaParams]:
    """A run of `experiments.train`, and its parameters that were best on validation.

    Raises:
      BadInput: The folder holds no run, or one without classes.
    """
    config = store.read_config(Path(home))
    made = loading.setup(config, say=print)
    if made.metric != "accuracy":
        raise cli.BadInput(f"{home} was trained on {config.data}; the bound here counts errors.")
    store.check_digests(Path(home), made)
    return made, store.restore(made, Path(home)).best


class Adapted(NamedTuple):
    """What a learner makes of T tasks; leaves `[T, ...]`.

    Attributes:
      weights: After adaptation to the support.
      grads: Of the query loss after adaptation, with respect to the meta-parameters: CP's gradient.
      held: 0-1 errors on the query, whole and without noise, `[T]`.
    """

    weights: Params
    grads: MetaParams
    held: Array


def adapt(method: Method, judged: Net, key: Array, params: MetaParams, tasks: Task) -> Adapted:
    """Adapts to every task.

    Args:
      method: Adapts; its sub-networks, if any, play no part.
      judged: The network whose errors count, as from `fixed_norm`.
      key: Randomness of adaptation.
      params: Meta-parameters, learned on other tasks.
      tasks: Leading axis T.

    Raises:
      ValueError: The method adapts no weights (protonet).
    """
    learner = method.algorithm(method.net, method.test)
    if learner.weights is None:
        raise ValueError("Theorem 1 is about adapted weights; take a method like maml or fomaml.")

    def one(key: Array, task: Task) -> Adapted:
        k_adapt, k_view = jax.random.split(key)
        weights = learner.weights(learner.adapt(k_adapt, params, task.support))
        error = 1 - accuracy(judged.apply(weights, task.query.x), task.query.y)
        return Adapted(weights, meta.view(method, k_view, params, task).grads, error)

    return map_tasks(method.net, one, meta.task_keys(key, tasks), tasks)


class Masked(NamedTuple):
    """Masks of one law and rate, and what they leave of T adapted networks.

    Attributes:
      masks: One for every draw, `[T, G, ...]`, as large as the weights.
      norm: `sum_j Pr(kept) w_j^2` of the adapted weights, `[T]`.
      moved: The same of what adaptation moved.
      price: Of the mask, in nats, `[T]`.
    """

    masks: Params
    norm: Array
    moved: Array
    price: Array

    def kl(self, prior: str, std: Number) -> Array:
        """KL_t with noise `std` on posterior and prior, the prior at 0 (`norm`) or at the
        meta-parameters (`moved`), `[T]`: `square / (2 std^2)` and the mask's price.
        """
        return getattr(self, prior) / (2 * std**2) + self.price


def prune(
    net: Net,
    law: Law,
    key: Array,
    params: MetaParams,
    adapted: Adapted,
    keep: Number,
    draws: int,
) -> Masked:
    """Draws masks of what adaptation made; those that the task chose are all the same.

    Args:
      net: The network.
      law: Of the masks; a score may look at the task's gradient alone.
      key: Randomness of masks.
      params: Meta-parameters.
      adapted: Of T tasks.
      keep: Fraction of weights kept; may be traced.
      draws: Networks per task, G.
    """
    keep = jnp.asarray(keep)
    nothing: Any = None

    def fill(mask: Array, weights: Array) -> Array:
        return jnp.broadcast_to(mask, weights.shape)

    def one(key: Array, adapted: Adapted) -> Masked:
        shown = Probe(adapted.grads.net, nothing)
        draw = lambda key: law.prune(key, net, params.net, shown, keep)
        k_masks, k_price = jax.random.split(key)
        mask = draw(k_price)
        kept = mask if law.keep is None else law.keep(net, params.net, keep)
        square = lambda weights: 2 * divergences.weight_kl(weights, kept)
        moved = jax.tree.map(jnp.subtract, adapted.weights, params.net)
        price = divergences.mask_kl(mask) if law.keep is None else jnp.zeros(())
        large = lambda key: jax.tree.map(fill, draw(key), params.net)
        masks = jax.vmap(large)(jax.random.split(k_masks, draws))
        return Masked(masks, square(adapted.weights), square(moved), price)

    return jax.vmap(one)(jax.random.split(key, len(adapted.held)), adapted)


def judge(
    judged: Net, key: Array, weights: Params, masks: Params, tasks: Task, stds: Array
) -> Array:
    """0-1 errors on all samples of every task, of one network for each standard deviation.

    Args:
      judged: As in `adapt`.
      key: Randomness of noise.
      weights: After adaptation, `[T, ...]`.
      masks: `[T, G, ...]`.
      tasks: Leading axis T.
      stds: Standard deviations of the noise, `[G]`.

    Returns:
      `[T, G]`.
    """

    def one(key: Array, weights: Params, masks: Params, task: Task) -> Array:
        samples: Examples = jax.tree.map(lambda *x: jnp.concatenate(x), task.support, task.query)

        def error(args: tuple[Array, Params, Array]) -> Array:
            key, mask, std = args
            return bounds.pruned_errors(key, judged, weights, lambda _: mask, samples, std, 1)[0]

        return jax.lax.map(error, (jax.random.split(key, len(stds)), masks, stds))

    return map_tasks(judged, one, meta.task_keys(key, tasks), weights, masks, tasks)


class Best(NamedTuple):
    """A bound, with the noise it was found at and the mean divergence there."""

    bound: bounds.Bound
    std: Array
    kl: Array


def theorem(
    errors: Array,
    found: Masked,
    prior: str,
    stds: Array,
    samples: Number,
    delta: Number = 0.1,
) -> Best:
    """Eq. 8 at that of the G noises which makes it least (a union bound over G).

    The empirical term is the upper end of a Monte-Carlo interval, which takes a tenth of `delta`.
    D(Q || P) is 0: prior and hyper-prior were fixed before these tasks.

    Args:
      errors: Of `judge`, `[T, G]`.
      found: Of the T tasks.
      prior: `norm` or `moved`, see `Masked.kl`.
      stds: `[G]`.
      samples: m.
      delta: 1 - confidence.
    """

    def eq8(point: tuple[Array, Array], delta: Any) -> bounds.Bound:
        std, errors = point
        kl = found.kl(prior, std)
        return bounds.meta_bound(upper(errors, delta), 0.0, kl, samples, len(kl), 0.9 * delta)

    best, (std, _) = bounds.over_grid(eq8, (stds, errors.T), delta)
    return Best(best, std, jnp.mean(found.kl(prior, std)))

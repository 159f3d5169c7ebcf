"""What a base learner does on one task (MGAug, section 5.3): scores, fine-tuning, attention.

Pure functions of meta-parameters and one task, without the perturbations of training. Catfish
pruning looks at the labels of the query, so these are for looking, not for answering.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgaug_jax import pruning
from mgaug_jax.losses import accuracy
from mgaug_jax.meta import probe, subnet, view
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, MetaParams, Method, Net, Params, Probe, Pruner, Task


def shown(method: Method, key: Array, params: MetaParams, task: Task) -> Probe:
    """What a pruner is shown of a task: the full network's gradient, its loss before adapting."""
    plain = method._replace(inner=method.test)
    return probe(plain, params, task, view(plain, key, params, task).grads)


class Layer(NamedTuple):
    """MMCA of one layer of n weights.

    Attributes:
      scores: `[n]`, in the unit of the loss.
      kept: `[n]`, false for what catfish pruning takes away.
      threshold: The largest score that is kept.
    """

    scores: Array
    kept: Array
    threshold: Array


def mmca(
    method: Method,
    key: Array,
    params: MetaParams,
    task: Task,
    keep: float | Array,
    *,
    scores: pruning.Scores = pruning.adapted,
    ranking=pruning.per_layer,
    select: pruning.Select = pruning.released,
) -> dict[str, Layer]:
    """The distribution of MMCA (Definition 1) in every prunable layer, and what CP makes of it.

    Args:
      method: Its network and algorithm.
      key: Randomness of the inner loop.
      params: Meta-parameters.
      task: The task.
      keep: Fraction of weights kept.
      scores: As in `pruning.catfish`.
      ranking: As there.
      select: As there.

    Returns:
      Layers by name ("conv3/kernel"), in the order of the parameters.
    """
    seen, net = shown(method, key, params, task), method.net
    # the scores are no function of its key; the mask is that of the pruner itself
    mask = pruning.catfish(scores, ranking, select)(key, net, params.net, seen, jnp.asarray(keep))
    layers = {}
    for (path, role), score, kept in zip(
        jax.tree_util.tree_leaves_with_path(net.roles),
        jax.tree.leaves(scores(params.net, seen)),
        jax.tree.leaves(mask),
        strict=True,
    ):
        if role.prunable:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            flat, stays = score.ravel(), kept.ravel() > 0
            layers[name] = Layer(flat, stays, jnp.max(jnp.where(stays, flat, -jnp.inf)))
    return layers


def fine_tuning(
    method: Method, key: Array, params: MetaParams, task: Task, mask: Params | None = None
) -> Array:
    """Query accuracy before the first inner step and after each, `[1 + steps]`, of the network or
    of its sub-network `mask`.

    Raises:
      ValueError: The method has no inner steps.
    """
    net = method.net if mask is None else subnet(method.net, mask)
    learner = method.algorithm(net, method.test)
    if learner.path is None:
        raise ValueError(
            "Accuracy was asked for at every inner step, but this method has none. "
            "Use fomaml, maml or another that adapts by gradients."
        )

    def judge(fast) -> Array:
        return accuracy(learner.predict(fast, task.query.x), task.query.y)

    first = judge(learner.start(params, task.support))
    return jnp.append(first, map_tasks(net, judge, learner.path(key, params, task.support)))


class Hat(NamedTuple):
    """Accuracies at inner steps 0..I of the full network `[1 + I]` and, at R rates, of
    sub-networks `[R, 1 + I]` (MGAug, Fig. 4).
    """

    full: Array
    pruned: Array


def hat(
    method: Method, pruner: Pruner, key: Array, params: MetaParams, task: Task, keeps: Array
) -> Hat:
    """The hat graph of one task: sub-networks that keep fractions `keeps [R]` beside the full one.

    A sub-network starts from the masked initial weights, and its mask stays throughout.
    """
    k_full, k_mask, k_adapt = jax.random.split(key, 3)
    seen = shown(method, jax.random.fold_in(k_adapt, 0), params, task)

    def one(i: Array, keep: Array) -> Array:
        mask = pruner(jax.random.fold_in(k_mask, i), method.net, params.net, seen, keep)
        return fine_tuning(method, jax.random.fold_in(k_adapt, i + 1), params, task, mask)

    full = fine_tuning(method, k_full, params, task)
    return Hat(full, map_tasks(method.net, one, jnp.arange(len(keeps)), keeps))


def grad_cam(net: Net, params: Params, x: Array, classes: Array, block: int) -> Array:
    """Grad-CAM (Selvaraju et al. 2020): where in an image the score of a class comes from.

    With A `[h, w, k]` the map of an image in front of block `block` and y the logit of its class:
    `relu(sum_k a_k A[..., k])`, `a_k = mean_hw dy/dA[h, w, k]`. Batch norm in the blocks behind
    couples the images of a batch; what is differentiated is the sum of their logits.

    Args:
      net: A network (or `meta.subnet` of one) that names its blocks.
      params: Its weights, after adaptation.
      x: Images `[n, h, w, c]`, the whole query.
      classes: One-hot `[n, W]`: the class of every image that is explained.
      block: From 1 to `net.depth - 1`.

    Returns:
      Maps `[n, h', w']` in the resolution of A, every one moved and scaled to reach from 0 to 1
      (all 0 where it is constant).

    Raises:
      ValueError: The network names no blocks, has no such one, or no image at it.
    """
    if net.part is None:
        raise ValueError(
            "Grad-CAM looks between two blocks, but this network names none. Use conv4 or a resnet."
        )
    if not 0 < block < net.depth:
        raise ValueError(f"block={block} must be from 1 to {net.depth - 1}, the last block.")
    part = net.part
    maps = part(params, x, 0, block)
    if maps.ndim != 4:
        raise ValueError(
            f"Grad-CAM needs images, but in front of block {block} there are vectors. Use conv4 "
            "or a resnet."
        )
    logits = lambda maps: jnp.sum(part(params, maps, block, net.depth) * classes)
    weights = jnp.mean(jax.grad(logits)(maps), axis=(1, 2))
    cam = jax.nn.relu(jnp.einsum("nhwk,nk->nhw", maps, weights))
    cam = cam - jnp.min(cam, axis=(1, 2), keepdims=True)
    return cam / (1e-7 + jnp.max(cam, axis=(1, 2), keepdims=True))

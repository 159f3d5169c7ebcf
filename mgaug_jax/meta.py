"""The outer loop, top to bottom: episode -> masks -> adapt -> meta-gradient -> update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgaug_jax.checks import check_function, check_kind
from mgaug_jax.losses import accuracy
from mgaug_jax.resize import resize_task
from mgaug_jax.sharding import over_tasks
from mgaug_jax.types import (
    Array,
    Make,
    MetaParams,
    Method,
    Net,
    Params,
    Probe,
    Task,
    Term,
    Views,
)

Info = dict[str, Any]


def subnet(net: Net, mask: Params) -> Net:
    """`net` with its weights multiplied by `mask` forwards, and hence every gradient backwards. No
    inner loop moves what is pruned, whatever is added to its gradients.
    """

    def masked(f):
        return f and (lambda params, *rest: f(jax.tree.map(jnp.multiply, params, mask), *rest))

    both = mask if net.mask is None else jax.tree.map(jnp.multiply, net.mask, mask)
    return net._replace(
        apply=masked(net.apply),
        apply_by_first=masked(net.apply_by_first),
        part=masked(net.part),
        mask=both,
    )


def adapted_loss(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
    """The plain judge: the loss of the query, and its outputs, after adapting on the support."""
    learner = make(net)
    outputs = learner.predict(learner.adapt(key, params, task.support), task.query.x)
    return learner.loss(outputs, task.query.y), outputs


class View(NamedTuple):
    """What one network makes of one task.

    Attributes:
      loss: Query loss after adaptation.
      logits: Query outputs `[n, d]`.
      grads: Gradient of `loss` with respect to the meta-parameters, through the inner loop.
    """

    loss: Array
    logits: Array
    grads: MetaParams


def view(
    method: Method, key: Array, params: MetaParams, task: Task, mask: Params | None = None
) -> View:
    """Adapts the network (masked by `mask`, if given) on the support and judges it on the query."""
    net = method.net if mask is None else subnet(method.net, mask)
    make = lambda net: method.algorithm(net, method.inner)
    judge = method.judge or adapted_loss
    outer_loss = lambda params: judge(key, net, make, params, task)
    (loss, logits), grads = jax.value_and_grad(outer_loss, has_aux=True)(params)
    return View(loss, logits, grads)


def probe(method: Method, params: MetaParams, task: Task, grads: MetaParams) -> Probe:
    """What the pruner is shown of a task: the full view's gradient, the loss before adapting."""
    learner = method.algorithm(method.net, method.inner)

    def query_loss(weights: Params) -> Array:
        fast = learner.start(params._replace(net=weights), task.support)
        return learner.loss(learner.predict(fast, task.query.x), task.query.y)

    return Probe(grads.net, query_loss)


def meta_gradient(
    method: Method, key: Array, params: MetaParams, tasks: Task, shared: Array | None = None
) -> tuple[MetaParams, Info]:
    """Gradient of `method.reduce` over tasks of `views.reduce` over networks (Eq. 7), every task's
    part times what `method.weigh` makes of them; plus the gradients of `method.terms`.

    Every view's gradient is taken on its own; the reductions then weigh them by their derivative
    with respect to the losses, which is the chain rule: sum, mean, maximum or anything else.

    Args:
      method: The method.
      key: Randomness of the inner loops, masks and resolutions.
      params: Meta-parameters.
      tasks: A meta-batch, every leaf with a leading axis T.
      shared: Key of the resolutions in place of `key`: one for all members of a sweep, since a
        choice between branches that is vmapped computes them all.

    Returns:
      The gradient, and the step's info: `loss`, the objective (without what an outer rule adds to
      the gradient alone: L2, MR-MAML(W)'s divergence); `query_loss` and, where `y` has more than
      one column, `accuracy` of the full networks after adaptation, means over tasks;
      and `finite`, whether the losses and gradients of every task's networks are, `bool [T]`.
    """
    # One split, whatever the method has: adding a part leaves the draws of the others alone.
    k_inner, k_masks, k_views, k_augment, k_terms = jax.random.split(key, 5)
    if method.augment is not None:
        tasks = jax.vmap(method.augment)(task_keys(k_augment, tasks), tasks)
    views = method.views

    def full_view(params: MetaParams, key: Array, task: Task):
        full = view(method, key, params, task)
        info = {"query_loss": full.loss}
        if task.query.y.shape[-1] > 1:
            info["accuracy"] = accuracy(full.logits, task.query.y)
        return (full.loss, full.grads), info

    full, info = over_tasks(method, full_view, params, task_keys(k_inner, tasks), tasks)

    def combine(per_view, over_views) -> tuple[MetaParams, Array, dict[str, Array]]:
        """Losses `[T, V]` and gradients `[T, V, ...]` to the gradient of the objective, its value,
        and what of it is finite.
        """
        losses, grads = per_view
        objective = lambda losses: method.reduce(jax.vmap(over_views)(losses))
        loss, weights = jax.value_and_grad(objective)(losses)
        if method.weigh is not None:
            per_task = lambda g: jax.vmap(partial(jnp.tensordot, axes=1))(weights, g)
            weights = weights * method.weigh(jax.tree.map(per_task, grads))[:, None]
        finite = {"loss": all_finite(losses, 1), "gradient": all_finite(grads, 1)}
        return jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=2), grads), loss, finite

    def plain():
        return combine(jax.tree.map(lambda leaf: leaf[:, None], full), over_views=jnp.sum)

    def augmented(views: Views):
        def task_masks(params: MetaParams, key: Array, task: Task, grads: MetaParams) -> Params:
            shown = probe(method, params, task, grads)
            return views.masks(key, method.net, params.net, shown)

        keys = task_keys(k_masks, tasks)
        masks = over_tasks(method, task_masks, params, keys, tasks, full[1])
        pruned = _pruned_views(method, views, k_views, params, tasks, masks, shared)
        join = lambda full, rest: jnp.concatenate([full[:, None], rest], 1)
        return combine(jax.tree.map(join, full, pruned), over_views=views.reduce)

    if views is None:
        grads, loss, finite = plain()
    elif views.active is True:
        grads, loss, finite = augmented(views)
    else:
        grads, loss, finite = jax.lax.cond(views.active, lambda: augmented(views), plain)
    for i, term in enumerate(method.terms):
        value, more = _term(method, term, jax.random.fold_in(k_terms, i), params, tasks)
        loss, grads = loss + value, jax.tree.map(jnp.add, grads, more)
    return grads, {"loss": loss, **jax.tree.map(jnp.mean, info), "finite": finite}


def all_finite(tree: Any, axes: int = 0) -> Array:
    """Whether the numbers of a tree are, over all but the first `axes` axes of its leaves."""
    each = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]
    each = [jnp.all(leaf, axis=tuple(range(axes, leaf.ndim))) for leaf in each]
    return jnp.all(jnp.stack(each), axis=0)


def _term(
    method: Method, term: Term, key: Array, params: MetaParams, tasks: Task
) -> tuple[Array, MetaParams]:
    """A term of the objective and its gradient, by the chain rule through its values."""
    learner = method.algorithm(method.net, method.inner)

    def one(params: MetaParams, key: Array, task: Task):
        return jax.value_and_grad(lambda params: term.measure(key, learner, params, task))(params)

    values, grads = over_tasks(method, one, params, task_keys(key, tasks), tasks)
    value, weights = jax.value_and_grad(term.combine)(values)
    return value, jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), grads)


def _pruned_views(
    method: Method,
    views: Views,
    key: Array,
    params: MetaParams,
    tasks: Task,
    masks: Params,
    shared: Array | None,
) -> tuple[Array, MetaParams]:
    """Losses `[T, U]` and gradients `[T, U, ...]` of the sub-networks `masks [T, U, ...]`."""
    numbers = jnp.arange(views.count)

    def split(u: Array) -> tuple[Array, Array]:
        k_view, k_size = jax.random.split(jax.random.fold_in(key, u))
        return k_view, k_size

    def one(params: MetaParams, key: Array, task: Task, mask: Params):
        seen = view(method, key, params, task, mask)
        return seen.loss, seen.grads

    k_views, k_sizes = jax.vmap(split)(numbers)
    if not views.sizes:  # pairs of task and sub-network are one batch
        of_task = lambda t: jax.vmap(jax.random.fold_in, (0, None))(k_views, t)
        keys = jax.vmap(of_task)(jnp.arange(len(tasks.query.y)))
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
        each = jax.tree.map(lambda leaf: jnp.repeat(leaf, views.count, axis=0), tasks)
        found = over_tasks(method, one, params, flat(keys), each, jax.tree.map(flat, masks))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, views.count, *leaf.shape[1:]), found)

    def at(size: int, keys: Array, masks: Params):
        sized = lambda params, key, task, mask: one(params, key, resize_task(task, size), mask)
        return over_tasks(method, sized, params, keys, tasks, masks)

    def one_view(k_view: Array, k_size: Array, masks: Params):
        # One resolution for all tasks, by an index that is not batched: of the branches, each at
        # its own size, only the chosen one runs.
        index = jax.random.randint(k_size, (), 0, len(views.sizes))
        keys = task_keys(k_view, tasks)
        return jax.lax.switch(index, [partial(at, size) for size in views.sizes], keys, masks)

    if shared is not None:
        k_sizes = jax.vmap(jax.random.fold_in, (None, 0))(shared, numbers)
    by_view = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), masks)
    found = jax.lax.map(lambda args: one_view(*args), (k_views, k_sizes, by_view))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), found)


def task_keys(key: Array, tasks: Task) -> Array:
    """A key for each of the T tasks; that of task t depends on t and `key` alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(tasks.query.y)))


class State(NamedTuple):
    """All that the next meta-step needs.

    Attributes:
      step: Meta-steps done, int32.
      params: Meta-parameters.
      opt: State of the outer optimiser.
    """

    step: Array
    params: MetaParams
    opt: Any


class Trainer(NamedTuple):
    """Meta-training as two pure functions.

    Attributes:
      init: `key -> State`.
      step: `(key, state, tasks, shared=None) -> (state, info)`, one meta-update; `info["finite"]`
        says of `loss` and `gradient`, task by task, and of the new `parameters` (with the
        optimiser's state and the objective), whether they are. `shared` as in `meta_gradient`.
    """

    init: Callable[[Array], State]
    step: Callable[..., tuple[State, Info]]


def trainer(
    method: Method | Callable[[Array], Method], optimizer: optax.GradientTransformation
) -> Trainer:
    """The trainer of `method` with the outer `optimizer` (the papers: `optax.adam(1e-3)`).

    Any number of a method may depend on the meta-step: give `step -> Method`, and the number is
    traced, so nothing is compiled again.

    Raises:
      ValueError: `method` or `optimizer` is neither.
    """
    if not isinstance(method, Method):
        check_function("method", method, "lambda step: maml(net), unless it is one")
    check_kind("optimizer", optimizer, optax.GradientTransformation, "optax.adam(1e-3)")
    at = method if not isinstance(method, Method) else lambda step: method
    rule = optax.with_extra_args_support(optimizer)

    def init(key: Array) -> State:
        first = at(jnp.zeros((), jnp.int32))
        params = first.algorithm(first.net, first.inner).init(key)
        return State(jnp.zeros((), jnp.int32), params, first.outer(rule).init(params))

    def step(
        key: Array, state: State, tasks: Task, shared: Array | None = None
    ) -> tuple[State, Info]:
        k_grad, k_outer = jax.random.split(key)
        now = at(state.step)
        grads, info = meta_gradient(now, k_grad, state.params, tasks, shared)
        tx = now.outer(rule)
        updates, opt = tx.update(grads, state.opt, state.params, key=k_outer)
        params = jax.tree.map(jnp.add, state.params, updates)
        if now.project is not None:
            params = params._replace(net=now.project(state.params.net, params.net))
        info["finite"]["parameters"] = all_finite((params, opt, info["loss"]))
        return State(state.step + 1, params, opt), info

    return Trainer(init, step)

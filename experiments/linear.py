"""The linear learner of `experiments.bound`: its tasks, its meta-training and its bounds.

A task labels Gaussian points by a hyperplane near one that all tasks share, and flips a few labels.
It holds no flags.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.seeds import over_seeds
from mgaug_jax import bounds, divergences, maml, meta, mgaug
from mgaug_jax.divergences import LAWS
from mgaug_jax.loops import run
from mgaug_jax.meta import trainer
from mgaug_jax.types import Array, Examples, MetaParams, Method, Net, Probe, Role, Task

NOISE = [0.05 * 2**i for i in range(8)]
FRESH_TASKS, FRESH_POINTS = 1000, 300


class Problem(NamedTuple):
    """What stays the same while rho, T and m are varied.

    Attributes:
      dim: Weights of the classifier.
      spread: How far the tasks' hyperplanes lie apart.
      flip: Share of labels that are flipped.
      steps: Meta-steps that learn the prior.
      draws: Networks drawn for an empirical error, of all tasks together.
      delta: The bounds hold with probability 1 - delta.
      pruner: A name in `divergences.LAWS`.
    """

    dim: int = 16
    spread: float = 0.5
    flip: float = 0.05
    steps: int = 300
    draws: int = 8000
    delta: float = 0.1
    pruner: str = "bernoulli"


class Point(NamedTuple):
    """What is free: standard deviations of noise, prior and hyper-prior."""

    std: Any
    prior_std: Any
    hyper_std: Any


def grid(ratios: Sequence[float], hyper_stds: Sequence[float]) -> Point:
    """Every combination with the noises, leading axis G."""
    points = np.meshgrid(NOISE, ratios, hyper_stds, indexing="ij")
    std, ratio, hyper_std = (jnp.asarray(axis.ravel(), jnp.float32) for axis in points)
    return Point(std, std * ratio, hyper_std)


HALF, ALL = (([1.0, 1.5], [1.0]), ([1.0], [1.0, 3.0]))
KAPPAS = (0.25, 0.5, 1.0)


# --- the problem ----------------------------------------------------------------------------


def linear(dim: int) -> Net:
    """Class 1 where `x w > 0`; every weight is prunable, and a channel to width pruning."""

    def apply(params, x):
        logit = x @ params["w"]
        return jnp.stack([jnp.zeros_like(logit), logit], axis=-1)

    return Net(lambda key: {"w": jnp.zeros(dim)}, apply, {"w": Role(prunable=True, width=0)})


@partial(jax.jit, static_argnums=(0, 2, 3))
def draw_tasks(problem: Problem, key: Array, count: int, samples: int) -> Examples:
    """Samples of new tasks, `[T, m, ...]`."""
    k_tasks, k_x, k_flip = jax.random.split(key, 3)
    planes = 1 + problem.spread * jax.random.normal(k_tasks, (count, problem.dim))
    x = jax.random.normal(k_x, (count, samples, problem.dim))
    above = jnp.einsum("tmd,td->tm", x, planes) > 0
    flips = jax.random.bernoulli(k_flip, problem.flip, above.shape)
    return Examples(x, jax.nn.one_hot((above ^ flips).astype(int), 2))


def cut(examples: Examples, *at: slice) -> list[Examples]:
    """Parts of every task's samples."""
    return [jax.tree.map(lambda x, part=part: x[:, part], examples) for part in at]


def halves(tasks: Examples) -> Task:
    """Every task's samples as support and query."""
    half = tasks.y.shape[1] // 2
    return Task(*cut(tasks, slice(half), slice(half, None)))


def plain(problem: Problem) -> Method:
    return maml(linear(problem.dim), lr=2.0, steps=1)


@partial(jax.jit, static_argnums=0)
def learn(problem: Problem, key: Array, tasks: Examples, keep: Array) -> MetaParams:
    """Meta-training on batches of the tasks given, with one sub-network."""

    def sample(key: Array, data: Examples) -> Task:
        rows = jax.random.randint(key, (16,), 0, len(data.y))
        return halves(jax.tree.map(lambda leaf: leaf[rows], data))

    k_init, k_run = jax.random.split(key)
    prune = mgaug(LAWS[problem.pruner].prune, keep=keep, cap=1.0, subnets=1)
    made = trainer(prune(plain(problem)), optax.adam(0.03))
    return run(made, sample, k_run, made.init(k_init), tasks, problem.steps)[0].params


# --- the bounds -----------------------------------------------------------------------------


def upper(errors: Array, delta: Any) -> Array:
    """The upper end of a Monte-Carlo mean, which takes a tenth of `delta`: an end alone fails half
    as often as the interval.
    """
    return bounds.monte_carlo(errors, 0.2 * delta).high


class Means(NamedTuple):
    """Draws of the prior's mean, what adaptation makes of each, and the gradient that CP scores
    weights with; leaves `[T, draws, ...]`.
    """

    prior: Any
    adapted: Any
    grads: Any


@partial(jax.jit, static_argnums=(0, 5))
def learned(
    problem: Problem, key: Array, params: MetaParams, seen: Examples, kappa: float, draws: int
) -> Means:
    """Adaptation from draws of the prior's mean around the meta-parameters, with std `kappa`."""
    method = plain(problem)
    learner = method.algorithm(method.net, method.test)
    assert learner.weights is not None

    def one(seen: Examples, key: Array) -> Means:
        k_prior, k_adapt = jax.random.split(key)
        noise = optax.tree.random_like(k_prior, params.net, jax.random.normal)
        prior = jax.tree.map(lambda w, e: w + kappa * e, params.net, noise)
        start = params._replace(net=prior)
        adapted = learner.weights(learner.adapt(k_adapt, start, seen))
        grads = prior
        if LAWS[problem.pruner].keep is None:  # this inner loop draws nothing
            grads = meta.view(method, jax.random.key(0), start, Task(seen, seen)).grads.net
        return Means(prior, adapted, grads)

    keys = jax.random.split(key, (len(seen.y), draws))
    return jax.vmap(jax.vmap(one, (None, 0)))(seen, keys)


@partial(jax.jit, static_argnums=0)
def judged(
    problem: Problem, key: Array, means: Means, examples: Examples, keep: Array, points: Point
) -> tuple[Array, Array]:
    """Errors and divergences `[G, T, draws]` of `learned` means, a mask and noise for each."""
    net, law = linear(problem.dim), LAWS[problem.pruner]
    nothing: Any = None

    def one(point: Point, examples: Examples, means: Means, key: Array) -> tuple[Array, Array]:
        probe = Probe(means.grads, nothing)
        masks = lambda key: law.prune(key, net, means.prior, probe, keep)
        moved = jax.tree.map(jnp.subtract, means.adapted, means.prior)
        # a mask that has to be paid for is the task's own, whatever the key
        kl = law.kl(net, moved, masks(jax.random.key(0)), keep, point.std, point.prior_std)
        errors = bounds.pruned_errors(key, net, means.adapted, masks, examples, point.std, 1)
        return errors[0], kl

    keys = jax.random.split(key, jax.tree.leaves(means)[0].shape[:2])
    each = jax.vmap(jax.vmap(one, (None, None, 0, 0)), (None, 0, 0, 0))
    return jax.lax.map(lambda point: each(point, examples, means, keys), points)


def measure(problem: Problem, rho: float, tasks: int, samples: int, seed: int) -> dict[str, Any]:
    """All bounds of one setting, and the error on new tasks."""
    keep, delta = jnp.asarray(1 - rho), problem.delta
    draws = math.ceil(problem.draws / tasks)
    k_data, k_prior, k_half, k_all, k_alone, k_new = jax.random.split(jax.random.key(seed), 6)
    data = draw_tasks(problem, k_data, 2 * tasks, samples)
    first, second = (jax.tree.map(lambda x, i=i: x[i::2], data) for i in (0, 1))
    omega = learn(problem, k_prior, first, keep)

    def over(key, start, examples, kappa, points):
        k_learn, k_judge = jax.random.split(key)
        means = learned(problem, k_learn, start, examples, kappa, draws)
        return *judged(problem, k_judge, means, examples, keep, points), points

    def eq8(found, delta, kappa=0.0, hyper_kl=divergences.no_hyper_kl) -> bounds.Bound:
        errors, kl, point = found
        hyper = hyper_kl(omega.net, kappa, point.hyper_std)
        kl = jnp.mean(kl, axis=1)
        return bounds.meta_bound(upper(errors, delta), hyper, kl, samples, len(kl), 0.9 * delta)

    def single_task(found, delta) -> bounds.Bound:
        errors, kl, _ = found
        slack = bounds.slack(jnp.mean(kl, axis=1), samples, 0.9 * delta)
        return bounds.Bound(upper(errors, delta), jnp.zeros(()), jnp.mean(slack))

    half = grid(*HALF)
    best, (_, kl, point) = bounds.over_grid(eq8, over(k_half, omega, second, 0.0, half), delta)
    hyper = []
    for kappa, key in zip(KAPPAS, jax.random.split(k_all, len(KAPPAS)), strict=True):
        go = partial(eq8, kappa=kappa, hyper_kl=divergences.gaussian_hyper_kl)
        found = over(key, omega, data, kappa, grid(*ALL))
        hyper.append(float(bounds.over_grid(go, found, delta / len(KAPPAS))[0].total))
    zero = jax.tree.map(jnp.zeros_like, omega)
    alone, _ = bounds.over_grid(single_task, over(k_alone, zero, second, 0.0, half), delta)

    k_tasks, k_learn, k_judge, k_held, k_still = jax.random.split(k_new, 5)
    fresh = draw_tasks(problem, k_tasks, FRESH_TASKS, samples + FRESH_POINTS)
    seen, unseen = cut(fresh, slice(samples), slice(samples, None))
    means = learned(problem, k_learn, omega, seen, 0.0, 4)
    chosen = jax.tree.map(lambda leaf: leaf[None], point)
    errors = judged(problem, k_judge, means, unseen, keep, chosen)[0]
    by_task = np.asarray(jnp.mean(errors, axis=(0, 2)))

    held = halves(second)
    means = learned(problem, k_held, omega, held.support, 0.0, 1)
    still = Point(*(jnp.full(1, value) for value in (1e-9, 1.0, 1.0)))
    left, _ = judged(problem, k_still, means, held.query, jnp.ones(()), still)
    found = {
        **best._asdict(),
        "total": best.total,
        "kl": jnp.mean(kl),
        "norm": optax.tree.norm(omega.net),
        "std": point.std,
        "prior_std": point.prior_std,
        "error": by_task.mean(),
        "half_width": 1.96 * by_task.std() / len(by_task) ** 0.5,
        "all_tasks": min(hyper),
        "kappa": KAPPAS[int(np.argmin(hyper))],
        "mr_maml": bounds.mr_maml_bound(left, 0.0, samples - samples // 2, tasks, delta),
        "alone": alone.total,
    }
    return {
        "rho": rho,
        "tasks": tasks,
        "samples": samples,
        **{name: float(value) for name, value in found.items()},
    }


def measured(problem: Problem, seeds: Sequence[int], **setting: Any) -> dict[str, Any]:
    """Means of `measure` over seeds, and under `intervals` half widths of their 95 % intervals
    (Student's t; NaN for one seed).
    """
    each = [measure(problem, **setting, seed=seed) for seed in seeds]
    found = {name: over_seeds([row[name] for row in each]) for name in each[0]}
    means = {name: mean for name, (mean, _) in found.items()} | setting
    return means | {"intervals": {name: half for name, (_, half) in found.items()}}

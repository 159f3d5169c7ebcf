"""How tight MGAug's Theorem 1 gets where it says something: many small tasks, a linear learner.

    python -m experiments.bound --out=DIR [--rho=0.1 --tasks=1000 --samples=400]

A task labels Gaussian points by a hyperplane near one that all tasks share, and flips a few labels.
A linear classifier is meta-trained (MAML with a sub-network of PP) on one half of the tasks. Its
weights are the centre of the prior, and the bound is evaluated on the other half, of --tasks tasks:
the posterior of a task is what adaptation makes of all its samples, plus noise, pruned at random.
So D(Q || P) is 0 and only what adaptation moves is paid for. The standard deviations of noise and
prior are chosen on a grid, which costs a union bound; the empirical term is the upper end of a
Monte-Carlo interval, which costs a tenth of --delta. Every number holds with 1 - delta.

rho, T and m are varied one at a time around --rho, --tasks and --samples. Beside the bound:

  error      on new tasks, measured on fresh ones (it must lie below)
  all tasks  the same without a half set aside, on 2 T tasks: hyper-posterior N(omega, kappa^2 I),
             learners that start from its draws, D(Q || P) paid in both terms. The mean divergence
             is a Monte-Carlo mean without an interval.
  MR-MAML    its Theorem 1: adapts on half of every task's samples, is judged on the others, without
             noise or pruning; the shared weights, learned on other tasks, cost nothing
  alone      McAllester's bound of tasks that learn alone, from weights of 0: mean over tasks of
             numbers of which each holds for its own task, and says nothing about new ones

Writes bound.json and bound.png into --out.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli, plots, store
from mgaug_jax import bounds, divergences, maml, pp, pruning
from mgaug_jax.meta import run, trainer
from mgaug_jax.types import Array, Examples, MetaParams, Method, Net, Role, Task

NOISE = [0.05 * 2**i for i in range(8)]
FRESH_TASKS, FRESH_POINTS = 1000, 300

FLAGS = flags.FLAGS
flags.DEFINE_float("rho", 0.1, "Pruning rate, where it is not varied.")
flags.DEFINE_integer("tasks", 1000, "Observed tasks T, where not varied; as many train the prior.")
flags.DEFINE_integer("samples", 400, "Samples per task m, where not varied.")
flags.DEFINE_list("rhos", ["0", "0.1", "0.25", "0.5"], "Values of rho.")
flags.DEFINE_list("task_counts", ["30", "100", "300", "1000", "3000"], "Values of T.")
flags.DEFINE_list("sample_counts", ["50", "100", "200", "400", "800"], "Values of m.")
flags.DEFINE_integer("dim", 16, "Weights of the classifier.")
flags.DEFINE_float("spread", 0.5, "How far the tasks' hyperplanes lie apart; 0: all are one.")
flags.DEFINE_float("flip", 0.05, "Share of labels that are flipped: no learner's error is less.")
flags.DEFINE_integer("steps", 300, "Meta-steps that learn the prior.")
flags.DEFINE_integer("draws", 8000, "Networks drawn for an empirical error, of all tasks together.")
flags.DEFINE_float("delta", 0.1, "The bounds hold with probability 1 - delta.")
flags.DEFINE_integer("seed", 0, "Seed.")
flags.DEFINE_string("out", None, "Folder to write to.")


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


HALF = grid([1.0, 1.5], [1.0])
ALL, KAPPAS = grid([1.0], [1.0, 3.0]), (0.25, 0.5, 1.0)


def main(arguments: Sequence[str]) -> int:
    del arguments
    sweeps = {
        "rho": numbers("rhos", FLAGS.rhos, float),
        "tasks": numbers("task_counts", FLAGS.task_counts, int),
        "samples": numbers("sample_counts", FLAGS.sample_counts, int),
    }
    base = {"rho": FLAGS.rho, "tasks": FLAGS.tasks, "samples": FLAGS.samples}
    settings = [base, *({**base, name: v} for name, values in sweeps.items() for v in values)]
    for setting in settings:
        if not 0 <= setting["rho"] < 1:
            raise cli.BadInput(f"rho={setting['rho']} must be in [0, 1).")
        if min(setting["tasks"], setting["samples"]) < 4:
            raise cli.BadInput("tasks and samples must be 4 or more.")
    for name in ("dim", "steps", "draws"):
        if FLAGS[name].value < 1:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} must be 1 or more.")
    if not 0 < FLAGS.delta < 1 or not 0 <= FLAGS.flip <= 0.5:
        raise cli.BadInput("--delta must lie between 0 and 1, --flip between 0 and 0.5.")
    folder = store.output(FLAGS.out)
    rows, done = {}, {}
    for name, values in sweeps.items():
        rows[name] = []
        for value in values:
            setting = {**base, name: value}
            key = tuple(setting.values())
            if key not in done:
                done[key] = measure(**setting)
                print(line(done[key]), flush=True)
            rows[name].append(done[key])
    flagged = {name: FLAGS[name].value for name in ("dim", "spread", "flip", "steps", "draws")}
    report = {"base": base, **flagged, "delta": FLAGS.delta, "seed": FLAGS.seed, "rows": rows}
    store.write_json(folder / "bound.json", report | {"versions": store.versions()})
    plots.bound(rows, folder / "bound.png")
    return 0


def numbers(name: str, texts: Sequence[str], kind: type) -> list:
    """The numbers of a list flag."""
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        raise cli.BadInput(f"--{name}={','.join(texts)} must be numbers.") from error


# --- the problem ----------------------------------------------------------------------------


def linear(dim: int) -> Net:
    """Class 1 where `x w > 0`; every weight is prunable."""

    def apply(params, x):
        logit = x @ params["w"]
        return jnp.stack([jnp.zeros_like(logit), logit], axis=-1)

    return Net(lambda key: {"w": jnp.zeros(dim)}, apply, {"w": Role(prunable=True)})


@partial(jax.jit, static_argnums=(1, 2))
def draw_tasks(key: Array, count: int, samples: int) -> Examples:
    """Samples of new tasks, `[T, m, ...]`."""
    k_tasks, k_x, k_flip = jax.random.split(key, 3)
    planes = 1 + FLAGS.spread * jax.random.normal(k_tasks, (count, FLAGS.dim))
    x = jax.random.normal(k_x, (count, samples, FLAGS.dim))
    above = jnp.einsum("tmd,td->tm", x, planes) > 0
    flips = jax.random.bernoulli(k_flip, FLAGS.flip, above.shape)
    return Examples(x, jax.nn.one_hot((above ^ flips).astype(int), 2))


def cut(examples: Examples, *at: slice) -> list[Examples]:
    """Parts of every task's samples."""
    return [jax.tree.map(lambda x, part=part: x[:, part], examples) for part in at]


def halves(tasks: Examples) -> Task:
    """Every task's samples as support and query."""
    half = tasks.y.shape[1] // 2
    return Task(*cut(tasks, slice(half), slice(half, None)))


@jax.jit
def learn(key: Array, tasks: Examples, keep: Array) -> MetaParams:
    """Meta-training on batches of the tasks given, with one sub-network of PP."""

    def sample(key: Array, data: Examples) -> Task:
        rows = jax.random.randint(key, (16,), 0, len(data.y))
        return halves(jax.tree.map(lambda leaf: leaf[rows], data))

    k_init, k_run = jax.random.split(key)
    prune = pp(pruner=pruning.bernoulli_parameters, keep=keep, cap=1.0, subnets=1)
    made = trainer(prune(plain()), optax.adam(0.03))
    return run(made, sample, k_run, made.init(k_init), tasks, FLAGS.steps)[0].params


def plain() -> Method:
    return maml(linear(FLAGS.dim), lr=2.0, steps=1)


# --- the bounds -----------------------------------------------------------------------------


@partial(jax.jit, static_argnums=4)
def learned(
    key: Array, params: MetaParams, seen: Examples, kappa: float, draws: int
) -> tuple[Any, Any]:
    """Draws of the prior's mean around the meta-parameters, and what adaptation makes of each.

    Leaves `[T, draws, ...]`.
    """
    method = plain()
    learner = method.algorithm(method.net, method.test)

    def one(seen: Examples, key: Array) -> tuple[Any, Any]:
        k_prior, k_adapt = jax.random.split(key)
        noise = optax.tree.random_like(k_prior, params.net, jax.random.normal)
        prior = jax.tree.map(lambda w, e: w + kappa * e, params.net, noise)
        fast = learner.adapt(k_adapt, params._replace(net=prior), seen)
        return prior, fast if learner.weights is None else learner.weights(fast)

    keys = jax.random.split(key, (len(seen.y), draws))
    return jax.vmap(jax.vmap(one, (None, 0)))(seen, keys)


@jax.jit
def judged(
    key: Array, means: tuple[Any, Any], examples: Examples, keep: Array, points: Point
) -> tuple[Array, Array]:
    """Errors and divergences `[G, T, draws]` of `learned` means, a mask and noise for each."""
    net = linear(FLAGS.dim)
    nothing: Any = None

    def one(point: Point, examples: Examples, prior, adapted, key: Array) -> tuple[Array, Array]:
        masks = lambda key: pruning.bernoulli_parameters(key, net, prior, nothing, keep)
        probability = divergences.bernoulli_keep(net, prior, keep)
        kl = divergences.centred_kl(adapted, prior, probability, point.std, point.prior_std)
        return bounds.pruned_errors(key, net, adapted, masks, examples, point.std, 1)[0], kl

    keys = jax.random.split(key, jax.tree.leaves(means)[0].shape[:2])
    each = jax.vmap(jax.vmap(one, (None, None, 0, 0, 0)), (None, 0, 0, 0, 0))
    return jax.lax.map(lambda point: each(point, examples, *means, keys), points)


def measure(rho: float, tasks: int, samples: int) -> dict[str, Any]:
    """All bounds of one setting, and the error on new tasks."""
    keep, delta = jnp.asarray(1 - rho), FLAGS.delta
    draws = math.ceil(FLAGS.draws / tasks)
    k_data, k_prior, k_half, k_all, k_alone, k_new = jax.random.split(jax.random.key(FLAGS.seed), 6)
    data = draw_tasks(k_data, 2 * tasks, samples)
    first, second = (jax.tree.map(lambda x, i=i: x[i::2], data) for i in (0, 1))
    omega = learn(k_prior, first, keep)

    def over(key, start, examples, kappa, grid):
        k_learn, k_judge = jax.random.split(key)
        means = learned(k_learn, start, examples, kappa, draws)
        return *judged(k_judge, means, examples, keep, grid), grid

    def upper(errors: Array, delta) -> Array:
        """The upper end alone fails half as often as the interval: with a tenth of delta."""
        return bounds.monte_carlo(errors, 0.2 * delta).high

    def eq8(found, delta, kappa=0.0, hyper_kl=divergences.no_hyper_kl) -> bounds.Bound:
        errors, kl, point = found
        hyper = hyper_kl(omega.net, kappa, point.hyper_std)
        kl = jnp.mean(kl, axis=1)
        return bounds.meta_bound(upper(errors, delta), hyper, kl, samples, len(kl), 0.9 * delta)

    def single_task(found, delta) -> bounds.Bound:
        errors, kl, _ = found
        slack = bounds.slack(jnp.mean(kl, axis=1), samples, 0.9 * delta)
        return bounds.Bound(upper(errors, delta), jnp.zeros(()), jnp.mean(slack))

    best, (_, kl, point) = bounds.over_grid(eq8, over(k_half, omega, second, 0.0, HALF), delta)
    hyper = []
    for kappa, key in zip(KAPPAS, jax.random.split(k_all, len(KAPPAS)), strict=True):
        go = partial(eq8, kappa=kappa, hyper_kl=divergences.gaussian_hyper_kl)
        found = over(key, omega, data, kappa, ALL)
        hyper.append(float(bounds.over_grid(go, found, delta / len(KAPPAS))[0].total))
    zero = jax.tree.map(jnp.zeros_like, omega)
    alone, _ = bounds.over_grid(single_task, over(k_alone, zero, second, 0.0, HALF), delta)

    k_tasks, k_learn, k_judge, k_held, k_still = jax.random.split(k_new, 5)
    fresh = draw_tasks(k_tasks, FRESH_TASKS, samples + FRESH_POINTS)
    seen, unseen = cut(fresh, slice(samples), slice(samples, None))
    means = learned(k_learn, omega, seen, 0.0, 4)
    chosen = jax.tree.map(lambda leaf: leaf[None], point)
    by_task = np.asarray(jnp.mean(judged(k_judge, means, unseen, keep, chosen)[0], axis=(0, 2)))

    held = halves(second)
    means = learned(k_held, omega, held.support, 0.0, 1)
    still = Point(*(jnp.full(1, value) for value in (1e-9, 1.0, 1.0)))
    left, _ = judged(k_still, means, held.query, jnp.ones(()), still)
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


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    return (
        "rho {rho} T {tasks} m {samples}: bound {total:.3f} = {empirical:.3f} empirical + "
        "{environment:.3f} environment + {task:.3f} task (KL {kl:.2f}, std {std:.2g}); "
        "error {error:.3f} ± {half_width:.3f}; all tasks {all_tasks:.3f}, "
        "MR-MAML {mr_maml:.3f}, alone {alone:.3f}"
    ).format(**row)


if __name__ == "__main__":
    cli.start(main, __doc__)

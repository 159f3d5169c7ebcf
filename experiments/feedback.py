"""Feedback from meta-test to meta-train, in its four phases, beside the control it needs.

    python -m experiments.feedback --data=glyphs --method='fomaml(lr=0.1,steps=5)' --out=DIR

1. train:    --steps meta-steps of the method, for every seed;
2. probe:    the gradients of --probes test tasks are stored, by their support sets alone;
3. re-train: --retrain_steps more, training tasks weighted by the similarity of their gradients to
             the stored ones, with a fresh Adam at --outer_lr; from the trained parameters, or from
             the initial ones (--begin=scratch);
4. evaluate: on the probed tasks and on unrelated test tasks.

Every number is shown after phase 1 ("before"), after re-training with weights ("feedback") and
after re-training as long with equal weights ("control"): only feedback minus control tells what
feedback does. With --refresh=k the gradients are stored anew every k steps. With --stream every
refresh brings new test tasks, as they come in online: "probed" then is the mean over these batches,
each scored when its turn is over, and "arrival" when it comes in, before its gradients are used.
--outlier probes tasks whose support labels are moved to other images, to see what a misleading test
task does. --judge=query is a leak: it uses the labels that the probed tasks are judged by.

Writes feedback.json into --out: per-seed numbers, means and 95 % intervals over seeds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli, loading, problem, runs, scoring, seeds, store
from experiments.progress import Progress
from mgaug_jax import loops, meta, weighting
from mgaug_jax.evaluation import evaluate
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, MetaParams, Modifier, Task

WEIGHTS = ("softmax", "rectified")
JUDGES = {"support": weighting.on_support, "query": weighting.on_query}
PROBE_SEED, OTHER_SEED = 40, 41

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)", "Spec of the method.")
flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ...; each probes tasks of its own.")
flags.DEFINE_integer("probes", 1, "Test tasks whose gradients are stored.")
flags.DEFINE_string("weights", "softmax", "Of training tasks: softmax or rectified.")
flags.DEFINE_float("temperature", 0.1, "Of the softmax over cosines.")
flags.DEFINE_string("judge", "support", "What stored gradients are of: support, or query (a leak).")
flags.DEFINE_string("begin", "trained", "Where re-training begins: trained or scratch.")
flags.DEFINE_integer("retrain_steps", 200, "Meta-steps of re-training.")
flags.DEFINE_integer("refresh", 0, "Store the gradients anew every so many steps; 0: never.")
flags.DEFINE_bool("stream", False, "Every refresh probes new test tasks.")
flags.DEFINE_bool("outlier", False, "Probe tasks with random labels in their support sets.")
flags.DEFINE_integer("episodes", 200, "Unrelated test tasks.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    _check()
    folder = store.output(FLAGS.out)
    made = loading.setup(problem.config(FLAGS.method, 0, FLAGS.steps), say=print)
    begin, keys = seeds.begin(made, FLAGS.seeds)
    trained, _ = seeds.train(made, FLAGS.seeds, "phase 1, train")
    tasks = [probed_tasks(made, number) for number in range(len(turns()) if FLAGS.stream else 1)]
    start = trained if FLAGS.begin == "trained" else begin
    probed, unrelated = evaluators(made)
    found = {"before": {"probed": mean_of([probed(trained.params, batch) for batch in tasks])}}
    found["before"]["unrelated"] = unrelated(trained.params)
    for name, change in (("feedback", weighed()), ("control", None)):
        states, arrival, after = retrain(made, trained, start, keys, tasks, change, probed)
        found[name] = {"probed": mean_of(after), "unrelated": unrelated(states.params)}
        if FLAGS.stream:
            found[name]["arrival"] = mean_of(arrival)
    report = {
        "flags": {name: FLAGS[name].value for name in _OWN},
        "problem": made.config.__dict__,
        "metric": made.metric,
        "per_seed": found,
        "summary": summary(found),
        "versions": store.versions(),
    }
    store.write_json(folder / "feedback.json", report)
    print(f"\n{made.metric} of {FLAGS.seeds} seeds, mean and 95 % interval over seeds")
    if FLAGS.judge == "query":
        print("  the stored gradients have seen the labels of the probed tasks: a leak")
    for name, (mean, half) in report["summary"].items():
        print(f"  {name:<34} {mean:+.4f} +- {half:.4f}")
    return 0


_OWN = (
    "method seeds probes weights temperature judge begin retrain_steps refresh stream outlier "
    "episodes"
).split()


def _check() -> None:
    for name in ("seeds", "probes", "retrain_steps", "episodes"):
        if FLAGS[name].value < 1:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} must be 1 or more.")
    for name, known in (
        ("weights", WEIGHTS),
        ("judge", tuple(JUDGES)),
        ("begin", ("trained", "scratch")),
    ):
        if FLAGS[name].value not in known:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} is none of {', '.join(known)}.")
    if not 0 <= FLAGS.refresh <= FLAGS.retrain_steps:
        raise cli.BadInput(f"--refresh={FLAGS.refresh} must be from 0 to --retrain_steps.")
    if FLAGS.tasks < 2:
        raise cli.BadInput("--tasks=1 leaves nothing to weigh; take 2 or more.")
    if FLAGS.outlier and FLAGS.shot == 1:
        raise cli.BadInput(
            "--outlier with --shot=1 only renames the classes (or moves nothing), which is a task "
            "like any other; take --shot=5."
        )
    if FLAGS.stream and not FLAGS.refresh:
        raise cli.BadInput("--stream needs --refresh, how many steps apart new tasks come in.")
    try:
        weighting.softmax_weights(FLAGS.temperature)
    except ValueError as error:
        raise cli.BadInput(f"--{error}") from error


def probed_tasks(made: runs.Setup, number: int) -> Task:
    """Test tasks `[seeds, P, ...]`, those of every seed and `number` its own."""

    @jax.jit
    def draw(keys: Array, data: Any) -> Task:
        one = lambda key: jax.tree.map(lambda leaf: leaf[0], made.episode(key, data))
        return jax.vmap(one)(keys)

    count = FLAGS.seeds * FLAGS.probes
    first = jax.random.fold_in(scoring.episode_key(PROBE_SEED), number)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(first, jnp.arange(count))
    tasks = draw(keys, made.splits["test"])
    split = lambda leaf: leaf.reshape(FLAGS.seeds, FLAGS.probes, *leaf.shape[1:])
    return jax.tree.map(split, tasks)


def mislabelled(tasks: Task) -> Task:
    """What is probed: with --outlier the tasks with the labels of their supports misplaced. Example
    k of class n is given class n + k, so that every class is a mixture; targets move on by one.
    """
    if not FLAGS.outlier:
        return tasks
    y = tasks.support.y
    if y.shape[-1] == 1:
        return tasks._replace(support=tasks.support._replace(y=jnp.roll(y, 1, axis=2)))
    way = y.shape[-1]
    place = jnp.arange(y.shape[2])
    wrong = jax.nn.one_hot((place // FLAGS.shot + place % FLAGS.shot) % way, way, dtype=y.dtype)
    y = jnp.broadcast_to(wrong, y.shape)
    return tasks._replace(support=tasks.support._replace(y=y))


def weighed() -> Callable[[MetaParams], Modifier]:
    """`stored gradients -> modifier`, as the flags say."""
    weights = {
        "softmax": weighting.softmax_weights(FLAGS.temperature),
        "rectified": weighting.rectified_weights,
    }[FLAGS.weights]
    return lambda stored: weighting.feedback(stored, weights=weights)


def turns() -> range:
    """The steps of re-training at which gradients are stored."""
    return range(0, FLAGS.retrain_steps, FLAGS.refresh or FLAGS.retrain_steps)


def retrain(made: runs.Setup, trained, states, keys: Array, tasks: list[Task], change, judge):
    """Phases 2 and 3, for every seed: stores gradients, the first at the trained parameters, and
    trains `change(stored)(method)` on from `states`, in turns of --refresh.

    Args:
      made: The setup.
      trained: Its states after phase 1.
      states: Where re-training begins.
      keys: Training keys of the seeds.
      tasks: Batches of test tasks: one, or one for each turn.
      change: `stored -> modifier`; None stores nothing and changes nothing.
      judge: `(params, tasks) -> scores [seeds]`.

    Returns:
      The states, and two lists with the scores of every batch: when it arrives, and when its last
      turn is over.
    """
    method = made.method(jnp.zeros((), jnp.int32))
    optimizer = optax.adam(made.config.outer_lr)
    states = states._replace(opt=jax.vmap(optimizer.init)(states.params))

    @jax.jit
    def probe(keys: Array, params: MetaParams, tasks: Task) -> MetaParams:
        one = lambda key, params, tasks: weighting.probe_gradients(
            method, key, params, tasks, JUDGES[FLAGS.judge]
        )
        return map_tasks(method.net, one, keys, params, tasks)

    @partial(jax.jit, static_argnames="count")
    def turn(keys: Array, states, stored: MetaParams | None, data: Any, count: int):
        def one(key: Array, state, stored: MetaParams | None):
            at = lambda step: change(stored)(made.method(step)) if change else made.method(step)
            learner = meta.trainer(at, optimizer)
            return loops.run(learner, made.sample, key, state, data, count)

        return map_tasks(method.net, one, keys, states, stored)

    progress = Progress("phase 3, re-train", FLAGS.retrain_steps, unit="steps")
    probe_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(keys)))
    arrival, after, steps = [], [], turns()
    for number, done in enumerate(steps):
        batch = tasks[min(number, len(tasks) - 1)]
        if number < len(tasks):
            arrival.append(judge(states.params, batch))
        at, shown = trained if number == 0 else states, mislabelled(batch)
        stored = probe(probe_keys, at.params, shown) if change else None
        count = min(steps.step, FLAGS.retrain_steps - done)
        states, info = turn(keys, states, stored, made.splits["train"], count)
        seeds.check_finite(made, np.asarray(info["query_loss"]), done)
        if number >= len(steps) - 1 or number < len(tasks) - 1:
            after.append(judge(states.params, batch))
        progress.at(done + count)
    progress.close()
    return states, arrival, after


def evaluators(made: runs.Setup):
    """Phase 4: `(params [seeds, ...], probed tasks) -> scores [seeds]`, and `params -> scores` on
    unrelated tasks.
    """
    method = made.method(jnp.zeros((), jnp.int32))
    score = scoring.score_of(made.metric)
    other = scoring.evaluator(made)

    @jax.jit
    def on_probed(params: MetaParams, tasks: Task) -> Array:
        def seed(params: MetaParams, tasks: Task) -> Array:
            draw = lambda key, task: jax.tree.map(lambda leaf: leaf[None], task)
            one = lambda task: evaluate(
                method, jax.random.key(0), params, draw, task, 1, score
            ).adapted[0]
            return jnp.mean(jax.lax.map(one, tasks))

        return map_tasks(method.net, seed, params, tasks)

    def on_unrelated(params: MetaParams) -> list[float]:
        scores = []
        for s in range(FLAGS.seeds):
            mine = jax.tree.map(lambda leaf, s=s: leaf[s], params)
            each = other(mine, made.splits["test"], OTHER_SEED, FLAGS.episodes)
            scores.append(float(each.adapted.mean()))
        return scores

    return lambda params, tasks: np.asarray(on_probed(params, tasks)), on_unrelated


def mean_of(batches: list[np.ndarray]) -> list[float]:
    """Scores [seeds], each the mean over batches of test tasks."""
    return np.mean(batches, axis=0).tolist()


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, tuple[float, float]]:
    """Means and intervals over seeds, and the paired differences to before and to the control."""
    table = {}
    for kind in ("probed", "unrelated", "arrival"):
        for name, by_kind in found.items():
            if kind in by_kind:
                table[f"{kind}, {name}"] = seeds.over_seeds(by_kind[kind])
        for base in ("before", "control"):
            if kind in found[base]:
                difference = np.subtract(found["feedback"][kind], found[base][kind])
                table[f"{kind}, feedback - {base}"] = seeds.over_seeds(difference)
    return table


if __name__ == "__main__":
    cli.start(main, __doc__)

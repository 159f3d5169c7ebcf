"""Trains with noise whose standard deviation follows label memory, in place of a sweep.

    python -m experiments.adapt_noise --data=sinusoid --labels=fixed_labels --shot=10 --queries=10 \
        --steps=5000 --method='maml(lr=0.01,steps=1)' --out=DIR \
        --noise="noise(site='outer',relative_to='gradient_rms')"

After every --every steps the network answers training tasks with their own and with permuted
labels. While the own do better than chance has it (label memory), the std of that seed grows, else
it shrinks (mgaug_jax.perturb.by_memory). Over the run it can move by --reach times: slowly, and
from --begin, more noise than is needed, since noise keeps memory from being built but hardly undoes
it. Seeds, tasks and test are those of experiments.grid, so that rows of the same flags
can be compared; the method without noise is trained beside it.

Writes adapt_noise.json into --out: both rows, and the std of every seed after every turn.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, loading, problem, scoring, seeds, spec, store, vocabulary
from mgaug_jax import perturb
from mgaug_jax.types import MetaParams, Modifier

EPISODES, KEY = 50, 60

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)", "Spec of the method without noise.")
flags.DEFINE_string("noise", "noise(site='outer',relative_to='gradient_rms')", "Spec, without std.")
flags.DEFINE_float("begin", 30.0, "First standard deviation.")
flags.DEFINE_float("reach", 50.0, "The largest ratio of two stds of a run.")
flags.DEFINE_integer("every", 50, "Meta-steps of a turn.")
flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ...")
flags.DEFINE_integer("episodes", 200, "Test episodes per seed.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    _check()
    folder = store.output(FLAGS.out)
    made = loading.setup(problem.config(FLAGS.method, 0, FLAGS.steps), say=print)
    if made.permuted is None:
        raise cli.BadInput(
            "these tasks have nothing that could be memorised by name, so label memory cannot lead "
            "the noise; take --labels=fixed_labels."
        )
    try:  # before anything trains
        change(jnp.ones(()))(made.method(jnp.zeros((), jnp.int32)))
    except ValueError as error:
        raise cli.BadInput(f"{FLAGS.noise}: {error}") from error
    memory = scoring.label_memory(made)
    path = [np.full(FLAGS.seeds, FLAGS.begin, np.float32)]
    factor = FLAGS.reach ** (FLAGS.every / FLAGS.steps)

    def adjust(stds: np.ndarray, params: MetaParams, done: int) -> np.ndarray:
        following = []
        for seed, std in enumerate(stds):
            mine = jax.tree.map(lambda leaf, s=seed: leaf[s], params)
            gains = memory(mine, KEY + done, EPISODES)
            following.append(perturb.by_memory(std, jnp.asarray(gains), factor))
        path.append(np.asarray(following))
        return path[-1]

    rows = {}
    trained = seeds.train(made, FLAGS.seeds, "without noise")
    rows["plain"] = seeds.measured(made, *trained, FLAGS.episodes)
    trained = seeds.train(
        made,
        FLAGS.seeds,
        "with noise",
        values=path[0],
        change=change,
        adjust=adjust,
        every=FLAGS.every,
    )
    rows["adapted"] = seeds.measured(made, *trained, FLAGS.episodes)
    report = {
        "problem": made.config.__dict__,
        "flags": {name: FLAGS[name].value for name in _OWN},
        "metric": made.metric,
        "rows": rows,
        "stds": np.stack(path).tolist(),
        "versions": store.versions(),
    }
    store.write_json(folder / "adapt_noise.json", report)
    show(rows, path, made.metric)
    return 0


_OWN = ("noise", "begin", "reach", "every", "seeds", "episodes")


def _check() -> None:
    for name in ("seeds", "episodes", "every"):
        if FLAGS[name].value < 1:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} must be 1 or more.")
    if FLAGS.every >= FLAGS.steps:
        raise cli.BadInput(f"--every={FLAGS.every} leaves no turn in --steps={FLAGS.steps}.")
    if not 0 < FLAGS.begin < 1e30:
        raise cli.BadInput(f"--begin={FLAGS.begin} must be a positive number below 1e30.")
    if "schedule" in FLAGS.noise:
        raise cli.BadInput("--noise with a schedule has two masters; leave the schedule out.")
    if not 1 < FLAGS.reach < float("inf"):
        raise cli.BadInput(f"--reach={FLAGS.reach} must be a number above 1.")


def change(std: jax.Array) -> Modifier:
    """The noise of --noise at a traced std."""
    return spec.modifier(
        FLAGS.noise, vocabulary.Clock(jnp.zeros((), jnp.int32), FLAGS.steps), std=std
    )


def show(rows: dict[str, dict[str, list[float]]], path: list[np.ndarray], metric: str) -> None:
    """The two rows, their difference and where the std went."""
    print(f"\ntest {metric}, mean and 95 % interval over {FLAGS.seeds} seeds")
    for name, found in rows.items():
        cells = [
            "{} {:.4f} +- {:.4f}".format(column, *seeds.over_seeds(found[column]))
            for column in seeds.COLUMNS
        ]
        print(f"  {name:<8} {'  '.join(cells)}")
    difference = np.subtract(rows["adapted"]["adapted"], rows["plain"]["adapted"])
    print("  adapted - plain {:+.4f} +- {:.4f}".format(*seeds.over_seeds(difference)))
    ends = ", ".join(f"{std:.3g}" for std in path[-1])
    print(f"  std at the end, by seed: {ends}")


if __name__ == "__main__":
    cli.start(main, __doc__)

"""Repeats the test of a trained run, on the same or on other episodes, or on another data set.

    python -m experiments.evaluate --run=runs/NAME
    python -m experiments.evaluate --run=runs/NAME --episodes=2000 --test_seed=7
    python -m experiments.evaluate --run=runs/NAME --data=cub --data_dir=DIR

Prints the table that experiments.train ends with and writes evaluation.json, which says what was
trained and tested on, and episodes.npz into --output, by default the run folder's evaluation/ or
evaluation-DATA/. --ci_z and --ci_group give the intervals as others count them.

With --data the run is tested on the test classes of that data set. Its images are decoded, resized
and normalised as those that the run was trained on (for omniglot and glyphs: grey, and taken to be
dark on light). The run's own data are not read, and the rows on training tasks are left out.
Without --data, --data_dir and --splits say where the run's own data are now.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, loading, runs, scoring, source, store

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Folder of the run.")
flags.DEFINE_integer("episodes", scoring.TEST_EPISODES, "Test episodes.")
flags.DEFINE_integer("test_seed", scoring.TEST_SEED, "Seed of the episodes.")
flags.adopt_module_key_flags(source)
flags.DEFINE_string(
    "data", None, "Data set to test on. Default: the run's own.", allow_override=True
)
source.define_stream()
flags.DEFINE_float("ci_z", 1.96, "Half an interval in standard errors; MGAug's text reads as 1.")
flags.DEFINE_integer(
    "ci_group",
    1,
    "Episodes averaged before the spread of an interval is taken. The released code's tests of "
    "MAML: 4, with --episodes=2404.",
)
flags.DEFINE_string("output", None, "Folder to write to. Default: RUN/evaluation.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.run is None:
        raise cli.BadInput("--run is missing; give the folder of a run.")
    if FLAGS.episodes < 1:
        raise cli.BadInput(f"--episodes={FLAGS.episodes} must be 1 or more.")
    if not 0 <= FLAGS.ci_z < math.inf:
        raise cli.BadInput(f"--ci_z={FLAGS.ci_z} must be a number from 0 up.")
    counts = {f"--episodes={FLAGS.episodes}": FLAGS.episodes}
    if FLAGS.data is None:
        memory = scoring.MEMORY_EPISODES
        counts[f"the {memory} training tasks that are tested too"] = memory
    if FLAGS.ci_group < 1 or any(count % FLAGS.ci_group for count in counts.values()):
        raise cli.BadInput(f"--ci_group={FLAGS.ci_group} must divide {' and '.join(counts)}.")
    folder = Path(FLAGS.run)
    runs.check_seed("test_seed", FLAGS.test_seed)
    config = store.read_config(folder)
    made = _setup(config, folder)
    saved = store.restore(made, folder)
    if not int(saved.best_step):
        print("note: the run has had no validation yet; these are its initial parameters")
    output = store.output(FLAGS.output or str(folder / _name()))
    judges = scoring.judges(made)
    count, seed = FLAGS.episodes, FLAGS.test_seed
    found, scores = scoring.measure(
        made, judges, saved.best, count, seed, FLAGS.ci_z, FLAGS.ci_group
    )
    chance = 1 / made.config.way if made.metric == "accuracy" else None
    results = {
        "trained_on": config.data,
        "tested_on": made.config.data,
        "digest": made.digests.get("test"),
        "metric": made.metric,
        "best_step": int(saved.best_step),
        "interval": f"{FLAGS.ci_z:g} standard errors of means of {FLAGS.ci_group} episodes",
        **found,
        "chance": chance,
    }
    store.write_json(output / "evaluation.json", results)
    identity = scoring.episode_identity(made, FLAGS.episodes, FLAGS.test_seed)
    store.save_episodes(output, scores, identity)
    print(f"\ntrained on {config.data}, tested on {made.config.data}")
    scoring.print_results(results)
    return 0


def _setup(config: runs.Config, folder: Path) -> runs.Setup:
    """What is tested, on the data that the flags say."""
    options = source.options()
    if options.pop("size") is not None:
        raise cli.BadInput("--image_size is the run's; leave it out.")
    if FLAGS.data is not None:
        return loading.on_other(config, FLAGS.data, options, print, FLAGS.stream)
    given = {name: value for name, value in options.items() if value}
    made = loading.setup(dataclasses.replace(config, **given), say=print, stream=FLAGS.stream)
    store.check_digests(folder, made)
    return made


def _name() -> str:
    """Of the folder to write to."""
    return "evaluation" if FLAGS.data is None else f"evaluation-{FLAGS.data}"


if __name__ == "__main__":
    cli.start(main, __doc__)

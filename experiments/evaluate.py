"""Repeats the test of a trained run, on the same or on other episodes.

    python -m experiments.evaluate --run=runs/NAME
    python -m experiments.evaluate --run=runs/NAME --episodes=2000 --test_seed=7

Prints the table that experiments.train ends with and writes evaluation.json and episodes.npz into
--out, by default the run folder's evaluation/.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, runs

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Folder of the run.")
flags.DEFINE_integer("episodes", runs.TEST_EPISODES, "Test episodes.")
flags.DEFINE_integer("test_seed", runs.TEST_SEED, "Seed of the episodes.")
flags.DEFINE_string("output", None, "Folder to write to. Default: RUN/evaluation.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.run is None:
        raise cli.BadInput("--run is missing; give the folder of a run.")
    if FLAGS.episodes < 1:
        raise cli.BadInput(f"--episodes={FLAGS.episodes} must be 1 or more.")
    folder = Path(FLAGS.run)
    made = runs.setup(runs.read_config(folder), say=print)
    step, params = runs.best_params(made, folder)
    found, scores = runs.measure(made, params, FLAGS.episodes, FLAGS.test_seed)
    chance = 1 / made.config.way if made.metric == "accuracy" else None
    results = {"metric": made.metric, "best_step": step, **found, "chance": chance}
    output = Path(FLAGS.output) if FLAGS.output else folder / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    runs.write_json(output / "evaluation.json", results)
    identity = runs.episode_identity(made, FLAGS.episodes, FLAGS.test_seed)
    runs.save_episodes(output, scores, identity)
    runs.print_results(results)
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)

"""Repeats the test of a trained run, on the same or on other episodes.

    python -m experiments.evaluate --run=runs/NAME
    python -m experiments.evaluate --run=runs/NAME --episodes=2000 --test_seed=7

Prints the table that experiments.train ends with and writes evaluation.json and episodes.npz into
--output, by default the run folder's evaluation/.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, runs, scoring, source, store

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Folder of the run.")
flags.DEFINE_integer("episodes", scoring.TEST_EPISODES, "Test episodes.")
flags.DEFINE_integer("test_seed", scoring.TEST_SEED, "Seed of the episodes.")
source.define_stream()
flags.DEFINE_string("output", None, "Folder to write to. Default: RUN/evaluation.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.run is None:
        raise cli.BadInput("--run is missing; give the folder of a run.")
    if FLAGS.episodes < 1:
        raise cli.BadInput(f"--episodes={FLAGS.episodes} must be 1 or more.")
    folder = Path(FLAGS.run)
    runs.check_seed("test_seed", FLAGS.test_seed)
    made = runs.setup(store.read_config(folder), say=print, stream=FLAGS.stream)
    store.check_digests(folder, made)
    saved = store.restore(made, folder)
    if not int(saved.best_step):
        print("note: the run has had no validation yet; these are its initial parameters")
    output = store.output(FLAGS.output or str(folder / "evaluation"))
    judge = scoring.evaluator(made)
    found, scores = scoring.measure(made, judge, saved.best, FLAGS.episodes, FLAGS.test_seed)
    chance = 1 / made.config.way if made.metric == "accuracy" else None
    results = {"metric": made.metric, "best_step": int(saved.best_step), **found, "chance": chance}
    store.write_json(output / "evaluation.json", results)
    identity = scoring.episode_identity(made, FLAGS.episodes, FLAGS.test_seed)
    store.save_episodes(output, scores, identity)
    scoring.print_results(results)
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)

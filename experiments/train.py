"""Meta-trains a method, keeps the best on validation, and tests it.

    python -m experiments.train
    python -m experiments.train --method='protonet()' --data=omniglot --data_dir=DIR
    python -m experiments.train --method='fomaml(lr=0.1,steps=5)|cp(keep=0.98,sizes=(28,20))'

A method is an algorithm (fomaml, maml, anil, meta_sgd, lslr or protonet) and, after bars, its
modifiers (wp, pp, cp, noise, drop_grad, ...): README's table has them all with their arguments,
`experiments.catalogue --list` those of the published tables. The defaults run MGAug-CP on glyphs,
5-way 1-shot.

--mesh=all spreads the tasks over the devices of this machine (--mesh=2 makes two of a CPU, which is
faster than one), --distributed over several hosts;
--skip_nonfinite=N leaves out up to N updates that are not finite.

A run folder holds config.json, metrics.jsonl, checkpoints/ (the state, and the best parameters on
validation), results.json, episodes.npz (the score of every test episode) and curves.png. SIGTERM or
Ctrl-C saves and ends the run after a chunk of steps of at most two seconds, or after one step that
takes longer (twice: at once); --resume goes on as if nothing had been. It exits 0 when done, 2 on
bad input, 3 on what is not finite, 75 when interrupted, 1 on what the machine refuses (a full
disk).
"""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from experiments import (
    cli,
    devices,
    folders,
    loading,
    metrics,
    plots,
    problem,
    processes,
    runs,
    scoring,
    source,
    store,
    training,
)
from mgaug_jax import tasks_at_once
from mgaug_jax.data import streaming

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.adopt_module_key_flags(devices)
flags.adopt_module_key_flags(processes)
flags.DEFINE_integer(
    "tasks_at_once", None, "Tasks that a device computes together. Default: what is fastest."
)
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)|cp(keep=0.98)", "Spec of the method.")
flags.DEFINE_integer("eval_every", 100, "Meta-steps between validations and checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of the initial network and of training.")
flags.DEFINE_string("out", None, "Run folder. Default: a new one under runs/, named by the spec.")
flags.DEFINE_integer(
    "skip_nonfinite", 0, "So many updates that are not finite are left out before the run ends."
)
source.define_stream()
flags.DEFINE_bool("resume", False, "Continue the run in --out from its last checkpoint.")
flags.DEFINE_bool(
    "requeue", False, "Continue the run in --out if there is one, else begin it: for job queues."
)


def main(arguments: Sequence[str]) -> int:
    del arguments
    devices.divide(FLAGS.mesh)
    processes.join()
    with processes.quiet(), processes.peers(), ExitStack() as held:
        made = processes.together(prepared)
        processes.alike(what_decides(made))
        folder = processes.on_first(lambda: claimed(made, held), Path())
        folder = Path(processes.text_of_first(str(folder)))
        print(f"{made.config.method} on {made.config.task} -> {folder}")
        for split, digest in made.digests.items():
            print(f"{split:<6} hash {digest}")
        judges = scoring.judges(made)
        started = time.monotonic()
        with cli.Interruption() as stop:
            fresh = runs.begin(made)
            begun = lambda: folders.begin(made, folder, fresh)
            saved = processes.on_first_arrays(begun, fresh)
            if processes.first():
                store.write_config(folder, made)
            training.train(made, judges, folder, saved, stop, FLAGS.skip_nonfinite)
        again = f"{folder} is trained; test it with the same command and --resume --out={folder}."
        with cli.Interruption(at_once=again):
            scoring.print_results(report(made, judges, folder, saved, started))
    return 0


def prepared() -> runs.Setup:
    """What the flags say, on the devices that they name.

    Raises:
      BadInput: They make no sense.
    """
    problem.adopt_protocol()
    if FLAGS.skip_nonfinite < 0:
        raise cli.BadInput(f"--skip_nonfinite={FLAGS.skip_nonfinite} must be 0 or more.")
    config = problem.config(FLAGS.method, FLAGS.seed, FLAGS.eval_every)
    return place(loading.setup(config, say=print, stream=FLAGS.stream))


def what_decides(made: runs.Setup) -> dict[str, Any]:
    """All that must be the same in every process of a run; files may lie anywhere."""
    config = dataclasses.replace(made.config, data_dir=None, splits=None)
    streamed = [isinstance(split, streaming.Stored) for split in made.splits.values()]
    return {
        "flags": (config, FLAGS.skip_nonfinite, FLAGS.tasks_at_once),
        "data": made.digests,
        "choice of streaming": streamed,
        "versions": store.versions(),
    }


def claimed(made: runs.Setup, held: ExitStack) -> Path:
    """The run's folder, locked for as long as `held` is.

    Raises:
      BadInput: It is another's, or in use.
    """
    there = FLAGS.out is not None and (Path(FLAGS.out) / "config.json").exists()
    resume = FLAGS.resume or (FLAGS.requeue and there)
    folder = folders.run_folder(made, FLAGS.out, resume)
    held.enter_context(store.locked(folder))
    folders.claim(made, folder, resume)
    return folder


def place(made: runs.Setup) -> runs.Setup:
    """The setup with its tasks on the devices that the flags name.

    Raises:
      BadInput: There are fewer, or none at once makes sense.
    """
    if FLAGS.tasks_at_once is not None and FLAGS.tasks_at_once < 1:
        raise cli.BadInput(f"--tasks_at_once={FLAGS.tasks_at_once} must be 1 or more.")
    mesh = devices.mesh("all" if FLAGS.distributed else None)
    if mesh is not None and (more := -made.config.tasks % mesh.size):
        print(
            f"note: {made.config.tasks} tasks are filled up by {more} that do not count; a "
            f"multiple of {mesh.size}, the number of devices, is not."
        )
    how = [tasks_at_once(FLAGS.tasks_at_once)] if FLAGS.tasks_at_once is not None else []
    return runs.on_devices(made, mesh, *how)


def report(
    made: runs.Setup, judges: scoring.Judges, folder: Path, like: runs.Saved, started: float
) -> dict[str, Any]:
    """Tests the best parameters and writes results.json, episodes.npz and curves.png."""
    saved = processes.on_first_arrays(lambda: store.restore(made, folder), like)
    step = int(saved.best_step)
    seed, count = scoring.TEST_SEED, scoring.TEST_EPISODES
    print(f"testing the parameters of step {step} on {count} episodes", flush=True)
    found, scores = scoring.measure(made, judges, runs.put(made, saved.best), count, seed)
    results = {
        "config": dataclasses.asdict(made.config),
        "task": made.config.task,
        "metric": made.metric,
        "best_step": step,
        "skipped": int(saved.skipped),
        **found,
        "chance": 1 / made.config.way if made.metric == "accuracy" else None,
        "session_seconds": round(time.monotonic() - started, 1),
        "digests": made.digests,
        "versions": store.versions(),
    }
    identity = scoring.episode_identity(made, count, seed)
    if not processes.first():
        return results
    store.save_episodes(folder, scores, identity)
    store.write_json(folder / "results.json", results)
    plots.curves(metrics.read(folder), results, folder / "curves.png")
    print(f"wrote {folder / 'results.json'}, episodes.npz and curves.png")
    return results


if __name__ == "__main__":
    cli.start(main, __doc__)

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
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
)
from experiments.progress import Progress
from mgaug_jax import checkpoint, loops, memory, meta, tasks_at_once
from mgaug_jax.data import streaming

CHUNK = 25
"""Most meta-steps between two looks at signals and numbers."""
SECONDS = 2.0
SAVES = 3
"""So many checkpoints in a row that cannot be written end the run."""

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
            train(made, judges, folder, saved, stop, FLAGS.skip_nonfinite)
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


def train(
    made: runs.Setup,
    judges: scoring.Judges,
    folder: Path,
    saved: runs.Saved,
    stop: cli.Interruption,
    skip: int = 0,
) -> None:
    """Runs from `saved` to `config.steps` in compiled chunks, none much longer than `SECONDS`.

    Raises:
      NotFinite: More than `skip` updates are not; the state before the first too many is saved.
      Interrupted: `stop` was requested; the state is saved.
      Failed: The state cannot be saved.
    """
    config = made.config
    key = runs.keys(config.seed)[1]
    k_train = runs.put(made, key)
    sample = streaming.either(made.sample)
    chunk = partial(loops.advance, made.trainer, sample, capacity=CHUNK)
    advance = runs.compiled(made, chunk, donate_argnums=1)
    done = int(saved.state.step)
    state = runs.put(made, jax.tree.map(jnp.array, saved.state))  # a copy: it is given away
    progress = Progress("train", config.steps, done, "steps")
    print(f"compiling; then {config.steps - done} steps", flush=True)
    failures, on_disk = 0, done or None  # of step 0 nothing is
    stopping, size = processes.agree(stop.requested, 1)
    feed = streaming.feed(made.sample, made.splits["train"], key, config.steps, CHUNK, made.mesh)
    with metrics.Records(folder if processes.first() else None, done) as records, feed as at:
        while done < config.steps and not stopping:
            to_evaluation = config.eval_every - done % config.eval_every
            data, end = at(done)
            count = int(min(size, to_evaluation, config.steps - done, end - done))
            before = time.monotonic()
            left = max(skip - int(saved.skipped), 0)
            if progress.first == done:
                needed = memory.taken(
                    advance.lower(k_train, state, data, count, skip=left).compile()
                )
                print(
                    f"the program takes {needed / 1e9:.3f} GB, data and state included", flush=True
                )
            state, info, filled = advance(k_train, state, data, count, skip=left)
            rows = range(int(filled))
            size = chunk_size((time.monotonic() - before) / len(rows))
            info = jax.device_get(info)
            steps = [jax.tree.map(lambda leaf, i=i: leaf[i], info) for i in rows]
            bad = record_steps(records, done, steps)
            saved = saved._replace(skipped=saved.skipped + min(len(bad), left))
            if len(bad) > left:
                progress.close()
                if on_disk != int(state.step):
                    save(made, folder, saved._replace(state=state), 0, last=True)
                raise _not_finite(bad[-1], int(saved.skipped), int(state.step))
            done += len(steps)
            losses = [step["loss"] for step in steps if not not_finite(step["finite"])]
            line = progress.at(done, f"loss {np.mean(losses):.3f}" if losses else "")
            evaluates = done % config.eval_every == 0 or done == config.steps
            if evaluates:
                saved, found = validate(made, judges, saved, state, done)
                records.add({"step": done} | found)
                progress.close()
                mean, half = found[f"val_{made.metric}"], found["val_half_width"]
                print(f"{line}  validation {mean:.3f} +- {half:.3f}", flush=True)
                saved = saved._replace(state=state)
                failures = save(made, folder, saved, failures, last=stop.requested)
                on_disk = done if not failures else on_disk
            stopping, size = processes.agree(stop.requested, size)
        progress.close()
        if stopping and done not in (0, on_disk):
            save(made, folder, saved._replace(state=state), 0, last=True)
    if stopping:
        raise cli.Interrupted(
            f"saved at step {done}; go on with the same flags and --resume --out={folder}."
            if done
            else "nothing was done yet."
        )


def record_steps(records: metrics.Records, done: int, steps: list[meta.Info]) -> list[str]:
    """Records what steps say of themselves, and returns what was not finite, in words."""
    skipped, rows = [], []
    for number, step in enumerate(steps, done + 1):
        values = {name: float(value) for name, value in step.items() if name != "finite"}
        if what := not_finite(step["finite"]):
            skipped.append(f"{what} of step {number}")
            values = {"skipped": what}
        rows.append({"step": number} | values)
    records.add(*rows)
    return skipped


def validate(
    made: runs.Setup, judges: scoring.Judges, saved: runs.Saved, state: meta.State, done: int
) -> tuple[runs.Saved, dict[str, float]]:
    """The validation of a state, and what is to be saved, the state among the best if it is."""
    found = scoring.validation(made, judges, state.params)
    score = found[f"val_{made.metric}"]
    if is_better(made.metric, score, float(saved.best_score)):
        saved = saved._replace(
            best=jax.tree.map(jnp.array, state.params),
            best_step=jnp.int32(done),
            best_score=jnp.full((), score),
        )
    return saved, found


def save(made: runs.Setup, folder: Path, saved: runs.Saved, failures: int, last: bool) -> int:
    """Saves, on the first process, and returns how many times in a row that has failed.

    Raises:
      Failed: It did `SAVES` times, or there is no other chance.
    """
    if not processes.first():
        return 0
    try:
        store.save(made, folder, saved)
    except checkpoint.SaveError as error:
        step, failures = int(saved.state.step), failures + 1
        print(f"warning: {error}", flush=True)
        if failures == SAVES or last or step == made.config.steps:
            raise cli.Failed(
                f"the state of step {step} cannot be saved: {error}. Make room, then go on with "
                f"the same flags and --resume --out={folder}."
            ) from error
        return failures
    return 0


def chunk_size(seconds: float) -> int:
    """How many steps of so many seconds to do before looking up."""
    return max(1, min(CHUNK, int(SECONDS / max(seconds, 1e-9))))


def not_finite(finite: dict[str, np.ndarray]) -> str:
    """Which of a step's quantities is not, and of which tasks; empty if all are."""
    for name in ("loss", "gradient"):
        if not finite[name].all():
            tasks = ", ".join(map(str, np.flatnonzero(~finite[name])))
            return f"{name} of task {tasks}"
    return "" if finite["parameters"] else "parameters, optimiser state or objective"


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether a validation score is the best; of equals the later is, and what is not finite never.
    `best` is NaN at first.
    """
    if not math.isfinite(value):
        return False
    if math.isnan(best):
        return True
    return value >= best if metric == "accuracy" else value <= best


def _not_finite(what: str, skipped: int, step: int) -> cli.NotFinite:
    more = f", after {skipped} that were left out" if skipped else ""
    return cli.NotFinite(
        f"the {what} is not finite{more}; the state of step {step} is saved. Lower a learning rate "
        f"and begin anew, or go on with --resume and a --skip_nonfinite above {skipped}."
    )


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

"""Meta-trains a method, keeps the best on validation, and tests it.

    python -m experiments.train
    python -m experiments.train --method='protonet()' --data=omniglot --data_dir=DIR
    python -m experiments.train --method='fomaml(lr=0.1,steps=5)|cp(keep=0.98,sizes=(28,20))'

A method is an algorithm - fomaml, maml, anil, meta_sgd (lr, steps, forward) or protonet - and,
after bars, its modifiers: wp, pp, cp (keep, subnets, high, cap, sizes, reduce, start, stop; cp also
scores, ranking, select; pp also pruner), noise (std, site, distribution, relative_to, schedule),
drop_grad (rate, site, factors, ramp), l2 (weight), first_order. The defaults run MGAug-CP on
glyphs, 5-way 1-shot.

A run folder holds config.json, metrics.jsonl, checkpoints/ (the state, and the best parameters on
validation), results.json, episodes.npz (the score of every test episode) and curves.png. SIGTERM or
Ctrl-C saves and ends the run after the step (twice: at once); --resume goes on as if nothing had
been. It exits 0 when done, 2 on bad input, 3 on what is not finite, 75 when interrupted, 1 on what
the machine refuses (a full disk).
"""

import dataclasses
import math
import re
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

from experiments import cli, devices, plots, problem, runs, scoring, source, store
from experiments.progress import Progress
from mgaug_jax import checkpoint, memory, meta
from mgaug_jax.data import streaming

CHUNK = 25
"""Most meta-steps between two looks at signals and numbers."""
SECONDS = 2.0
SAVES = 3
"""So many checkpoints in a row that cannot be written end the run."""

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.adopt_module_key_flags(devices)
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
    devices.join()
    with devices.quiet(), ExitStack() as held:
        return _main(held)


def _main(held: ExitStack) -> int:
    problem.adopt_protocol()
    if FLAGS.skip_nonfinite < 0:
        raise cli.BadInput(f"--skip_nonfinite={FLAGS.skip_nonfinite} must be 0 or more.")
    config = problem.config(FLAGS.method, FLAGS.seed, FLAGS.eval_every)
    made = devices.together(
        lambda: devices.place(runs.setup(config, say=print, stream=FLAGS.stream))
    )
    devices.alike(
        {
            "flags": (
                dataclasses.replace(config, data_dir=None, splits=None),
                FLAGS.skip_nonfinite,
                FLAGS.tasks_at_once,
            ),
            "data": made.digests,
            "choice of streaming": [isinstance(d, streaming.Stored) for d in made.splits.values()],
            "versions": store.versions(),
        }
    )
    folder = Path(FLAGS.out or "runs")

    def claimed() -> Path:
        resume = FLAGS.resume or (
            FLAGS.requeue and FLAGS.out is not None and (folder / "config.json").exists()
        )
        own = run_folder(made, FLAGS.out, resume)
        held.enter_context(store.locked(own))
        claim(made, own, resume)
        return own

    folder = devices.on_first(claimed, folder)
    print(f"{config.method} on {config.task} -> {folder}")
    judge = scoring.evaluator(made)
    started = time.monotonic()
    again = f"go on with the same flags and --resume --out={folder}."
    with cli.Interruption() as stop, devices.peers(again):
        fresh = runs.begin(made)
        saved = devices.on_first_arrays(lambda: begin(made, folder, fresh), fresh)
        if devices.first():
            store.write_config(folder, made)
        train(made, judge, folder, saved, stop, FLAGS.skip_nonfinite)
    again = f"{folder} is trained; test it with the same command and --resume --out={folder}."
    with cli.Interruption(at_once=again), devices.peers(again):
        scoring.print_results(report(made, judge, folder, saved, started))
    return 0


def run_folder(made: runs.Setup, out: str | None, resume: bool) -> Path:
    """The folder to write to, made if need be.

    Raises:
      BadInput: It cannot be.
    """
    if out is None and resume:
        raise cli.BadInput("--resume needs --out, the folder of the run to continue.")
    folder = Path(out) if out else _fresh(Path("runs") / slug(made.config))
    if resume and not (folder / "config.json").exists():
        raise cli.BadInput(f"{folder} holds no run to resume; leave --resume out to start one.")
    return store.output(str(folder))


def claim(made: runs.Setup, folder: Path, resume: bool) -> None:
    """Refuses a folder that is not that of this run.

    Raises:
      BadInput: It holds a run and `resume` is not set, the run in it is another one, or it holds
        something else.
    """
    if (folder / "config.json").exists():
        if not resume:
            raise cli.BadInput(
                f"{folder} holds a run already; continue it with --resume or choose another --out."
            )
        store.same_run(store.read_config(folder), made.config, folder)
        store.check_digests(folder, made)
    elif any(path.name not in (store.LOCK, "config.json.tmp") for path in folder.iterdir()):
        raise cli.BadInput(f"{folder} is not empty; choose another --out.")


def slug(config: runs.Config) -> str:
    """A file name that tells the run."""
    text = f"{config.task}-{config.method}-seed{config.seed}"
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_")[:150]


def _fresh(folder: Path) -> Path:
    """`folder`, or with the first free number behind it."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}_{number}")
    return free


def train(
    made: runs.Setup,
    judge,
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
    chunk = partial(meta.advance, made.trainer, sample, capacity=CHUNK)
    advance = runs.compiled(made, chunk, donate_argnums=1)
    done = int(saved.state.step)
    state = runs.put(made, jax.tree.map(jnp.array, saved.state))  # a copy: it is given away
    progress = Progress("train", config.steps, done, "steps")
    print(f"compiling; then {config.steps - done} steps", flush=True)
    failures, on_disk = 0, done
    stopping, size = devices.agree(stop.requested, 1)
    feed = streaming.feed(made.sample, made.splits["train"], key, config.steps, CHUNK)
    with store.Records(folder if devices.first() else None, done) as records, feed as at:
        while done < config.steps and not stopping:
            to_evaluation = config.eval_every - done % config.eval_every
            data, end = at(done)
            count = int(min(size, to_evaluation, config.steps - done, end - done))
            before = time.monotonic()
            left = max(skip - int(saved.skipped), 0)
            data = runs.put(made, data)
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
                save(made, folder, saved._replace(state=state), 0, last=True)
                raise _not_finite(bad[-1], int(saved.skipped), int(state.step))
            done += len(steps)
            losses = [step["loss"] for step in steps if not not_finite(step["finite"])]
            line = progress.at(done, f"loss {np.mean(losses):.3f}" if losses else "")
            evaluates = done % config.eval_every == 0 or done == config.steps
            if evaluates:
                saved, found = validate(made, judge, saved, state, done)
                records.add({"step": done} | found)
                progress.close()
                mean, half = found[f"val_{made.metric}"], found["val_half_width"]
                print(f"{line}  validation {mean:.3f} +- {half:.3f}", flush=True)
                saved = saved._replace(state=state)
                failures = save(made, folder, saved, failures, last=stop.requested)
                on_disk = done if not failures else on_disk
            stopping, size = devices.agree(stop.requested, size)
        progress.close()
        if stopping and on_disk != done:
            save(made, folder, saved._replace(state=state), 0, last=True)
    if stopping:
        raise cli.Interrupted(
            f"saved at step {done}; go on with the same flags and --resume --out={folder}."
            if done
            else "nothing was done yet."
        )


def record_steps(records: store.Records, done: int, steps: list[meta.Info]) -> list[str]:
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
    made: runs.Setup, judge, saved: runs.Saved, state: meta.State, done: int
) -> tuple[runs.Saved, dict[str, float]]:
    """The validation of a state, and what is to be saved, the state among the best if it is."""
    seed, count = scoring.VALIDATION_SEED, scoring.VALIDATION_EPISODES
    scores = judge(state.params, made.splits["val"], seed, count)
    found = scoring.summary(scores.adapted)
    if is_better(made.metric, found["mean"], float(saved.best_score)):
        saved = saved._replace(
            best=jax.tree.map(jnp.array, state.params),
            best_step=jnp.int32(done),
            best_score=jnp.full((), found["mean"]),
        )
    return saved, {
        f"val_{made.metric}": found["mean"],
        "val_half_width": found["half_width"],
        "val_step0": float(scores.initial.mean()),
    }


def save(made: runs.Setup, folder: Path, saved: runs.Saved, failures: int, last: bool) -> int:
    """Saves, on the first process, and returns how many times in a row that has failed.

    Raises:
      Failed: It did `SAVES` times, or there is no other chance.
    """
    if not devices.first():
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


def begin(made: runs.Setup, folder: Path, fresh: runs.Saved) -> runs.Saved:
    """The newest checkpoint, the records cut back to it; or `fresh`, if none was ever saved.

    Raises:
      BadInput: The run was already trained for longer, none of its checkpoints can be read, or it
        was finished and they are gone.
    """
    checkpoints = folder / "checkpoints"
    checkpoint.clean(checkpoints)
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        if (folder / "results.json").exists():
            raise cli.BadInput(
                f"{folder} holds results but its checkpoints are gone; restore them, or choose "
                "another --out."
            )
        if store.read_records(folder):
            print("no checkpoint was saved yet: beginning at step 0")
            (folder / "metrics.jsonl").replace(folder / "metrics.jsonl.old")
        return fresh
    saved = store.restore(made, folder, resume=True)
    done = int(saved.state.step)
    if done > made.config.steps:
        raise cli.BadInput(f"{folder} is at step {done} already; give --steps={done} or more.")
    records = [record for record in store.read_records(folder) if record["step"] <= done]
    store.write_records(folder, records)
    print(f"resumed at step {done}")
    return saved


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
    made: runs.Setup, judge, folder: Path, like: runs.Saved, started: float
) -> dict[str, Any]:
    """Tests the best parameters and writes results.json, episodes.npz and curves.png."""
    saved = devices.on_first_arrays(lambda: store.restore(made, folder), like)
    step = int(saved.best_step)
    seed, count = scoring.TEST_SEED, scoring.TEST_EPISODES
    print(f"testing the parameters of step {step} on {count} episodes", flush=True)
    found, scores = scoring.measure(made, judge, runs.put(made, saved.best), count, seed)
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
    if not devices.first():
        return results
    store.save_episodes(folder, scores, identity)
    store.write_json(folder / "results.json", results)
    plots.curves(store.read_records(folder), results, folder / "curves.png")
    print(f"wrote {folder / 'results.json'}, episodes.npz and curves.png")
    return results


if __name__ == "__main__":
    cli.start(main, __doc__)

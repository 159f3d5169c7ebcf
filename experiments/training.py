"""The loop of experiments.train: compiled chunks of steps, between them records, validations and
checkpoints. It holds no flags.
"""

import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, metrics, processes, runs, scoring, store
from experiments.progress import Progress
from mgaug_jax import checkpoint, loops, memory, meta
from mgaug_jax.data import streaming

CHUNK = 25
"""Most meta-steps between two looks at signals and numbers."""
SECONDS = 2.0
SAVES = 3
"""So many checkpoints in a row that cannot be written end the run."""


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

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
validation), results.json, episodes.npz (the score of every test episode) and curves.png. It exits 0
when done, 2 on bad input, 3 on a loss that is not finite.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, plots, problem, runs, spec, store
from experiments.progress import Progress
from mgaug_jax import checkpoint, meta

CHUNK = 25

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)|cp(keep=0.98)", "Spec of the method.")
flags.DEFINE_integer("eval_every", 100, "Meta-steps between validations and checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of the initial network and of training.")
flags.DEFINE_string("out", None, "Run folder. Default: a new one under runs/, named by the spec.")
flags.DEFINE_bool("resume", False, "Continue the run in --out from its last checkpoint.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    config = problem.config(FLAGS.method, FLAGS.seed, FLAGS.eval_every)
    made = runs.setup(config, say=print)
    folder = run_folder(made, FLAGS.out, FLAGS.resume)
    print(f"{config.method} on {config.task} -> {folder}")
    judge = runs.evaluator(made)
    begin = time.monotonic()
    train(made, judge, folder)
    runs.print_results(report(made, judge, folder, begin))
    return 0


def run_folder(made: runs.Setup, out: str | None, resume: bool) -> Path:
    """The folder to write to, new or resumed.

    Raises:
      BadInput: It holds a run and `resume` is not set, or the run in it is another one.
    """
    if out is None and resume:
        raise cli.BadInput("--resume needs --out, the folder of the run to continue.")
    folder = Path(out) if out else Path("runs") / slug(made.config)
    try:
        if out is None:
            folder = _fresh(folder)
        if (folder / "config.json").exists():
            if not resume:
                raise cli.BadInput(
                    f"{folder} holds a run already; continue it with --resume or choose another "
                    "--out."
                )
            _same_run(store.read_config(folder), made.config, folder)
            store.check_digests(folder, made)
        elif resume:
            raise cli.BadInput(f"{folder} holds no run to resume; leave --resume out to start one.")
        elif folder.exists() and any(folder.iterdir()):
            raise cli.BadInput(f"{folder} is not empty; choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        store.write_config(folder, made)
    except OSError as error:
        raise cli.BadInput(f"cannot write to {folder}: {error.strerror}.") from error
    return folder


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


def _same_run(old: runs.Config, new: runs.Config, folder: Path) -> None:
    """Refuses to continue a run with a setting that changes what it computes."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    spans = new.schedule != "constant" or spec.spans_run(new.method)
    free = {"data_dir", "splits"} | (set() if spans else {"steps"})
    changed = [
        f"--{name} is {after[name]!r} but was {before[name]!r}"
        for name in before
        if before[name] != after[name] and name not in free
    ]
    if changed:
        raise cli.BadInput(
            f"{folder} cannot be resumed with other settings: {'; '.join(changed)}. "
            "Give the same flags, or another --out."
        )


def train(made: runs.Setup, judge, folder: Path) -> None:
    """Runs to `config.steps` in compiled chunks.

    Raises:
      NotFinite: A loss or a validation score is not.
    """
    config = made.config
    _, k_train = runs.keys(config.seed)
    saved, done = begin(made, folder)
    step = partial(jax.jit, static_argnames="steps", donate_argnames="state")(
        lambda key, state, data, steps: meta.run(made.trainer, made.sample, key, state, data, steps)
    )
    state = jax.tree.map(jnp.array, saved.state)  # a copy: the first is given away to `step`
    progress = Progress("train", config.steps, done, "steps")
    print(f"compiling; then {config.steps - done} steps", flush=True)
    with store.Records(folder) as records:
        while done < config.steps:
            to_evaluation = config.eval_every - done % config.eval_every
            count = min(CHUNK, to_evaluation, config.steps - done)
            state, info = step(k_train, state, made.splits["train"], steps=count)
            info = jax.device_get(info)
            bad = np.flatnonzero(~np.isfinite(info["loss"]))
            if bad.size:
                progress.close()
                raise _not_finite(folder, f"loss of step {done + bad[0]}")
            done += count
            means = {name: float(values.mean()) for name, values in info.items()}
            records.add({"step": done} | means)
            note = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            line = progress.at(done, note)
            if done % config.eval_every and done < config.steps:
                continue
            scores = judge(
                state.params, made.splits["val"], runs.VALIDATION_SEED, runs.VALIDATION_EPISODES
            )
            found = runs.summary(scores.adapted)
            if not math.isfinite(found["mean"]):
                progress.close()
                raise _not_finite(folder, f"validation score after step {done}")
            best = saved.best, saved.best_step, saved.best_score
            if is_better(made.metric, found["mean"], float(saved.best_score)):
                best = jax.tree.map(jnp.array, state.params), done, found["mean"]
            saved = runs.Saved(state, best[0], jnp.int32(best[1]), jnp.float32(best[2]))
            records.add(
                {
                    "step": done,
                    f"val_{made.metric}": found["mean"],
                    "val_half_width": found["half_width"],
                    "val_step0": float(scores.initial.mean()),
                }
            )
            checkpoint.save(folder / "checkpoints", done, saved)
            progress.close()
            print(
                f"{line}  validation {found['mean']:.3f} +- {found['half_width']:.3f}", flush=True
            )
    progress.close()


def begin(made: runs.Setup, folder: Path) -> tuple[runs.Saved, int]:
    """The newest checkpoint, the records cut back to it; or a new run.

    Raises:
      BadInput: The run was already trained for longer, or none of its checkpoints can be read.
    """
    if not checkpoint.steps(folder / "checkpoints"):
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        return runs.begin(made), 0
    saved = store.restore(made, folder)
    done = int(saved.state.step)
    if done > made.config.steps:
        raise cli.BadInput(f"{folder} is at step {done} already; give --steps={done} or more.")
    records = [record for record in store.read_records(folder) if record["step"] <= done]
    store.write_records(folder, records)
    print(f"resumed at step {done}")
    return saved, done


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether a validation score is the best; of equals the later is. `best` is NaN at first."""
    if math.isnan(best):
        return True
    return value >= best if metric == "accuracy" else value <= best


def _not_finite(folder: Path, what: str) -> cli.NotFinite:
    last = checkpoint.steps(folder / "checkpoints")
    kept = f"the checkpoint of step {last[-1]} is kept" if last else "no checkpoint was made yet"
    return cli.NotFinite(f"the {what} is not finite; {kept}. Lower a learning rate.")


def report(made: runs.Setup, judge, folder: Path, begin: float) -> dict[str, Any]:
    """Tests the best parameters and writes results.json, episodes.npz and curves.png."""
    saved = store.restore(made, folder)
    step = int(saved.best_step)
    print(f"testing the parameters of step {step} on {runs.TEST_EPISODES} episodes", flush=True)
    found, scores = runs.measure(made, judge, saved.best, runs.TEST_EPISODES, runs.TEST_SEED)
    results = {
        "config": dataclasses.asdict(made.config),
        "task": made.config.task,
        "metric": made.metric,
        "best_step": step,
        **found,
        "chance": 1 / made.config.way if made.metric == "accuracy" else None,
        "session_seconds": round(time.monotonic() - begin, 1),
        "digests": made.digests,
        "versions": store.versions(),
    }
    store.write_json(folder / "results.json", results)
    identity = runs.episode_identity(made, runs.TEST_EPISODES, runs.TEST_SEED)
    store.save_episodes(folder, scores, identity)
    plots.curves(store.read_records(folder), results, folder / "curves.png")
    print(f"wrote {folder / 'results.json'}, episodes.npz and curves.png")
    return results


if __name__ == "__main__":
    cli.start(main, __doc__)

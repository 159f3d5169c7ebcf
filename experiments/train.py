"""Meta-trains a method, keeps the best on validation, and tests it.

    python -m experiments.train
    python -m experiments.train --method='protonet()' --data=omniglot --data_dir=DIR
    python -m experiments.train --method='fomaml(lr=0.1,steps=5)|cp(keep=0.98,sizes=(28,20))'

A method is an algorithm - fomaml, maml, anil, meta_sgd (lr, steps, forward) or protonet - and,
after bars, its modifiers: wp, pp, cp (keep, subnets, high, cap, sizes, reduce, start, stop; cp also
scores, ranking, select; pp also pruner). The defaults run MGAug-CP on glyphs, 5-way 1-shot.

A run folder holds config.json, metrics.jsonl, checkpoints/, best/, results.json, episodes.npz (the
score of every test episode) and curves.png. Exit codes: 0 done, 2 bad input, 3 a loss that is not
finite.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, plots, runs
from experiments.progress import Progress
from mgaug_jax import checkpoint, meta

CHUNK = 25
EXIT_NOT_FINITE = 3

FLAGS = flags.FLAGS
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)|cp(keep=0.98)", "Spec of the method.")
flags.DEFINE_string(
    "net", None, "Spec of the network: conv4(width=64), resnet10, mlp. Default: by the data."
)
flags.DEFINE_string("data", "glyphs", "Data set: glyphs, omniglot or sinusoid.")
flags.DEFINE_string("data_dir", None, "Folder of the data set's official files.")
flags.DEFINE_string(
    "labels",
    "exclusive",
    "How training tasks label classes: exclusive (ME), fixed_labels or fixed_groups (NME).",
)
flags.DEFINE_integer("way", 5, "Classes per task.")
flags.DEFINE_integer("shot", 1, "Support examples per class.")
flags.DEFINE_integer("queries", 5, "Query examples per class in training; tests use 15.")
flags.DEFINE_integer("tasks", 4, "Tasks per meta-step.")
flags.DEFINE_integer("steps", 1000, "Meta-steps.")
flags.DEFINE_float("outer_lr", 1e-3, "Learning rate of Adam in the outer loop.")
flags.DEFINE_integer("eval_every", 200, "Meta-steps between validations and checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of the initial network and of training.")
flags.DEFINE_string("out", None, "Run folder. Default: a new one under runs/, named by the spec.")
flags.DEFINE_bool("resume", False, "Continue the run in --out from its last checkpoint.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    names = [field.name for field in dataclasses.fields(runs.Config)]
    config = runs.Config(**{name: FLAGS[name].value for name in names})
    begin = time.monotonic()
    made = runs.setup(config, say=print)
    folder = run_folder(config, FLAGS.out, FLAGS.resume)
    print(f"{config.method} on {config.data}, {config.way}-way {config.shot}-shot -> {folder}")
    code = train(made, folder)
    if code:
        return code
    found = report(made, folder, time.monotonic() - begin)
    runs.print_results(found)
    return 0


def run_folder(config: runs.Config, out: str | None, resume: bool) -> Path:
    """The folder to write to, new or resumed.

    Raises:
      BadInput: It holds a run and `resume` is not set, or the run in it is another one.
    """
    if out is None and resume:
        raise cli.BadInput("--resume needs --out, the folder of the run to continue.")
    folder = Path(out) if out else _fresh(Path("runs") / slug(config))
    record = {"config": dataclasses.asdict(config), "versions": runs.versions()}
    try:
        if (folder / "config.json").exists():
            if not resume:
                raise cli.BadInput(
                    f"{folder} holds a run already; continue it with --resume or choose another "
                    "--out."
                )
            _same_run(runs.read_config(folder), config, folder)
        elif resume:
            raise cli.BadInput(f"{folder} holds no run to resume; leave --resume out to start one.")
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(folder / "config.json", record)
    except OSError as error:
        raise cli.BadInput(f"cannot write to {folder}: {error.strerror}.") from error
    return folder


def slug(config: runs.Config) -> str:
    """A file name that tells the run."""
    text = f"{config.data}-{config.way}w{config.shot}s-{config.method}-seed{config.seed}"
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_")


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
    changed = [
        f"--{name} is {after[name]!r} but was {before[name]!r}"
        for name in before
        if before[name] != after[name] and name not in ("steps", "data_dir")
    ]
    if changed:
        raise cli.BadInput(
            f"{folder} cannot be resumed with other settings: {'; '.join(changed)}. "
            "Give the same flags, or another --out."
        )


def train(made: runs.Setup, folder: Path) -> int:
    """Runs to `config.steps` in compiled chunks; returns an exit code."""
    config = made.config
    k_init, k_train = runs.keys(config.seed)
    state, records = _begin(made, folder, k_init)
    chunk = max(n for n in range(1, CHUNK + 1) if config.eval_every % n == 0)
    step = partial(jax.jit, static_argnames="steps", donate_argnames="state")(
        lambda key, state, data, steps: meta.run(made.trainer, made.sample, key, state, data, steps)
    )
    validate = runs.evaluator(made)
    done = int(state.step)
    progress = Progress("train", config.steps, done, "steps")
    print(f"compiling; then {config.steps - done} steps")
    board = _tensorboard(folder)
    with (folder / "metrics.jsonl").open("a") as log:

        def write(record: dict[str, Any]) -> None:
            records.append(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
            for name, value in record.items():
                if board is not None and name != "step":
                    board.add_scalar(name, value, record["step"])

        while done < config.steps:
            count = min(chunk, config.steps - done)
            state, info = step(k_train, state, made.splits["train"], steps=count)
            info = jax.device_get(info)
            bad = ~np.isfinite(info["loss"])
            if bad.any():
                progress.close()
                first = done + int(np.argmax(bad))
                print(
                    f"error: the loss of step {first} is {info['loss'][first - done]}; the last "
                    f"finite checkpoint stays in {folder / 'checkpoints'}. Lower a learning rate.",
                    file=sys.stderr,
                )
                return EXIT_NOT_FINITE
            done += count
            record = {"step": done} | {name: float(v.mean()) for name, v in info.items()}
            write(record)
            note = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if k != "step")
            line = progress.at(done, note)
            if done % config.eval_every == 0 or done == config.steps:
                scores = validate(
                    state.params, made.splits["val"], runs.VALIDATION_SEED, runs.VALIDATION_EPISODES
                )
                found = runs.summary(scores.adapted)
                if _is_best(made.metric, found["mean"], records):
                    checkpoint.save(folder / "best", done, state.params, keep=1)
                write(
                    {
                        "step": done,
                        f"val_{made.metric}": found["mean"],
                        "val_half_width": found["half_width"],
                        "val_step0": float(scores.initial.mean()),
                    }
                )
                checkpoint.save(folder / "checkpoints", done, state)
                progress.close()
                print(
                    f"{line}  validation {found['mean']:.3f} +- {found['half_width']:.3f}",
                    flush=True,
                )
    progress.close()
    if board is not None:
        board.close()
    return 0


def _begin(made: runs.Setup, folder: Path, key: jax.Array) -> tuple[meta.State, list[dict]]:
    """The last checkpoint and the records up to it, or a new state and none."""
    log = folder / "metrics.jsonl"
    state = jax.jit(made.trainer.init)(key)
    if not checkpoint.steps(folder / "checkpoints"):
        log.unlink(missing_ok=True)
        return state, []
    try:
        step, state = checkpoint.restore(folder / "checkpoints", state)
    except checkpoint.CheckpointError as error:
        raise cli.BadInput(f"{folder} cannot be resumed: {error}") from error
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [record for record in records if record["step"] <= step]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"resumed at step {step}")
    return state, records


def _is_best(metric: str, value: float, records: list[dict]) -> bool:
    """Whether no earlier validation was better; of equals the later one is kept."""
    earlier = [record[f"val_{metric}"] for record in records if f"val_{metric}" in record]
    if metric == "accuracy":
        return value >= max(earlier, default=-math.inf)
    return value <= min(earlier, default=math.inf)


def _tensorboard(folder: Path):
    """A TensorBoard writer if tensorboardX is installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def report(made: runs.Setup, folder: Path, seconds: float) -> dict[str, Any]:
    """Tests the best parameters and writes results.json, episodes.npz and curves.png."""
    step, params = runs.best_params(made, folder)
    print(f"testing the parameters of step {step} on {runs.TEST_EPISODES} episodes")
    begin = time.monotonic()
    found, scores = runs.measure(made, params, runs.TEST_EPISODES, runs.TEST_SEED)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = {
        "config": dataclasses.asdict(made.config),
        "metric": made.metric,
        "best_step": step,
        **found,
        "chance": 1 / made.config.way if made.metric == "accuracy" else None,
        "seconds": round(seconds + time.monotonic() - begin, 1),
        "digests": made.digests,
        "versions": runs.versions(),
    }
    runs.write_json(folder / "results.json", results)
    identity = runs.episode_identity(made, runs.TEST_EPISODES, runs.TEST_SEED)
    runs.save_episodes(folder, scores, identity)
    plots.curves(records, results, folder / "curves.png")
    print(f"wrote {folder / 'results.json'}, episodes.npz and curves.png")
    return results


if __name__ == "__main__":
    cli.start(main, __doc__)

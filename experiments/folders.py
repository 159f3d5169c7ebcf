"""The folder of a training run: whose it is, and where in it a run goes on.

All entry points share this; it holds no flags.
"""

import re
from pathlib import Path

from experiments import metrics, runs, store
from experiments.cli import BadInput
from mgaug_jax import checkpoint


def run_folder(made: runs.Setup, out: str | None, resume: bool) -> Path:
    """The folder to write to, made if need be.

    Raises:
      BadInput: It cannot be.
    """
    if out is None and resume:
        raise BadInput("--resume needs --out, the folder of the run to continue.")
    folder = Path(out) if out else _fresh(Path("runs") / slug(made.config))
    if resume and not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no run to resume; leave --resume out to start one.")
    return store.output(str(folder))


def claim(made: runs.Setup, folder: Path, resume: bool) -> None:
    """Refuses a folder that is not that of this run.

    Raises:
      BadInput: It holds a run and `resume` is not set, the run in it is another one, or it holds
        something else.
    """
    if (folder / "config.json").exists():
        if not resume:
            raise BadInput(
                f"{folder} holds a run already; continue it with --resume or choose another --out."
            )
        store.same_run(store.read_config(folder), made.config, folder)
        store.check_digests(folder, made)
    elif any(path.name not in (store.LOCK, "config.json.tmp") for path in folder.iterdir()):
        raise BadInput(f"{folder} is not empty; choose another --out.")


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
            raise BadInput(
                f"{folder} holds results but its checkpoints are gone; restore them, or choose "
                "another --out."
            )
        if metrics.read(folder):
            print("no checkpoint was saved yet: beginning at step 0")
            (folder / "metrics.jsonl").replace(folder / "metrics.jsonl.old")
        return fresh
    saved = store.restore(made, folder, resume=True)
    done = int(saved.state.step)
    if done > made.config.steps:
        raise BadInput(f"{folder} is at step {done} already; give --steps={done} or more.")
    records = [record for record in metrics.read(folder) if record["step"] <= done]
    metrics.write(folder, records)
    print(f"resumed at step {done}")
    return saved

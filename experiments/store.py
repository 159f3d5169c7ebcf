"""The folders that entry points write: configurations, records, checkpoints, scores.

Whatever is written is written whole or not at all.
"""

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mgaug_jax
from experiments import runs
from experiments.cli import BadInput
from mgaug_jax import checkpoint


def output(name: str | None) -> Path:
    """The folder that `--out` names, made if need be.

    Raises:
      BadInput: None is named, or it cannot be written to.
    """
    if name is None:
        raise BadInput("--out is missing; give the folder to write to.")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}.") from error
    return folder


def read_config(folder: Path) -> runs.Config:
    """The configuration of a run.

    Raises:
      BadInput: `folder` is not a run.
    """
    try:
        record = json.loads((folder / "config.json").read_text())
        return runs.Config(**record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder} is not a run folder ({error}); give one that experiments.train wrote."
        ) from error


def write_config(folder: Path, made: runs.Setup) -> None:
    """Writes `config.json`: the configuration, what the data were, and the versions."""
    config = dataclasses.asdict(made.config)
    record = {"config": config, "digests": made.digests, "versions": versions()}
    write_json(folder / "config.json", record)


def check_digests(folder: Path, made: runs.Setup) -> None:
    """Refuses data that are not those of the run.

    Raises:
      BadInput: A split has other classes or pixels.
    """
    before = json.loads((folder / "config.json").read_text())["digests"]
    other = [name for name, digest in made.digests.items() if before.get(name) != digest]
    if other:
        raise BadInput(
            f"the {' and '.join(other)} data are not those that {folder} was trained on; restore "
            "them, or start a new run."
        )


def _finite(record: Any) -> Any:
    """The record with null for what JSON cannot hold, NaN and infinities."""
    if isinstance(record, dict):
        return {name: _finite(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [_finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def write_json(path: Path, record: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(record), indent=2) + "\n")
    temporary.replace(path)


def versions() -> dict[str, str]:
    return {
        "mgaug_jax": mgaug_jax.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def save_episodes(folder: Path, scores: dict[str, np.ndarray], identity: dict[str, Any]) -> None:
    """Per-episode scores; episode e was drawn with the key `fold_in(episode_key(seed), e)`."""
    numbers = np.arange(identity["episodes"])
    stored = np.array(json.dumps(identity))
    np.savez(folder / "episodes.npz", identity=stored, episode=numbers, **scores)


def restore(made: runs.Setup, folder: Path) -> runs.Saved:
    """The newest checkpoint of a run.

    Raises:
      BadInput: There is none that can be read.
    """
    try:
        like = jax.eval_shape(lambda: runs.begin(made))
        return checkpoint.restore(folder / "checkpoints", like)[1]
    except checkpoint.CheckpointError as error:
        raise BadInput(f"{folder} has no checkpoint that can be read: {error}") from error


class Records:
    """`metrics.jsonl`, appended to line by line, and TensorBoard where it is installed."""

    def __init__(self, folder: Path):
        self.log = (folder / "metrics.jsonl").open("a")
        self.board = None
        with suppress(ImportError):
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        if self.board is not None:
            for name in record.keys() - {"step"}:
                self.board.add_scalar(name, record[name], record["step"])

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        self.log.close()
        if self.board is not None:
            self.board.close()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; a kill may have cut the last one short."""
    records = []
    with suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    temporary = folder / "metrics.jsonl.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(folder / "metrics.jsonl")

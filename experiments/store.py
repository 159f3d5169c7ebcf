"""The folders that entry points write: configurations, checkpoints, scores, tables.

Whatever is written is written whole or not at all.
"""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import optax

import mgaug_jax
from experiments import runs, spec
from experiments.cli import BadInput
from mgaug_jax import checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


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
        (folder / LOCK).open("a").close()
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}.") from error
    return folder


def read_config(folder: Path) -> runs.Config:
    """The configuration of a run.

    Raises:
      BadInput: `folder` is not a run.
    """
    return _stored(folder)[0]


def _stored(folder: Path) -> tuple[runs.Config, dict[str, str]]:
    try:
        return _checked(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{folder} is not a run folder ({error}); give one that experiments.train wrote."
        ) from error


def _checked(record: Any) -> tuple[runs.Config, dict[str, str]]:
    """The configuration and the hashes of the data in an identity.

    Raises:
      ValueError: It is none, or a setting is missing, unknown or of another type.
    """
    try:
        values, digests = dict(record["config"]), dict(record["digests"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it says nothing of a configuration and its data") from error
    fields = {field.name: field for field in dataclasses.fields(runs.Config)}
    wrong = [f"{name} is no setting" for name in values.keys() - fields]
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                wrong.append(f"{name} is missing")
        elif not _is_a(values[name], field.type):
            kind = getattr(field.type, "__name__", field.type)
            wrong.append(f"{name}={values[name]!r} is no {kind}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return runs.Config(**values), digests


def _is_a(value: Any, kind: Any) -> bool:
    """Whether JSON's value is of a type of Python's, where bool is an int."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a run's folder; a process that dies gives it free.

    Raises:
      BadInput: Another process has it.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BadInput(
                f"{folder} is in use by process {file.read().strip() or 'of unknown number'}; "
                "wait until it ends, or choose another --out."
            ) from error
        except OSError as error:
            print(
                f"note: {folder} cannot be locked ({error.strerror}); let one process write to it"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def identity(made: runs.Setup) -> dict[str, Any]:
    """What a run is: the configuration, what the data were, the versions, and what else decides the
    last digit of a number.
    """
    spread = {
        "devices": made.mesh.size if made.mesh else 1,
        "tasks_at_once": made.tested.at_once,
    }
    return {
        "config": dataclasses.asdict(made.config),
        "digests": made.digests,
        "versions": versions() | spread,
    }


def write_config(folder: Path, made: runs.Setup) -> None:
    """Writes `config.json`: the identity of the run."""
    write_json(folder / "config.json", identity(made))


def same_run(old: runs.Config, new: runs.Config, where: Path) -> None:
    """Refuses to continue a run with a setting that changes what it computes, and says which
    others have changed.

    Raises:
      BadInput: One of `new` does.
    """
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    spans = new.schedule != "constant" or spec.spans_run(new.method)
    free = {"data_dir", "splits", "eval_every"} | (set() if spans else {"steps"})
    words = {
        name: f"--{name} is {after[name]!r} but was {before[name]!r}"
        for name in before
        if before[name] != after[name]
    }
    for name in words.keys() & free:
        print(f"note: {words[name]}")
    if changed := [words[name] for name in words if name not in free]:
        raise BadInput(
            f"{where} cannot be resumed with other settings: {'; '.join(changed)}. "
            "Give the same flags, or another --out."
        )


def check_digests(folder: Path, made: runs.Setup) -> None:
    """Refuses data that are not those of the run.

    Raises:
      BadInput: A split has other classes or pixels.
    """
    _same_data(_stored(folder)[1], made, folder)


def _same_data(before: dict[str, str], made: runs.Setup, where: Path) -> None:
    other = [name for name, digest in made.digests.items() if before.get(name) != digest]
    if other:
        raise BadInput(
            f"the {' and '.join(other)} data are not those that {where} was trained on; restore "
            "them, or start a new run."
        )


def finite(record: Any) -> Any:
    """The record with null for what JSON cannot hold, NaN and infinities."""
    if isinstance(record, dict):
        return {name: finite(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place unless that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Writes a file whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(finite(record), indent=2) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of the same columns, a file whole or not at all."""
    with replaced(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def versions() -> dict[str, str]:
    return {
        "mgaug_jax": mgaug_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def save_episodes(folder: Path, scores: dict[str, np.ndarray], identity: dict[str, Any]) -> None:
    """Per-episode scores; episode e was drawn with the key `fold_in(episode_key(seed), e)`."""
    numbers = np.arange(identity["episodes"])
    stored = np.array(json.dumps(identity))
    with replaced(folder / "episodes.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, identity=stored, episode=numbers, **scores)


def save(made: runs.Setup, folder: Path, saved: runs.Saved) -> None:
    """Writes a checkpoint of a run.

    Raises:
      checkpoint.SaveError: It cannot be written.
    """
    step = int(saved.state.step)
    checkpoint.save(folder / "checkpoints", step, saved, identity=identity(made))


def restore(made: runs.Setup, folder: Path, resume: bool = False) -> runs.Saved:
    """The newest checkpoint of a run. To `resume` from it, damaged ones are put aside, and it is
    said where going on is not bit-exact.

    Raises:
      BadInput: There is none that can be read, or it is of another run.
    """
    try:
        like = jax.eval_shape(lambda: runs.begin(made._replace(mesh=None)))
        found = checkpoint.restore(folder / "checkpoints", like, quarantine=resume)
    except checkpoint.CheckpointError as error:
        raise BadInput(f"{folder} has no checkpoint that can be read: {error}") from error
    try:
        (before, digests), then = _checked(found.identity), dict(found.identity["versions"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}/checkpoints are of another version's runs ({error}).") from error
    if resume:
        same_run(before, made.config, folder / "checkpoints")
        _same_data(digests, made, folder / "checkpoints")
        now = identity(made)["versions"]
        other = [
            f"{name} {then.get(name)} -> {value}"
            for name, value in now.items()
            if value != then.get(name)
        ]
        if other:
            print(f"note: not bit-exact to what came before: {', '.join(other)}")
    return found.tree

"""The official files of data sets that have a stable address and a published checksum.

A file is written as NAME.part, which a later call goes on with, and becomes NAME once its SHA-256
is the published one.
"""

import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments import cli
from experiments.progress import Progress
from mgaug_jax.data.files import shipped
from mgaug_jax.data.trees import sha256

BLOCK, SECONDS = 2**20, 60
"""Bytes that are read at once, and how long to wait for them."""


class Remote(NamedTuple):
    """A file's name, address, bytes, and SHA-256 in hex."""

    name: str
    url: str
    size: int
    sha256: str


def remotes() -> dict[str, tuple[Remote, ...]]:
    """Data set -> its files."""
    lists = shipped("downloads")
    owners = {
        "omniglot": ("omniglot", "omniglot_vinyals", "omniglot_finn", "omniglot_mr"),
        "cifar100": ("cifar_fs", "fc100"),
        "cub": ("cub",),
    }
    return {
        name: tuple(Remote(**each) for each in lists[files])
        for files, names in owners.items()
        for name in names
    }


REMOTES = remotes()


def fetch(remote: Remote, folder: Path, say: Callable[[str], None]) -> None:
    """Brings a file into a folder, unless it is there.

    Raises:
      BadInput: Another file of that name is there, or the folder cannot be written.
      Failed: The file does not come, or is not the published one.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists():
        if (digest := sha256(path)) != remote.sha256:
            raise cli.BadInput(
                f"{path} has the SHA-256 {digest} instead of {remote.sha256}; move it away, or use "
                "it as it is: check says whether it holds the data set."
            )
        say(f"{path} is there, SHA-256 {digest}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise cli.BadInput(f"cannot write {part}: {error.strerror}.") from error
    say(f"{remote.url} -> {path}, {remote.size} bytes")
    again = "the same command goes on from there."
    try:
        if (have := part.stat().st_size) != remote.size:
            with cli.Interruption(at_once=f"{part} is kept; {again}"):
                _append(remote, part, have if have < remote.size else 0)
    except (OSError, http.client.HTTPException) as error:  # of urllib too
        raise cli.Failed(
            f"the download of {remote.url} stopped ({error}); {part} is kept, {again}"
        ) from error
    if (have := part.stat().st_size) < remote.size:
        raise cli.Failed(
            f"{remote.url} ended after {have} of {remote.size} bytes; {part} is kept, {again}"
        )
    if (digest := sha256(part)) != remote.sha256:
        part.unlink()
        raise cli.Failed(
            f"{remote.url} has the SHA-256 {digest} instead of {remote.sha256}: it has changed, or "
            "was changed on the way; nothing of it was kept."
        )
    part.replace(path)
    say(f"{path}, SHA-256 {digest} as published")


def _append(remote: Remote, part: Path, have: int) -> None:
    """Goes on after so many bytes, or from the beginning if the server cannot; reads no more than
    one byte too many.
    """
    request = urllib.request.Request(
        remote.url, headers={"Range": f"bytes={have}-"} if have else {}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        have = have if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        shown = Progress(remote.name, remote.size, have, "bytes")
        with part.open("r+b") as file:
            file.truncate(have)
            file.seek(have)
            while have <= remote.size and (data := answer.read(min(BLOCK, remote.size + 1 - have))):
                file.write(data)
                have += len(data)
                shown.at(have)
        shown.close()

"""Files in folders, zips and tars, all seen as one tree. Nothing is ever extracted: what a hostile
archive says about paths or links has no effect, for only regular members are read, into memory.
"""

import hashlib
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError, RuntimeError)
"""What reading a damaged, encrypted or unreadable file raises."""


class Tree(NamedTuple):
    """Files by path; hidden ones are left out.

    Attributes:
      marks: Path -> what changes with its content (size, and CRC or time of change), in the order
        in which they are best read.
      folders: Paths of folders, which may be empty.
      read: `path -> content`.
    """

    marks: dict[str, tuple[int, int]]
    folders: frozenset[str]
    read: Callable[[str], bytes]


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(data_dir: Path, root: str) -> Path | None:
    """The folder that is a root, or the archive that holds it; None if there is none.

    `data_dir` is an archive itself, or a folder that has the root, as it is or as an archive of
    the same name. The root "" is the whole of `data_dir`.
    """
    if data_dir.is_file() and data_dir.name.lower().endswith(ARCHIVES):
        return data_dir
    if (data_dir / root).is_dir():
        return data_dir / root
    archives = (data_dir / f"{root}{suffix}" for suffix in ARCHIVES if root)
    return next((path for path in archives if path.is_file()), None)


def fingerprint(place: Path, root: str, keep: Callable[[str], bool]) -> str:
    """A mark that changes with a root's content. A tar is not read for it: that takes long."""
    if place.is_file() and not zipfile.is_zipfile(place):
        about = place.stat()
        listing = [(place.name, about.st_size, about.st_mtime_ns)]
    else:
        with _opened(place, root, keep) as tree:
            listing = sorted(tree.marks.items())
    return hashlib.sha256(repr(listing).encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def opened(places: dict[str, Path], keep: Callable[[str], bool]) -> Iterator[Tree]:
    """The tree of some roots; every path begins with its root.

    Args:
      places: Root -> folder or archive, see `locate`.
      keep: Says of the first name below a root whether it matters.

    Raises:
      ValueError: Something is damaged or unreadable; `Tree.read` raises it too.
    """
    with ExitStack() as stack:
        trees = [stack.enter_context(_opened(place, root, keep)) for root, place in places.items()]
        readers = {path: tree.read for tree in trees for path in tree.marks}
        yield Tree(
            {path: mark for tree in trees for path, mark in tree.marks.items()},
            frozenset().union(*(tree.folders for tree in trees)),
            lambda path: readers[path](path),
        )


@contextmanager
def _opened(place: Path, root: str, keep: Callable[[str], bool]) -> Iterator[Tree]:
    with ExitStack() as stack:
        with _damage(place):
            kind = _folder if place.is_dir() else _zip if zipfile.is_zipfile(place) else _tar
            tree = stack.enter_context(kind(place, root, keep))

        def read(path: str) -> bytes:
            with _damage(place):
                return tree.read(path)

        yield tree._replace(read=read)


@contextmanager
def _damage(place: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{place.name} is damaged or unreadable ({error})") from error


@contextmanager
def _folder(place: Path, root: str, keep: Callable[[str], bool]) -> Iterator[Tree]:
    marks, folders, base = {}, set(), PurePosixPath(root)

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave an unreadable folder out

    # Links to folders are followed: data sets are often put together from them.
    for folder, names, files in os.walk(place, onerror=refuse, followlinks=True):
        at_top = Path(folder) == place
        names[:] = sorted(name for name in names if _seen(name) and (not at_top or keep(name)))
        inside = base / Path(folder).relative_to(place).as_posix()
        folders.update(str(inside / name) for name in names)
        for name in sorted(files):
            if _seen(name) and (not at_top or keep(name)):
                about = os.stat(os.path.join(folder, name))
                marks[str(inside / name)] = about.st_size, about.st_mtime_ns
    yield Tree(
        marks,
        frozenset(folders),
        lambda path: (place / PurePosixPath(path).relative_to(base)).read_bytes(),
    )


@contextmanager
def _zip(place: Path, root: str, keep: Callable[[str], bool]) -> Iterator[Tree]:
    with zipfile.ZipFile(place) as file:
        members = {}
        for info in file.infolist():
            # Zips made on Unix keep a link as a member that holds its target.
            if not stat.S_ISLNK(info.external_attr >> 16):
                members[info.filename] = info
        paths = _below(list(members), root, keep)
        marks = {
            path: (members[name].file_size, members[name].CRC)
            for path, name in paths.items()
            if not name.endswith("/")
        }
        yield Tree(marks, _folders(paths), lambda path: file.read(paths[path]))


@contextmanager
def _tar(place: Path, root: str, keep: Callable[[str], bool]) -> Iterator[Tree]:
    with tarfile.open(place) as file:
        members = {
            member.name + "/" * member.isdir(): member
            for member in file.getmembers()
            if member.isreg() or member.isdir()
        }
        paths = _below(list(members), root, keep)
        marks = {
            path: (members[name].size, int(members[name].mtime))
            for path, name in paths.items()
            if members[name].isreg()
        }

        def read(path: str) -> bytes:
            content = file.extractfile(members[paths[path]])
            assert content is not None  # it is a regular member
            with content:
                return content.read()

        yield Tree(marks, _folders(paths), read)


def _below(members: list[str], root: str, keep: Callable[[str], bool]) -> dict[str, str]:
    """Path -> member, of those below a root. Where the root is the whole archive, a folder that
    holds everything is left out of the paths.
    """
    parts = {name: PurePosixPath(name).parts for name in members}
    parts = {name: each for name, each in parts.items() if each and all(map(_seen, each))}
    tops = {each[0] for each in parts.values()}
    files_at_top = any(len(each) == 1 and not name.endswith("/") for name, each in parts.items())
    prefix = (root,) if root else tuple(tops) if len(tops) == 1 and not files_at_top else ()
    skip = len(prefix)
    return {
        "/".join(((root,) if root else ()) + each[skip:]): name
        for name, each in parts.items()
        if each[:skip] == prefix and len(each) > skip and keep(each[skip])
    }


def _folders(paths: dict[str, str]) -> frozenset[str]:
    """Folders of an archive, which may be members or only parts of a path."""
    found = {path for path, name in paths.items() if name.endswith("/")}
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in found:
            found.add(path)
    return frozenset(found)


def _seen(name: str) -> bool:
    """Leaves out what operating systems strew about (`.DS_Store`, `__MACOSX`), and `..`."""
    return not name.startswith((".", "__")) and name != "/"

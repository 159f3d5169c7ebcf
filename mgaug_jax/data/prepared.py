"""Data sets that TensorFlow Datasets prepared on some machine, read without TensorFlow.

TFDS writes `NAME/VERSION/` in one of several formats; of these array_record alone can be read
without TensorFlow. It shuffles the records and does not keep the names of the files, so the images
of a class are put into the order of their SHA-256: the data set is the same whoever prepared it,
but its order, and so its hash and its tasks, are not those of the official files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "array_record"
INFO = "dataset_info.json"
DAMAGE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged or another data set raises."""


class Prepared(NamedTuple):
    """A data set of TFDS.

    Attributes:
      name: There.
      label: `(features, record) -> class`, as our lists name it.
      parts: The splits of TFDS that hold every image once.
      total: Number of images; None if it need not be checked.
    """

    name: str
    label: Callable[[Any, Mapping[str, Any]], str]
    parts: tuple[str, ...] = ("train", "test")
    total: int | None = None


def locate(prepared: Prepared, data_dir: Path) -> str | None:
    """Where in a folder the data set lies, `NAME/VERSION` or "" for the folder itself, or None.

    Raises:
      ValueError: There are several versions, or it is in a format that only TensorFlow reads.
    """
    found = sorted(data_dir.glob(f"{prepared.name}/*/{INFO}")) or [data_dir / INFO]
    if len(found) > 1:
        versions = ", ".join(info.parent.name for info in found)
        raise ValueError(f"it has several versions of {prepared.name} ({versions})")
    try:
        about = json.loads(found[0].read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{_named(found[0])} is damaged or unreadable ({error})") from error
    if not isinstance(about, dict) or about.get("name") != prepared.name:
        raise ValueError(f"{_named(found[0])} is not that of {prepared.name}")
    if (kind := about.get("fileFormat", "tfrecord")) != FORMAT:
        raise ValueError(
            f"{prepared.name} was prepared there as {kind}, which TensorFlow alone reads: where "
            f'that is installed, prepare it again by tfds.builder("{prepared.name}", '
            f'file_format="{FORMAT}", data_dir=...).download_and_prepare()'
        )
    place = found[0].parent.relative_to(data_dir).as_posix()
    return "" if place == "." else place


def read(
    prepared: Prepared, place: Path, whole: bool
) -> tuple[dict[str, list[str]], Callable[[str], bytes]]:
    """Class -> keys of its images, and `key -> content of an image file`.

    Args:
      prepared: What lies there.
      place: Folder of a version.
      whole: Whether all images must be there.

    Raises:
      ValueError: It is damaged, incomplete, or another data set; the reader raises it too.
    """
    import tensorflow_datasets as tfds

    images: dict[str, list[str]] = {}
    records: dict[str, tuple[Any, int]] = {}
    copies = Counter()
    with _damage(place):
        builder = tfds.builder_from_directory(place)
        features = builder.info.features
        assert isinstance(features, tfds.features.FeaturesDict)
        pictures = [
            name for name, each in features.items() if isinstance(each, tfds.features.Image)
        ]
        decoders = {name: tfds.decode.SkipDecoding() for name in pictures}
        for part in prepared.parts:
            source = builder.as_data_source(split=part, decoders=decoders)  # pyright: ignore
            for i in range(len(source)):
                record = source[i]
                if record["image"] is None:  # of a file that was cut off
                    raise ValueError(f"record {i} of {part} was not read back")
                label = prepared.label(features, record)
                key = f"{label}/{hashlib.sha256(record['image']).hexdigest()}"
                copies[key] += 1
                key += f"_{copies[key]}"
                images.setdefault(label, []).append(key)
                records[key] = source, i
    if whole and prepared.total not in (None, len(records)):
        raise ValueError(f"{prepared.name} has {len(records)} images instead of {prepared.total}")

    def content(key: str) -> bytes:
        source, i = records[key]
        with _damage(place):
            return source[i]["image"]

    return images, content


def _named(path: Path) -> str:
    return "/".join(path.parts[-3:])


@contextmanager
def _damage(place: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise ValueError(
            f"the TFDS data set {place.parent.name}/{place.name} is damaged, incomplete or another "
            f"one ({' '.join(str(error).split())})"
        ) from error

"""From image files to one array, through tensorflow-datasets without TensorFlow."""

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mgaug_jax.data.record import Decoded, Progress

T = TypeVar("T")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, MemoryError)
"""What Pillow raises for a broken file."""


class Unreadable(ValueError):
    """Images that cannot be decoded, or did not come back from the disk."""


class Example(NamedTuple):
    """A unique key, by which the images of a class are ordered, the class, and the file's bytes."""

    key: str
    label: str
    image: bytes


def ingest(
    name: str,
    examples: Iterable[Example],
    images: Mapping[str, Sequence[str]],
    decode: Callable[[bytes], np.ndarray],
    scratch: Path,
    progress: Progress,
    skip: int = 0,
) -> Decoded:
    """Writes examples as a TFDS data set, reads it back, checks it and decodes it.

    Args:
      name: Of the data set.
      examples: The images of one split, in any order.
      images: Keys of the images of each class.
      decode: `file content -> uint8 [h, w, c]`, the same shape for all.
      scratch: Folder for the TFDS data set and for the pixels; the caller removes it.
      progress: Is told the steps.
      skip: So many images may be unreadable; they are left out and listed.

    Raises:
      Unreadable: More images cannot be decoded, or a class is not read back whole.
      OSError: The scratch folder cannot be written.
    """
    classes = sorted(images)
    places = {
        key: (c, m)
        for c, label in enumerate(classes)
        for m, key in enumerate(sorted(images[label]))
    }
    counts = np.array([len(images[label]) for label in classes], np.int32)
    text = f"{name}: writing {len(places)} images as a TFDS data set"
    progress(text)  # before standard output is redirected
    source = _write(name, _told(examples, text, len(places), progress), scratch)
    if len(source) != len(places):
        raise Unreadable(
            f"{name}: {len(places)} images were to be written, but {len(source)} were."
        )
    text = f"{name}: decoding {len(places)} images of {len(classes)} classes"
    progress(text)
    pixels, bad = None, {}
    have = np.zeros((len(classes), counts.max()), bool)
    for key, data in _told(_read(name, source), text, len(places), progress):
        try:
            image = decoded(decode, data)
        except BROKEN as error:
            bad[key] = f"{key} ({error})"
            if len(bad) > skip:
                raise Unreadable(
                    f"{name}: {len(bad)} images cannot be read: {', '.join(bad.values())}; replace "
                    "or remove them, or let skip_bad_images be a larger number."
                ) from error
            continue
        if pixels is None:
            pixels = _zeros(scratch / "pixels.npy", (*have.shape, *image.shape))
        pixels[places[key]], have[places[key]] = image, True
    for key in bad:
        counts[places[key][0]] -= 1
    for c, label in enumerate(classes):
        if have[c].sum() != counts[c]:
            raise Unreadable(
                f"{name}: {have[c].sum()} images of {label} were read back instead of {counts[c]}."
            )
        if not counts[c]:
            raise Unreadable(f"{name}: no image of {label} can be read; replace them.")
    assert pixels is not None  # every class has an image
    for c in {places[key][0] for key in bad}:
        whole = pixels[c, have[c]]
        pixels[c] = 0
        pixels[c, : len(whole)] = whole
    if bad:
        progress(f"{name}: left out {len(bad)} of {len(places)} images: {', '.join(bad.values())}")
    return Decoded(pixels, counts, tuple(classes), tuple(sorted(bad)))


def _told(items: Iterable[T], text: str, total: int, progress: Progress) -> Iterator[T]:
    """The items, while progress is told how many of them are done."""
    for n, item in enumerate(items):
        if n and n % 50 == 0:
            progress(text, n, total)
        yield item
    progress(text, total, total)


def _zeros(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros on disk, since some data sets are larger than memory. They are written, not just
    mapped: to write to mapped memory that a full disk cannot hold would end the process.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(shape[0]):
            file.write(bytes(math.prod(shape[1:])))
    return np.load(path, mmap_mode="r+")


def decoded(decode: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    """The image, unless it is so large that it may be meant to exhaust the memory."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return decode(data)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"too large to be trusted: {error}") from error


def _write(name: str, examples: Iterable[Example], folder: Path):
    """The examples as a TFDS data source, with the images left as bytes."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            features = {"key": text, "label": text, "image": tfds.features.Image()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):  # a `pipeline` parameter would mean Apache Beam
            return {"images": self._generate_examples()}

        def _generate_examples(self):
            for example in examples:
                yield example.key, example._asdict()

    Builder.name = name
    # TFDS writes tfrecord by default, which only TensorFlow reads.
    builder = Builder(data_dir=folder, file_format="array_record")
    tfds.disable_progress_bar()
    try:
        with redirect_stdout(io.StringIO()):  # it announces a download, but there is none
            builder.download_and_prepare()
    except RuntimeError as error:  # of array_record, when it cannot write
        raise OSError(str(error)) from error
    return builder.as_data_source(
        split="images",  # pyright: ignore[reportCallIssue]  (it is decorated)
        decoders={"image": tfds.decode.SkipDecoding()},
    )


def _read(name: str, source) -> Iterator[tuple[str, bytes]]:
    """Keys and images of a data source; a damaged record of it has None for fields, or keys of
    records already read.
    """
    for i in range(len(source)):
        record = source[i]
        if any(record[field] is None for field in Example._fields):
            raise Unreadable(f"{name}: record {i} was not read back; check the disk.")
        yield record["key"].decode(), record["image"]

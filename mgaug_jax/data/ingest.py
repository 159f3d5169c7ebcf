"""From image files to one array, through tensorflow-datasets without TensorFlow."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mgaug_jax.data.record import Decoded, Progress


class Example(NamedTuple):
    """A unique key, by which the images of a class are ordered, the class, and the file's bytes."""

    key: str
    label: str
    image: bytes


def ingest(
    name: str,
    examples: Iterable[Example],
    expected: Mapping[str, int],
    decode: Callable[[bytes], np.ndarray],
    scratch: Path,
    progress: Progress,
) -> Decoded:
    """Writes examples as a TFDS data set, reads it back, checks it and decodes it.

    Args:
      name: Of the data set.
      examples: The images of one split, in any order.
      expected: Number of images of each class.
      decode: `file content -> uint8 [h, w, c]`, the same shape for all.
      scratch: Folder for the TFDS data set; the caller removes it.
      progress: Is told the steps.

    Raises:
      ValueError: An image cannot be decoded, or a class has not its expected number of images.
    """
    total = sum(expected.values())
    progress(f"{name}: writing {total} images as a TFDS data set")
    source = _write(name, examples, scratch)
    if len(source) != total:
        raise ValueError(f"{name}: {total} images were to be written, but {len(source)} were.")
    progress(f"{name}: decoding {total} images of {len(expected)} classes")
    images: dict[str, dict[str, np.ndarray]] = {label: {} for label in expected}
    for example in _read(name, source):
        try:
            images[example.label][example.key] = decode(example.image)
        except (OSError, SyntaxError) as error:  # Pillow raises both for a broken file
            raise ValueError(
                f"{name}: {example.key} cannot be read as an image ({error}); replace that file."
            ) from error
    for label, count in expected.items():
        if len(images[label]) != count:
            raise ValueError(
                f"{name}: {len(images[label])} images of {label} were read back instead of {count}."
            )
    classes = sorted(expected)
    shape = next(iter(images[classes[0]].values())).shape
    pixels = np.zeros((len(classes), max(expected.values()), *shape), np.uint8)
    for c, label in enumerate(classes):
        pixels[c, : expected[label]] = [images[label][key] for key in sorted(images[label])]
    counts = np.array([expected[label] for label in classes], np.int32)
    return Decoded(pixels, counts, tuple(classes))


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
    with redirect_stdout(io.StringIO()):  # it announces a download, but there is none
        builder.download_and_prepare()
    return builder.as_data_source(
        split="images",  # pyright: ignore[reportCallIssue]  (it is decorated)
        decoders={"image": tfds.decode.SkipDecoding()},
    )


def _read(name: str, source) -> Iterator[Example]:
    """The examples of a data source; a damaged record of it has None for fields, or keys of
    records already read.
    """
    for i in range(len(source)):
        record = source[i]
        if any(record[field] is None for field in Example._fields):
            raise ValueError(f"{name}: record {i} was not read back; check the disk.")
        yield Example(record["key"].decode(), record["label"].decode(), record["image"])

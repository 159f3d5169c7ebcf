"""Adapts a trained run to your own few labelled images and classifies others.

    python -m experiments.predict --run=runs/NAME --support_dir=FOLDER --query_dir=FOLDER

--support_dir has one sub-folder per class with PNG or JPEG images; shots may differ between
classes. A method with a head (fomaml, maml, ...) takes as many classes as it was trained with,
protonet any two or more. Every image below --query_dir is classified; the probabilities of all
classes are written, file by file, to --out. Images are resized and normalised as those of the run's
data set; for omniglot and glyphs they are taken to be dark on light. The run's own data are not
needed.

With batch norm by the queries' own statistics (the default, forward='transductive') the answer for
an image depends on which others are classified with it.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, loading, runs, store
from mgaug_jax import data
from mgaug_jax.data.files import may_be_image
from mgaug_jax.data.ingest import BROKEN, decoded
from mgaug_jax.data.record import Options
from mgaug_jax.episodes import normalise
from mgaug_jax.types import Examples, MetaParams

SHOWN = 20
FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Folder of the run.", allow_override=True)
flags.DEFINE_string("support_dir", None, "Folder with a sub-folder of images for every class.")
flags.DEFINE_string("query_dir", None, "Folder of the images to classify.")
flags.DEFINE_string("out", None, "File to write. Default: predictions.csv.", allow_override=True)


def main(arguments: Sequence[str]) -> int:
    del arguments
    for name in ("run", "support_dir", "query_dir"):
        if FLAGS[name].value is None:
            raise cli.BadInput(f"--{name} is missing; --help shows an example.")
    made, params, batch = restored(FLAGS.run)
    classes, support = labelled(FLAGS.support_dir, batch)
    queries = images_below(FLAGS.query_dir)
    found = np.asarray(probabilities(made, params, support, batch(queries)))
    write(Path(FLAGS.out or "predictions.csv"), classes, queries, found)
    return 0


def restored(
    folder: str | Path,
) -> tuple[runs.Setup, MetaParams, Callable[[list[Path]], jax.Array]]:
    """Of a run: its setup, the parameters that were best on validation, and `files -> x [n, h, w,
    c]`, which reads images as the run's own were. The run's data are not needed.

    Raises:
      BadInput: It is no run on images; of the reader: a file cannot be read.
    """
    folder = Path(folder)
    config = store.read_config(folder)
    if config.data not in data.DATASETS:
        raise cli.BadInput(f"{folder} was trained on {config.data}, which are no images.")
    dataset = data.DATASETS[config.data]
    if dataset.adapt is not None:
        dataset = dataset.adapt(Options(size=config.image_size))
    size, mean, std = dataset.parameters["size"], jnp.array(dataset.mean), jnp.array(dataset.std)
    made = loading.for_images(config, (size, size, len(mean)), mean, std)

    def batch(paths: list[Path]) -> jax.Array:
        return normalise(jnp.array(np.stack([read(dataset, path) for path in paths])), mean, std)

    return made, store.restore(made, folder).best, batch


def labelled(
    folder: str | Path, batch: Callable[[list[Path]], jax.Array]
) -> tuple[list[str], Examples]:
    """The classes of a folder with a sub-folder for each, and their images, read by `batch`.

    Raises:
      BadInput: As `support_files` and `batch`.
    """
    classes = support_files(Path(folder))
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    x = batch([path for paths in classes.values() for path in paths])
    return list(classes), Examples(x, jnp.eye(len(classes))[labels])


def probabilities(made: runs.Setup, params, support: Examples, x: jax.Array) -> jax.Array:
    """Of every class for every query `[n, W]`, after adapting on the support.

    Raises:
      BadInput: The network has another number of outputs than there are classes.
    """
    learner = made.tested.algorithm(made.tested.net, made.tested.test)

    unadapted = lambda params, support, x: learner.predict(learner.start(params, support), x)
    outputs = jax.eval_shape(unadapted, params, support, x).shape[1]
    if outputs != support.y.shape[1]:
        raise cli.BadInput(
            f"{support.y.shape[1]} classes were given, but the run's network tells {outputs} apart;"
            " give as many, or take a protonet run."
        )

    @jax.jit
    def adapted(key, params, support, x):
        return jax.nn.softmax(learner.predict(learner.adapt(key, params, support), x))

    return adapted(jax.random.key(0), params, support, x)


def support_files(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images.

    Raises:
      BadInput: There are fewer than two classes, or one is empty.
    """
    names = sorted(path for path in folder.glob("*/") if not path.name.startswith("."))
    if len(names) < 2:
        raise cli.BadInput(
            f"{folder} has {len(names)} sub-folders; make one for each of two classes or more, "
            "with their images in them."
        )
    return {path.name: images_below(path) for path in names}


def images_below(folder: str | Path) -> list[Path]:
    """All images in a folder and its sub-folders.

    Raises:
      BadInput: There are none.
    """
    found = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and may_be_image(path.name) and not path.name.startswith(".")
    )
    if not found:
        raise cli.BadInput(f"{folder} holds no image; give a folder of PNG or JPEG files.")
    return found


def read(dataset: data.Dataset, path: Path) -> np.ndarray:
    """The pixels of an image as the data set would have them.

    Raises:
      BadInput: It cannot be read.
    """
    assert dataset.decode is not None
    try:
        return decoded(dataset.decode, path.read_bytes())
    except BROKEN as error:
        raise cli.BadInput(f"{path} cannot be read: {error}; replace or remove it.") from error


def write(out: Path, classes: list[str], queries: list[Path], found: np.ndarray) -> None:
    """The table as a CSV file, and its beginning on the screen."""
    try:
        with (
            store.replaced(out) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            table.writerow(["file", "prediction", *classes])
            for path, row in zip(queries, found, strict=True):
                table.writerow([path, classes[row.argmax()], *(f"{p:.6f}" for p in row)])
    except OSError as error:
        raise cli.BadInput(f"cannot write {out}: {error.strerror}.") from error
    for path, row in list(zip(queries, found, strict=True))[:SHOWN]:
        print(f"{path}: {classes[row.argmax()]} ({row.max():.3f})")
    more = f"; {len(queries) - SHOWN} more are in it" if len(queries) > SHOWN else ""
    print(f"wrote {out}{more}")


if __name__ == "__main__":
    cli.start(main, __doc__)

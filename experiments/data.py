"""Data sets: which there are, whether one is whole, and its caches.

    python -m experiments.data list
    python -m experiments.data check omniglot --data_dir=DIR
    python -m experiments.data prepare omniglot --data_dir=DIR
    python -m experiments.data download omniglot --data_dir=DIR

`list` prints every data set with its classes, its source and the layout expected in --data_dir.
`check` reads every image of every split and says what is there (classes, images, the hash that a
run records, images left out, the SHA-256 of an archive) and what is missing, and draws a contact
sheet into --out. `prepare`
builds the caches that a run would build first. Both keep what they decoded in the cache. `download`
brings the official files of Omniglot, CIFAR-100 or CUB to --data_dir, held to their published
SHA-256; what was cut off, the same command goes on with.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli, download, plots, source
from experiments.progress import Watch
from mgaug_jax import data
from mgaug_jax.data import trees

POSITIONAL = "list, check NAME, prepare NAME or download NAME"
LAYOUT = re.compile(r"; give a data_dir[a-z ]*:$")
"""How a refusal leads over to the layout, which is printed once."""
CLASSES, IMAGES = 6, 10
"""Of every split, on the contact sheet."""
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(source)
# Other entry points have a flag of this name too, and a test imports several of them.
flags.DEFINE_string(
    "out", None, "Contact sheet of check. Default: NAME-contact.png.", allow_override=True
)


def main(arguments: Sequence[str]) -> int:
    if arguments == ["list"]:
        show()
    elif len(arguments) == 2 and arguments[0] in ("check", "prepare", "download"):
        command, name = arguments
        if name not in data.DATASETS:
            raise cli.BadInput(f"{name!r} is no data set; known: {', '.join(data.DATASETS)}.")
        if command == "download":
            bring(name)
            return 0
        found = read(name)
        if command == "check":
            out = Path(FLAGS.out or f"{name}-contact.png")
            try:
                plots.contact({split: sample(name, each) for split, each in found.items()}, out)
            except OSError as error:
                raise cli.BadInput(f"cannot write {out}: {error.strerror}.") from error
            print(f"contact sheet: {out}")
            for archive in archives(name):
                print(f"{archive} has the SHA-256 {trees.sha256(archive)}")
    else:
        raise cli.BadInput(f"{' '.join(arguments)!r} is no command; give {POSITIONAL}.")
    return 0


def show() -> None:
    """Prints every data set."""
    for name, dataset in data.DATASETS.items():
        splits = dataset.parameters.get("splits")
        sizes = " / ".join(str(len(splits[split])) for split in data.SPLITS) if splits else ""
        classes = f"{sizes} classes to train / validate / test" if splits else "classes as found"
        print(f"{name}: {classes}; {dataset.source}")
        print("".join(f"    {line}\n" for line in dataset.tree.splitlines()))


def bring(name: str) -> None:
    """Downloads the official files of a data set."""
    if name not in download.REMOTES:
        raise cli.BadInput(
            f"{name} has no files that can be downloaded here (it is from: "
            f"{data.DATASETS[name].source}); known are those of {', '.join(download.REMOTES)}."
        )
    if FLAGS.data_dir is None:
        raise cli.BadInput("download needs --data_dir, the folder to write to.")
    for remote in download.REMOTES[name]:
        download.fetch(remote, Path(FLAGS.data_dir), print)


def read(name: str) -> dict[str, data.Manifest]:
    """Split -> what it holds, printed; all splits are tried before the first refusal counts."""
    found, missing = {}, {}
    for split in data.SPLITS:
        try:
            about = data.describe(name, split, progress=Watch(print), **source.options())
        except ValueError as error:
            missing[split] = LAYOUT.sub(".", str(error).splitlines()[0])
            print(f"{split:<6} missing: {missing[split]}")
            continue
        found[split] = about
        least, most = min(about.counts), max(about.counts)
        each = f"{least}" if least == most else f"{least} to {most}"
        print(
            f"{split:<6} {len(about.classes)} classes of {each} images, {sum(about.counts)} in all"
        )
        print(f"       hash {about.digest}")
        for path in about.skipped:
            print(f"       left out: {path}")
    if missing:
        if tree := data.DATASETS[name].tree:
            print(f"expected layout:\n{tree}")
        raise cli.BadInput(
            f"{' and '.join(missing)} of {name} cannot be read: {next(iter(missing.values()))}"
        )
    return found


def archives(name: str) -> list[Path]:
    """The files of --data_dir that the data set lies in, where it is not in folders."""
    if FLAGS.data_dir is None:
        return []
    places = {trees.locate(Path(FLAGS.data_dir), root) for root in data.DATASETS[name].roots}
    return sorted(place for place in places if place is not None and place.is_file())


def sample(name: str, about: data.Manifest) -> list[tuple[str, np.ndarray]]:
    """Some classes, evenly spaced, with some images of each."""
    images = data.load(name, about.split, **source.options())
    classes = len(about.classes)
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, CLASSES)).round().astype(int))
    return [
        (about.classes[c], np.asarray(images.pixels[c, : min(IMAGES, about.counts[c])]))
        for c in chosen
    ]


if __name__ == "__main__":
    cli.start(main, __doc__, POSITIONAL)

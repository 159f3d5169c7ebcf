"""The flags that say where a data set's files are and how they are read."""

from typing import Any

from absl import flags

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of the data set's official files, or an archive.")
flags.DEFINE_string(
    "splits", None, "JSON file with the classes of train, val and test, in place of the official."
)
flags.DEFINE_integer("image_size", None, "Height and width of the images. Default: by the data.")
flags.DEFINE_integer(
    "skip_bad_images", 0, "So many images of a split may be unreadable; they are left out."
)
STREAM = "auto", "yes", "no"


def define_stream() -> None:
    """Defines `--stream`, for entry points that can leave images on disk."""
    flags.DEFINE_enum(
        "stream",
        "auto",
        STREAM,
        "Whether images stay on disk, and tasks are gathered ahead of training, instead of lying "
        "on the device: yes, no, or auto (if they are larger than a quarter of its memory). What "
        "is computed is the same.",
        allow_override=True,
    )


def options() -> dict[str, Any]:
    """What `data.load` and `data.describe` are told by the flags."""
    return {
        "data_dir": FLAGS.data_dir,
        "splits": FLAGS.splits,
        "size": FLAGS.image_size,
        "skip_bad_images": FLAGS.skip_bad_images,
    }

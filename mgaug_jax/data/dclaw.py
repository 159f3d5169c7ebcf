"""D'Claw (Rajendran et al., 2020, "Meta-Learning Requires Meta-Augmentation"): ten objects that a
robot's claw holds the right way (`pos`) or the wrong way (`neg`), 35 photographs of each.

A task is 2-way, one object. Classes are sorted, so that the two of an object are neighbours, `neg`
first. Each of three permutations has six objects for training, two for validation and two for the
test.
"""

from mgaug_jax.data.files import Files, Found, class_folders, from_files
from mgaug_jax.data.record import SPLITS, Dataset
from mgaug_jax.data.trees import Tree

OBJECTS = {
    1: {"train": (1, 2, 3, 6, 7, 8), "val": (4, 9), "test": (5, 10)},
    2: {"train": (1, 2, 5, 6, 7, 10), "val": (3, 8), "test": (4, 9)},
    3: {"train": (2, 4, 5, 7, 9, 10), "val": (1, 6), "test": (3, 8)},
}
"""Objects of the splits of each permutation."""
TREE = """\
data_dir/
  dclaw/               (or dclaw.zip, or data_dir is the zip)
    train1/
      obj1_neg/
        IMG_20190812_163800199.jpg ...   35 images
      obj1_pos/
      ...              6 objects
    val1/ test1/       2 objects each
    train2/ ... test3/"""


def dataset(permutation: int, images: int = 35) -> Dataset:
    """The data set of one of the three permutations, with so many images per class."""

    def find(files: Files, tree: Tree, split: str) -> Found:
        del files
        return Found(class_folders(tree, f"dclaw/{split}{permutation}"), tree.read)

    return from_files(
        Files(
            name=f"dclaw{permutation}",
            tree=TREE,
            find=find,
            splits={
                split: tuple(f"obj{n}_{side}" for n in objects for side in ("neg", "pos"))
                for split, objects in OBJECTS[permutation].items()
            },
            roots=dict.fromkeys(SPLITS, ("dclaw",)),
            count=images,
            size=84,
            keep=lambda name: name.endswith(str(permutation)),
            source="Rajendran et al. 2020, https://github.com/google-research/google-research",
        )
    )

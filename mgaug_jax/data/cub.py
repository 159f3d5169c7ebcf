"""CUB-200-2011 (Wah et al., 2011): 11,788 photographs of 200 kinds of birds, 41 to 60 of each.

Splits are those of Chen et al. (2019), "A Closer Look at Few-shot Classification": of the sorted
classes those of even index are for training (100), of the others every second one for validation
and for the test (50 each).
"""

from mgaug_jax.data.files import Files, Found, class_folders, from_files, shipped
from mgaug_jax.data.prepared import Prepared
from mgaug_jax.data.record import SPLITS, Dataset
from mgaug_jax.data.trees import Tree

ROOT = "CUB_200_2011"
TREE = """\
data_dir/
  CUB_200_2011/        (or CUB_200_2011.tgz, or data_dir is the archive)
    images.txt         says which images there are
    images/
      001.Black_footed_Albatross/
        Black_Footed_Albatross_0001_796111.jpg ...
      ...              200 classes, 11,788 images
or, prepared by TFDS with file_format="array_record",
data_dir/
  caltech_birds2011/0.2.0/  (or data_dir is this folder)"""


def _find(files: Files, tree: Tree, split: str) -> Found:
    del split
    images = class_folders(tree, f"{ROOT}/images")
    if files.official:
        if f"{ROOT}/images.txt" not in tree.marks:
            raise ValueError("there is no images.txt, which says which images there should be")
        lines = tree.read(f"{ROOT}/images.txt").decode("utf-8", "replace").splitlines()
        listed = {f"{ROOT}/images/{line.split()[-1]}" for line in lines if line.strip()}
        there = {path for paths in images.values() for path in paths}
        for path in sorted(listed ^ there):
            kind = "listed in images.txt, but not there" if path in listed else "not in images.txt"
            raise ValueError(f"{path} is {kind}")
    return Found(images, tree.read)


def dataset(classes: tuple[str, ...] | None = None) -> Dataset:
    """The data set of these classes, by default of all 200."""
    total = 11_788 if classes is None else None
    classes = classes or tuple(shipped("cub")["classes"])
    return from_files(
        Files(
            name="cub",
            tree=TREE,
            find=_find,
            splits={"train": classes[0::2], "val": classes[1::4], "test": classes[3::4]},
            roots=dict.fromkeys(SPLITS, (ROOT,)),
            count=None,
            size=84,
            keep=lambda name: name in ("images", "images.txt"),
            tfds=Prepared(
                "caltech_birds2011",
                lambda features, record: classes[record["label"]],  # TFDS keeps the number alone
                total=total,
            ),
            source="Wah et al. 2011, https://www.vision.caltech.edu/datasets/cub_200_2011/",
        )
    )

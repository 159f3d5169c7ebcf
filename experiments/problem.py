"""The flags that say what is trained on, and how, whatever the method: shared by entry points."""

from absl import flags

from experiments import runs, source
from mgaug_jax.data import DATASETS

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "net", None, "Spec of the network: conv4(width=64), resnet10, mlp. Default: by the data."
)
flags.DEFINE_string("data", "glyphs", f"Data set: {', '.join(DATASETS)} or sinusoid.")
flags.adopt_module_key_flags(source)
flags.DEFINE_string(
    "labels",
    "exclusive",
    "How training tasks label classes: exclusive (ME), fixed_labels or fixed_groups (NME). "
    "Sinusoids: exclusive, fixed_labels for MR-MAML's one-hot problem, or fixed_groups for "
    "meta-augmentation's ten functions on intervals.",
)
flags.DEFINE_integer("way", 5, "Classes per task.")
flags.DEFINE_integer("shot", 1, "Support examples per class.")
flags.DEFINE_integer("queries", 5, "Query examples per class in training; tests use 15.")
flags.DEFINE_integer("tasks", 4, "Tasks per meta-step.")
flags.DEFINE_integer("steps", 400, "Meta-steps.")
flags.DEFINE_float("outer_lr", 1e-3, "Learning rate of Adam in the outer loop.")
flags.DEFINE_string(
    "schedule", "constant", "Outer learning rate over the run: constant, or cosine (down to 0)."
)
flags.DEFINE_bool(
    "rotations", False, "Training classes turned by 90, 180 and 270 degrees are classes too."
)
NAMES = (
    "net data data_dir splits image_size skip_bad_images labels way shot queries tasks steps "
    "outer_lr schedule rotations"
).split()


def config(method: str, seed: int, eval_every: int) -> runs.Config:
    """The configuration that the flags and these say."""
    values = {name: FLAGS[name].value for name in NAMES}
    return runs.Config(method=method, seed=seed, eval_every=eval_every, **values)

"""The flags that say what is trained on, and how, whatever the method: shared by entry points."""

from absl import flags

from experiments import runs, source
from experiments.cli import BadInput
from experiments.protocols import PROTOCOLS
from mgaug_jax.data import DATASETS

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "protocol", None, "A published protocol; sets other flags' defaults. See experiments.protocols."
)
flags.DEFINE_string(
    "net", None, "Spec of the network: conv4(width=64), resnet10, mlp. Default: by the data."
)
# Without a default value, since experiments.evaluate has a flag of this name that means more.
flags.DEFINE_string(
    "data",
    None,
    f"Data set: {', '.join(DATASETS)} or sinusoid. Default: glyphs.",
    allow_override=True,
)
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
flags.DEFINE_integer("queries", 5, "Query examples per class in training.")
flags.DEFINE_integer("test_shot", None, "Support examples per class in tests. Default: --shot.")
flags.DEFINE_integer("test_queries", None, "Query examples per class in tests. Default: 15.")
flags.DEFINE_integer("test_steps", None, "Inner steps in tests. Default: the method's.")
flags.DEFINE_string(
    "test_labels",
    "exclusive",
    "Classes of a test task: exclusive (any), or shuffled_groups (neighbours, as D'Claw's two "
    "classes of an object), in random order.",
)
flags.DEFINE_integer("tasks", 4, "Tasks per meta-step.")
flags.DEFINE_integer("steps", 400, "Meta-steps.")
flags.DEFINE_float("outer_lr", 1e-3, "Learning rate of Adam in the outer loop.")
flags.DEFINE_string(
    "schedule", "constant", "Outer learning rate over the run: constant, or cosine (down to 0)."
)
flags.DEFINE_bool(
    "rotations", False, "Training classes turned by 90, 180 and 270 degrees are classes too."
)
flags.DEFINE_bool("test_rotations", False, "The same of the classes of validation and test.")
NAMES = (
    "net data data_dir splits image_size skip_bad_images labels way shot queries tasks steps "
    "outer_lr schedule rotations test_shot test_queries test_steps test_labels "
    "test_rotations"
).split()


def adopt_protocol() -> None:
    """Makes the values of `--protocol` the defaults of flags that the command line leaves out.

    Raises:
      BadInput: There is no such protocol.
    """
    if FLAGS.protocol is None:
        return
    if FLAGS.protocol not in PROTOCOLS:
        raise BadInput(f"{FLAGS.protocol!r} is no protocol; known: {', '.join(PROTOCOLS)}.")
    for name, value in PROTOCOLS[FLAGS.protocol].flags.items():
        if name in FLAGS and not FLAGS[name].present:
            FLAGS.set_default(name, value)


def config(method: str, seed: int, eval_every: int) -> runs.Config:
    """The configuration that the flags and these say."""
    values = {name: FLAGS[name].value for name in NAMES}
    values["data"] = values["data"] or "glyphs"
    return runs.Config(method=method, seed=seed, eval_every=eval_every, **values)

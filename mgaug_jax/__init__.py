"""Few-shot meta-learning by augmented meta-gradients, as pure JAX functions.

from mgaug_jax import cp, fomaml, nets, run, sampler, trainer

method = cp(keep=0.98)(fomaml(nets.conv4(way=5, image=(28, 28, 1)), lr=0.1))
"""

from mgaug_jax import (
    bounds,
    data,
    divergences,
    episodes,
    losses,
    nets,
    outer,
    perturb,
    pruning,
    sharding,
    taml,
)
from mgaug_jax.augmentations import augment, rotate_classes, shift_targets, shuffle_labels
from mgaug_jax.bottleneck import mr_activations, mr_weights
from mgaug_jax.copies import maxup
from mgaug_jax.episodes import Images, sample_task, sampler
from mgaug_jax.evaluation import evaluate, interval
from mgaug_jax.judging import metamix, multi_step_loss, reptile
from mgaug_jax.learners import descend, inductive, prototypes, transductive
from mgaug_jax.loops import run
from mgaug_jax.memory import tasks_at_once
from mgaug_jax.meta import State, Trainer, meta_gradient, subnet, trainer, view
from mgaug_jax.methods import anil, first_order, fomaml, freeze, lslr, maml, meta_sgd, protonet
from mgaug_jax.modifiers import compose, cp, mgaug, pp, wp
from mgaug_jax.outer import fresh_optimizer, l2, weight_decay
from mgaug_jax.perturb import drop_grad, noise
from mgaug_jax.photo import photo_augment
from mgaug_jax.sharding import sharded
from mgaug_jax.types import (
    Examples,
    Learner,
    MetaParams,
    Method,
    Net,
    Probe,
    Role,
    Task,
    Views,
    identity,
)
from mgaug_jax.weighting import feedback, probe_gradients

__version__ = "0.1.0"

__all__ = [
    "Examples",
    "Images",
    "Learner",
    "MetaParams",
    "Method",
    "Net",
    "Probe",
    "Role",
    "State",
    "Task",
    "Trainer",
    "Views",
    "anil",
    "augment",
    "bounds",
    "compose",
    "cp",
    "data",
    "descend",
    "divergences",
    "drop_grad",
    "episodes",
    "evaluate",
    "feedback",
    "first_order",
    "fomaml",
    "freeze",
    "fresh_optimizer",
    "identity",
    "inductive",
    "interval",
    "l2",
    "losses",
    "lslr",
    "maml",
    "maxup",
    "meta_gradient",
    "meta_sgd",
    "metamix",
    "mgaug",
    "mr_activations",
    "mr_weights",
    "multi_step_loss",
    "nets",
    "noise",
    "outer",
    "perturb",
    "photo_augment",
    "pp",
    "probe_gradients",
    "protonet",
    "prototypes",
    "pruning",
    "reptile",
    "rotate_classes",
    "run",
    "sample_task",
    "sampler",
    "sharded",
    "sharding",
    "shift_targets",
    "shuffle_labels",
    "subnet",
    "taml",
    "tasks_at_once",
    "trainer",
    "transductive",
    "view",
    "weight_decay",
    "wp",
]

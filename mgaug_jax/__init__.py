"""Few-shot meta-learning by augmented meta-gradients, as pure JAX functions.

from mgaug_jax import cp, fomaml, nets, run, sampler, trainer

method = cp(keep=0.98)(fomaml(nets.conv4(way=5, image=(28, 28, 1)), lr=0.1))
"""

from mgaug_jax import data, episodes, losses, nets, perturb, pruning
from mgaug_jax.episodes import Images, sample_task, sampler
from mgaug_jax.evaluation import evaluate, interval
from mgaug_jax.learners import descend, inductive, prototypes, transductive
from mgaug_jax.meta import State, Trainer, meta_gradient, run, subnet, trainer, view
from mgaug_jax.methods import anil, first_order, fomaml, maml, meta_sgd, protonet
from mgaug_jax.modifiers import compose, cp, mgaug, pp, wp
from mgaug_jax.perturb import drop_grad, l2, noise
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
    "compose",
    "cp",
    "data",
    "descend",
    "drop_grad",
    "episodes",
    "evaluate",
    "feedback",
    "first_order",
    "fomaml",
    "identity",
    "inductive",
    "interval",
    "l2",
    "losses",
    "maml",
    "meta_gradient",
    "meta_sgd",
    "mgaug",
    "nets",
    "noise",
    "perturb",
    "pp",
    "probe_gradients",
    "protonet",
    "prototypes",
    "pruning",
    "run",
    "sample_task",
    "sampler",
    "subnet",
    "trainer",
    "transductive",
    "view",
    "wp",
]

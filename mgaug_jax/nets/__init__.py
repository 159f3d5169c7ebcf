"""Networks: the papers' backbones and adapters for a user's own."""

from mgaug_jax.nets.adapters import from_functions, from_linen, from_nnx
from mgaug_jax.nets.backbones import conv4, global_mean, mlp, resnet10, resnet18, top_left_mean
from mgaug_jax.nets.lowering import Lowering

__all__ = [
    "Lowering",
    "conv4",
    "from_functions",
    "from_linen",
    "from_nnx",
    "global_mean",
    "mlp",
    "resnet10",
    "resnet18",
    "top_left_mean",
]

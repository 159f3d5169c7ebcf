"""The papers' networks: Conv-4, ResNet-10, ResNet-18, and the regression MLP."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mgaug_jax.checks import check_count, check_function, check_kind
from mgaug_jax.nets import lowering
from mgaug_jax.nets.adapters import check_shape, net_of
from mgaug_jax.nets.block import block
from mgaug_jax.nets.layers import BatchNorm, Conv, Dense, normal_fan_out
from mgaug_jax.nets.lowering import Lowering
from mgaug_jax.types import Array, Net, Role


class ConvNet(nn.Module):
    """Blocks of conv 3x3, batch norm, ReLU, 2x2 max pool; then a linear head of `way` outputs."""

    way: int | None
    width: int
    depth: int
    dtype: Any = None
    first: int | None = None
    how: Lowering | None = None

    @nn.compact
    def __call__(self, x: Array, start: int = 0, stop: int | None = None) -> Array:
        stop = self.depth if stop is None else stop
        for i in range(start, stop):
            if i and self.dtype is not None:  # the first block is computed as its images are
                x = x.astype(self.dtype)
            # The convolution's bias is a parameter that does nothing: the norm would take it away,
            # and what rounding makes of its gradient.
            kernel, _ = Conv(self.width, name=f"conv{i}").parameters(x.shape[-1])
            scale, bias = BatchNorm(name=f"norm{i}").parameters(self.width)
            x = block(x, kernel, scale, bias, self.first, self.how)
        if stop < self.depth:
            return x
        # Channels first, as PyTorch flattens: `Dense` on a smaller map then takes the rows that
        # the released code takes.
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1).astype(lowering.summed(x))
        return x if self.way is None else Dense(self.way, name="head")(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    width: int
    stride: int
    first: int | None
    how: Lowering | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv_norm(x: Array, size: int, stride: int, name: str) -> Array:
            options = self.width, size, stride, False, normal_fan_out, self.how
            x = Conv(*options, name=f"conv{name}")(x)
            return BatchNorm(self.first, name=f"norm{name}")(x)

        y = nn.relu(conv_norm(x, 3, self.stride, "0"))
        y = conv_norm(y, 3, 1, "1")
        if x.shape[-1] != self.width:
            x = conv_norm(x, 1, self.stride, "_shortcut")
        return nn.relu(x + y)


def global_mean(x: Array) -> Array:
    """`[n, h, w, c] -> [n, c]`: any resolution."""
    return jnp.mean(x, (1, 2))


def top_left_mean(x: Array) -> Array:
    """Mean over rows and columns 0..4, the released code's pool.

    Raises:
      ValueError: The map is smaller than 5x5.
    """
    if min(x.shape[1:3]) < 5:
        raise ValueError(
            f"top_left_mean averages 5x5 positions but the last map is {x.shape[1]}x{x.shape[2]}. "
            "Use larger images or pool=global_mean."
        )
    return jnp.mean(x[:, :5, :5], (1, 2))


class ResNet(nn.Module):
    """7x7 stem, four stages of basic blocks, a pool, and a linear head of `way` outputs."""

    way: int | None
    blocks: int
    pool: Callable[[Array], Array]
    dtype: Any = None
    first: int | None = None
    how: Lowering | None = None

    @nn.compact
    def __call__(self, x: Array, start: int = 0, stop: int = 4) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        if start == 0:
            x = Conv(64, 7, 2, False, normal_fan_out, self.how, name="conv")(x)
            x = nn.relu(BatchNorm(self.first, name="norm")(x))
            x = lowering.max_pool_3x3(x)
        for stage in range(start, stop):
            for i in range(self.blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage}_block{i}"
                x = BasicBlock(64 * 2**stage, stride, self.first, self.how, name=name)(x)
        if stop < 4:
            return x
        x = self.pool(x.astype(lowering.summed(x)))
        return x if self.way is None else Dense(self.way, name="head")(x)


def conv_roles(params) -> dict:
    """Conv kernels prunable, their outputs, biases and norms narrowed by width, `head` apart."""
    return _roles(params, prunable=4)


def _roles(params, prunable: int) -> dict:
    """Roles of layers that are named by their kind and block: conv0, stage2_block1, dense1, head.

    Kernels with `prunable` axes may be pruned; "conv" and "norm" alone are a stem, in block 0.
    """
    blocks = {name: int((re.findall(r"\d+", name) or ["0"])[0]) for name in params}

    def role(path, leaf) -> Role:
        name = path[0].key
        if name == "head":
            return Role(head=True, block=max(blocks.values()))
        return Role(leaf.ndim == prunable, leaf.ndim - 1, block=blocks[name])

    return jax.tree_util.tree_map_with_path(role, params)


def conv4(
    way: int | None = 5,
    *,
    width: int = 64,
    image: tuple[int, int, int] = (84, 84, 3),
    dtype: Any = None,
    lowering: Lowering | None = None,
) -> Net:
    """Conv-4: four blocks of `width` channels and, unless `way` is None, a linear head.

    Args:
      way: Number of classes; None for the embedding `[n, d]` that ProtoNet takes.
      width: Channels of every block; 64 in MGAug, 32 in Finn's mini-ImageNet runs.
      image: Height, width and channels of the largest images the network will see.
      dtype: `jnp.bfloat16` to keep maps, and multiply, in it; parameters, their gradients,
        statistics and outputs stay float32. None: the type of parameters and images.
      lowering: How it computes, such as `nets.lowering.chosen()._replace(native=True)`; None: as is
        fastest on the backend.

    Returns:
      A `Net`. 121,093 parameters for (84, 84, 3) and 5 ways, 113,088 without the head.

    Raises:
      ValueError: The images are too small for four halvings, or the type or `lowering` is another.
    """
    _check_computed(dtype, lowering)
    check_count("width", width)
    if way is not None:
        check_count("way", way)
    check_shape("image", image, 3)
    if min(image[:2]) < 16:
        raise ValueError(
            f"conv4 halves its input four times but the images are {image[0]}x{image[1]}. "
            "Use images of at least 16x16."
        )
    return _conv_net(ConvNet(way, width, depth=4, dtype=dtype, how=lowering), image)


def resnet10(
    way: int | None = 5,
    *,
    image: tuple[int, int, int] = (224, 224, 3),
    pool: Callable[[Array], Array] = global_mean,
    dtype: Any = None,
    lowering: Lowering | None = None,
) -> Net:
    """ResNet-10: one basic block per stage; `way`, `image`, `dtype`, `lowering` as in `conv4`.

    `pool` makes `[n, c]` of the last map: `global_mean`, or the released code's `top_left_mean`.
    """
    return _resnet(way, 1, image, pool, dtype, lowering)


def resnet18(
    way: int | None = 5,
    *,
    image: tuple[int, int, int] = (224, 224, 3),
    pool: Callable[[Array], Array] = global_mean,
    dtype: Any = None,
    lowering: Lowering | None = None,
) -> Net:
    """ResNet-18: two basic blocks per stage; arguments as for `resnet10`."""
    return _resnet(way, 2, image, pool, dtype, lowering)


def _check_computed(dtype: Any, lowering: Lowering | None) -> None:
    if dtype is not None and dtype != jnp.bfloat16:
        raise ValueError(f"dtype={dtype!r} must be jnp.bfloat16, or None for that of the images.")
    if lowering is not None:
        check_kind("lowering", lowering, Lowering, "nets.Lowering(native=True)")


def _resnet(way, blocks, image, pool, dtype, lowering) -> Net:
    _check_computed(dtype, lowering)
    if way is not None:
        check_count("way", way)
    check_shape("image", image, 3)
    check_function("pool", pool, "nets.global_mean")
    return _conv_net(ResNet(way, blocks, pool, dtype, how=lowering), image)


def _conv_net(module: Any, image: tuple[int, int, int]) -> Net:
    by_first = lambda m: module.clone(first=m)
    net = net_of(module, image, conv_roles, by_first=by_first, depth=4)
    return net._replace(lowering=module.how)


class Perceptron(nn.Module):
    """Dense layers with a ReLU after each but the last."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: Array, start: int = 0, stop: int | None = None) -> Array:
        stop = len(self.hidden) if stop is None else stop
        for i in range(start, stop):
            x = nn.relu(Dense(self.hidden[i], name=f"dense{i}")(x))
        return x if stop < len(self.hidden) else Dense(self.outputs, name="head")(x)


def mlp(hidden: tuple[int, ...] = (40, 40), *, inputs: int = 1, outputs: int = 1) -> Net:
    """The regression network of the sinusoid problems: `[n, inputs] -> [n, outputs]`.

    Raises:
      ValueError: `hidden` is not a tuple of positive integers, or another size is none.
    """
    check_count("inputs", inputs)
    check_count("outputs", outputs)
    if not isinstance(hidden, tuple | list):
        raise ValueError(f"hidden={hidden!r} must be a tuple of layer widths, as in (40, 40).")
    for width in hidden:
        check_count("a width in hidden", width)
    module = Perceptron(tuple(hidden), outputs)
    return net_of(module, (inputs,), partial(_roles, prunable=2), depth=len(hidden))

"""Linen layers without state: batch norm on batch statistics, PyTorch's initialisation."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mgaug_jax.nets import lowering

Array = jax.Array


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for kernels and biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def normal_fan_out(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """N(0, 2 / (kh kw out)), the released code's initialisation of ResNet kernels."""
    kh, kw, _, out = shape
    return jax.random.normal(key, shape, dtype) * (2 / (kh * kw * out)) ** 0.5


class Conv(nn.Module):
    """`kernel [size, size, in, features]`, with a bias unless told otherwise."""

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    how: lowering.Lowering | None = None

    @nn.compact
    def parameters(self, inputs: int) -> tuple[Array, Array | None]:
        """Kernel and bias for images of so many channels."""
        fan_in = self.size**2 * inputs
        shape = (self.size, self.size, inputs, self.features)
        kernel = self.param("kernel", self.kernel_init or uniform_fan_in(fan_in), shape)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", uniform_fan_in(fan_in), (self.features,))

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.parameters(x.shape[-1])
        y = lowering.conv(x, kernel, self.stride, self.size // 2, self.how)
        return y if bias is None else y + lowering.rounded(bias, y)


class BatchNorm(nn.Module):
    """`scale (x - mean) / sqrt(var + 1e-5) + bias`, statistics over batch, height and width.

    The statistics are those of the first `first` examples, of all when it is None: there are no
    running averages, so evaluation is transductive unless the caller says otherwise.
    """

    first: int | None = None

    @nn.compact
    def parameters(self, features: int) -> tuple[Array, Array]:
        """Scale and bias `[features]`."""
        scale = self.param("scale", nn.initializers.ones, (features,))
        return scale, self.param("bias", nn.initializers.zeros, (features,))

    def __call__(self, x: Array) -> Array:
        scale, bias = self.parameters(x.shape[-1])
        mean, var = lowering.moments(x, self.first)
        y = (x - mean) * (scale * jax.lax.rsqrt(var + lowering.EPSILON)) + bias
        return lowering.rounded(y, x)


class Dense(nn.Module):
    """`x @ kernel[:d] + bias`, `d` the width of `x`.

    `d` may be smaller than at initialisation: images of a lower resolution then meet the first `d`
    rows of the kernel, which is what the released MGAug code does with its classifier.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        shape = (d, self.features)
        if not self.is_initializing():
            rows = self.get_variable("params", "kernel").shape[0]
            if rows < d:
                raise ValueError(
                    f"The head was made for {rows} features but the input gives {d}; "
                    "make the network with the largest image size it will see."
                )
            shape = (rows, self.features)
        kernel = self.param("kernel", uniform_fan_in(shape[0]), shape)
        bias = self.param("bias", uniform_fan_in(shape[0]), (self.features,))
        return x @ kernel[:d] + bias

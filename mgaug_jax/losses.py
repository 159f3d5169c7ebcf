"""Losses and scores of predictions; `y` is one-hot, soft, or a regression target."""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, y: Array) -> Array:
    """`-mean_n sum_c y log softmax(logits)` of logits and targets `[n, W]`."""
    chex.assert_equal_shape((logits, y))
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))


def squared_error(outputs: Array, y: Array) -> Array:
    """Mean of `(outputs - y)^2` over all entries of `[n, d]`."""
    chex.assert_equal_shape((outputs, y))
    return jnp.mean(jnp.square(outputs - y))


def accuracy(logits: Array, y: Array) -> Array:
    """Fraction of examples whose largest logit is at the largest entry of `y [n, W]`."""
    chex.assert_equal_shape((logits, y))
    return jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(y, axis=-1))

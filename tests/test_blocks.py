"""Networks cut into blocks, whole and masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import mlp
from small import assert_close, batch, conv, floats, zero

from mgaug_jax import (
    nets,
)
from mgaug_jax.meta import subnet

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("name", ["conv4", "resnet10", "mlp"])
def test_blocks_in_a_row_are_the_network(name):
    net, x = {
        "conv4": lambda: (nets.conv4(3, width=4, image=(16, 16, 1)), jnp.ones((2, 16, 16, 1))),
        "resnet10": lambda: (nets.resnet10(3, image=(32, 32, 1)), jnp.ones((2, 32, 32, 1))),
        "mlp": lambda: (nets.mlp((6, 5, 4), inputs=3), jnp.ones((2, 3))),
    }[name]()
    x = x + jax.random.normal(jax.random.key(1), x.shape)
    params = net.init(zero())
    whole = net.apply(params, x)
    for cut in range(1, net.depth):
        h = net.part(params, net.part(params, x, 0, cut), cut, net.depth)
        np.testing.assert_allclose(h, whole, rtol=1e-5, atol=1e-6)
    blocks = {role.block for role in jax.tree.leaves(net.roles)}
    assert blocks == set(range(net.depth))
    heads = [role.block for role in jax.tree.leaves(net.roles) if role.head]
    assert set(heads) == {net.depth - 1}


def test_a_block_uses_the_weights_that_its_role_says():
    net = conv()
    params = net.init(zero())
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    for block in range(2):
        h = net.part(params, x, 0, block)
        grads = jax.grad(lambda p, h=h, b=block: jnp.sum(net.part(p, h, b, b + 1) ** 2))(params)
        used = jax.tree.map(lambda g: bool((g != 0).any()), grads)
        for role, u in zip(*map(jax.tree.leaves, (net.roles, used)), strict=True):
            assert u == (role.block == block) or (not role.prunable and not u)  # a norm's biases


def test_a_sub_network_masks_its_blocks(x64):
    net = mlp()
    params = floats(net.init(zero()))
    mask = jax.tree.map(lambda w: (jnp.abs(w) > 0.05).astype(float), params)
    x = batch().query.x[0]
    small = subnet(net, mask)
    assert_close(
        small.part(params, x, 0, 2), net.apply(jax.tree.map(jnp.multiply, params, mask), x)
    )

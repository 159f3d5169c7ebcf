"""Networks: shapes, the lowering of convolutions and pools, batch norm, adapters."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks, small_conv
from flax import nnx
from jax.extend.core import jaxprs_in_params

from mgaug_jax import (
    anil,
    cp,
    fomaml,
    inductive,
    maml,
    meta_gradient,
    mgaug,
    nets,
    pp,
    protonet,
    pruning,
    trainer,
    transductive,
    wp,
)
from mgaug_jax.nets import backbones, layers, lowering, winograd
from mgaug_jax.nets.block import block
from mgaug_jax.types import Examples, MetaParams

pytestmark = pytest.mark.usefixtures("quick_compile")
NHWC = ("NHWC", "HWIO", "NHWC")
PRUNERS = {
    "wp": wp(keep=0.5),
    "pp": pp(keep=0.5),
    "bernoulli": pp(pruner=pruning.bernoulli_parameters, keep=0.5),
    "cp": cp(keep=0.5),
    "cp globally": cp(ranking=pruning.globally, keep=0.5),
    "cp exact": cp(select=pruning.exact, keep=0.5),
    "cp initial": cp(scores=pruning.initial, keep=0.5),
}


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def count(net):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(net)))


def outputs(net, *shape):
    return jax.eval_shape(net.apply, shapes(net), jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def randomised(shapes):
    """Float64 parameters, none of them zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)


def lax_conv(x, kernel, stride=1, padding=1):
    pad = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=NHWC)


def lax_pool(x, size, stride, padding):
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, pad)


def numpy_norm(x, params):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return np.asarray(params["scale"]) * (x - mean) / np.sqrt(var + 1e-5) + params["bias"]


# --- Conv-4 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "parameters"), [(5, 121_093), (None, 113_088)])
def test_conv4_has_as_many_parameters_as_the_released_checkpoints(way, parameters):
    assert count(nets.conv4(way, image=(84, 84, 3))) == parameters


def test_conv4_parameter_shapes():
    want = {"head": {"kernel": (1600, 5), "bias": (5,)}}
    for i in range(4):
        want[f"conv{i}"] = {"kernel": (3, 3, 64 if i else 3, 64), "bias": (64,)}
        want[f"norm{i}"] = {"scale": (64,), "bias": (64,)}
    assert jax.tree.map(lambda leaf: leaf.shape, shapes(nets.conv4())) == want


@pytest.mark.parametrize(("size", "flat"), [(84, 1600), (64, 1024), (48, 576)])
def test_conv4_flattened_sizes(size, flat):
    assert outputs(nets.conv4(None), 2, size, size, 3) == (2, flat)
    assert outputs(nets.conv4(5), 2, size, size, 3) == (2, 5)


def test_conv4_of_finn_has_800_features():
    assert outputs(nets.conv4(None, width=32), 2, 84, 84, 3) == (2, 800)


@pytest.mark.parametrize("size", [48, 32])
def test_conv4_is_blocks_and_the_first_rows_of_a_channel_major_head(x64, size):
    net = nets.conv4(3, width=4, image=(48, 48, 1))
    params = randomised(shapes(net))
    x = jax.random.normal(jax.random.key(1), (3, size, size, 1))
    out = jax.jit(net.apply)(params, x)
    y = np.asarray(x)
    for i in range(4):
        y = lax_conv(y, params[f"conv{i}"]["kernel"]) + params[f"conv{i}"]["bias"]
        y = np.maximum(numpy_norm(np.asarray(y), params[f"norm{i}"]), 0)
        h = y.shape[1] // 2
        y = y[:, : 2 * h, : 2 * h].reshape(3, h, 2, h, 2, 4).max((2, 4))
    flat = [[y[n, i, j, c] for c in range(4) for i in range(h) for j in range(h)] for n in range(3)]
    head = jax.tree.map(np.asarray, params["head"])
    assert head["kernel"].shape == (36, 3)
    want = np.array(flat) @ head["kernel"][: 4 * h * h] + head["bias"]
    np.testing.assert_allclose(out, want, rtol=1e-10, atol=1e-12)


def test_conv4_starts_uniform_within_fan_in():
    params = jax.jit(nets.conv4().init)(jax.random.key(0))
    for layer, fan_in in (("conv0", 27), ("conv1", 576), ("head", 1600)):
        for leaf in params[layer].values():
            assert jnp.abs(leaf).max() <= fan_in**-0.5
        kernel = params[layer]["kernel"]
        np.testing.assert_allclose(jnp.std(kernel), (3 * fan_in) ** -0.5, rtol=0.05)


def test_conv4_refuses_images_below_16_pixels():
    with pytest.raises(ValueError, match="at least 16x16"):
        nets.conv4(image=(15, 32, 3))


def test_head_refuses_images_larger_than_its_own():
    with pytest.raises(ValueError, match="largest image size"):
        outputs(small_conv(), 2, 32, 32, 1)


def test_conv4_roles():
    roles = nets.conv4().roles
    assert [roles[f"conv{i}"]["kernel"].prunable for i in range(4)] == [True] * 4
    assert roles["conv0"]["kernel"].width == 3
    for role in (roles["conv0"]["bias"], roles["norm0"]["scale"], roles["norm0"]["bias"]):
        assert (role.prunable, role.width, role.head) == (False, 0, False)
    for role in roles["head"].values():
        assert (role.prunable, role.width, role.head) == (False, None, True)


# --- ResNets --------------------------------------------------------------------------------


def resnet_count(blocks, way):
    total, inputs = 7 * 7 * 3 * 64 + 2 * 64, 64
    for width in (64, 128, 256, 512):
        for _ in range(blocks):
            total += 9 * inputs * width + 9 * width * width + 4 * width
            total += 0 if inputs == width else inputs * width + 2 * width
            inputs = width
    return total + (0 if way is None else (512 + 1) * way)


@pytest.mark.parametrize("way", [5, None])
@pytest.mark.parametrize(("make", "blocks"), [(nets.resnet10, 1), (nets.resnet18, 2)])
def test_resnet_parameters_and_outputs(make, blocks, way):
    net = make(way)
    assert count(net) == resnet_count(blocks, way)
    for size in (224, 140):
        assert outputs(net, 2, size, size, 3) == (2, way or 512)
    prunable = [
        leaf.shape
        for leaf, role in zip(jax.tree.leaves(shapes(net)), jax.tree.leaves(net.roles), strict=True)
        if role.prunable
    ]
    assert all(len(shape) == 4 for shape in prunable)
    assert len(prunable) == 1 + 8 * blocks + 3


@pytest.mark.parametrize(("width", "stride"), [(3, 1), (6, 2)], ids=["identity", "projected"])
def test_a_basic_block_equals_lax(x64, width, stride):
    block = backbones.BasicBlock(width, stride, None)
    x = jax.random.normal(jax.random.key(1), (2, 7, 8, 3))
    params = randomised(jax.eval_shape(block.init, jax.random.key(0), x)["params"])

    def conv_norm(x, name, stride, padding):
        y = lax_conv(x, params[f"conv{name}"]["kernel"], stride, padding)
        return numpy_norm(np.asarray(y), params[f"norm{name}"])

    y = conv_norm(np.maximum(conv_norm(x, "0", stride, 1), 0), "1", 1, 1)
    want = np.maximum(y + (x if width == 3 else conv_norm(x, "_shortcut", stride, 0)), 0)
    got = jax.jit(block.apply)({"params": params}, x)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_resnet_kernels_start_normal_by_fan_out():
    kernel = layers.normal_fan_out(jax.random.key(0), (3, 3, 64, 128))
    np.testing.assert_allclose(jnp.std(kernel), (2 / (9 * 128)) ** 0.5, rtol=0.02)


def test_top_left_mean_takes_five_rows_and_columns():
    x = jnp.arange(2 * 7 * 6 * 3.0).reshape(2, 7, 6, 3)
    want = np.mean([np.asarray(x)[:, i, j] for i in range(5) for j in range(5)], axis=0)
    np.testing.assert_allclose(nets.top_left_mean(x), want, rtol=1e-6)


def test_top_left_mean_refuses_a_map_below_5x5():
    net = nets.resnet10(pool=nets.top_left_mean)
    assert outputs(net, 2, 140, 140, 3) == (2, 5)
    with pytest.raises(ValueError, match="last map is 4x4"):
        outputs(net, 2, 128, 128, 3)


# --- lowering -------------------------------------------------------------------------------

CONVS = [(3, 1, 1), (5, 1, 2), (1, 1, 0), (7, 2, 3), (3, 2, 1), (1, 2, 0), (3, 1, 0)]
Lowering = lowering.Lowering
LOWERINGS = {
    "cpu": lowering.BACKENDS["cpu"],
    "others": Lowering(),
    "patches": Lowering(winograd=None, thin=0),
    "patches of some": Lowering(pixels=200, winograd=None),  # two of the images below
    "winograd of one": Lowering(pixels=50, winograd=0),
    "native": Lowering(native=True),
}


def derivatives(f, *args):
    """Value, gradient, and the gradient of the gradient's squared length."""
    argnums = tuple(range(len(args)))
    value = lambda *args: jnp.sum(jnp.sin(f(*args)))
    first = jax.grad(value, argnums)
    squares = lambda *args: sum(jnp.sum(g**2) for g in first(*args))
    return jax.jit(lambda *args: (f(*args), first(*args), jax.grad(squares, argnums)(*args)))(*args)


def close(got, want, tolerance=1e-9):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "channels", "name"),
    [(*conv, (3, 4), "cpu") for conv in CONVS]
    + [(5, 1, 2, (3, 4), "native"), (3, 2, 1, (3, 4), "native")]
    + [(3, 1, 1, channels, name) for channels in ((3, 9), (8, 9)) for name in LOWERINGS],
)
def test_conv_and_its_first_two_derivatives_equal_lax(x64, size, stride, padding, channels, name):
    keys = jax.random.split(jax.random.key(size), 2)
    x = jax.random.normal(keys[0], (4, 9, 10, channels[0]))
    kernel = jax.random.normal(keys[1], (size, size, *channels))
    ours = functools.partial(lowering.conv, how=LOWERINGS[name])
    got, want = (
        derivatives(lambda x, k, conv=conv: conv(x, k, stride, padding), x, kernel)
        for conv in (ours, lax_conv)
    )
    close(got, want)


def primitives(f, *args):
    """Names of all operations of a program, inner ones too."""

    def of(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jaxprs_in_params(equation.params):
                yield from of(inner)

    return set(of(jax.make_jaxpr(f)(*args).jaxpr))


def test_a_network_computes_by_its_own_lowering_whatever_was_compiled_before():
    """Lowerings share functions that are traced once, such as the checkpointed convolution."""
    make = functools.partial(nets.resnet10, 3, image=(32, 32, 3))
    x, found = jnp.zeros((20, 32, 32, 3)), {}
    for name in (*LOWERINGS, *LOWERINGS):
        net = make(lowering=LOWERINGS[name])
        loss = jax.jit(jax.grad(lambda params, net=net: jnp.sum(net.apply(params, x))))
        made = primitives(loss, shapes(net))
        assert found.setdefault(name, made) == made
        assert ("conv_general_dilated" in made) == (name == "native")
        assert ("scan" in made) == (name in ("cpu", "patches of some", "winograd of one"))


def test_without_one_a_network_has_the_lowering_of_the_backend():
    assert jax.default_backend() == "cpu"
    x = jnp.zeros((8, 16, 16, 1))
    text = lambda how: str(
        jax.make_jaxpr(nets.conv4(3, width=4, image=(16, 16, 1), lowering=how).apply)(
            shapes(small_conv()), x
        )
    )
    assert text(None) == text(lowering.BACKENDS["cpu"])
    assert text(None) != text(Lowering())


def test_a_second_order_meta_gradient_is_that_of_native_convolutions(x64):
    def found(how):
        net = nets.conv4(3, width=8, image=(16, 16, 2), lowering=how)
        step = jax.jit(functools.partial(meta_gradient, maml(net, lr=0.1, steps=1)))
        tasks = make_tasks(jax.random.key(1), shape=(16, 16, 2))
        return step(jax.random.key(0), MetaParams(randomised(shapes(net)), {}), tasks)[0]

    close(found(None), found(LOWERINGS["native"]), 1e-8)


def test_forward_mode_passes_through_native_residual_blocks(x64):
    block = backbones.BasicBlock(6, 2, None, LOWERINGS["native"])
    x, v = jax.random.normal(jax.random.key(1), (2, 2, 7, 8, 3))
    params = randomised(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
    loss = lambda s: jnp.sum(jnp.sin(block.apply({"params": params}, x + s * v)))
    forwards, backwards = (jax.jit(d(loss))(1.0) for d in (jax.jacfwd, jax.grad))
    assert abs(backwards) > 0.1
    np.testing.assert_allclose(forwards, backwards, rtol=1e-9)


def test_a_lowering_is_one():
    with pytest.raises(ValueError, match="lowering must be a Lowering such as"):
        nets.conv4(5, lowering="native")


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 4), (84, 3)])
def test_winograd_tiles_cover_maps_of_any_shape(x64, shape):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, *shape, 2))
    kernel = jax.random.normal(keys[1], (3, 3, 2, 3))
    y = jax.jit(lambda x, k: winograd.convolve(x, winograd.kernel(k)))
    close(y(x, kernel), lax_conv(x, kernel), 1e-12)


@pytest.mark.parametrize(("stride", "channels"), [(1, 2), (1, 8), (2, 2)])
def test_conv_equals_lax_under_vmap_over_kernels_inside_scan(x64, stride, channels):
    ours = functools.partial(lowering.conv, how=Lowering(pixels=50))  # one image at a time
    padding = 1
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 6, 7, channels))
    shape = (3, 4, 3, 3, channels, channels)  # 3 at once, 4 in turn
    kernels = jax.random.normal(keys[1], shape) / channels

    def grads(conv):
        def chain(x, kernels):
            def body(total, kernel):
                y = conv(x * (1 + total), kernel, stride, padding)
                return total + jnp.mean(jnp.sin(y)), None

            return jax.lax.scan(body, 0.0, kernels)[0]

        first = lambda x, k: sum(jnp.sum(g**2) for g in jax.grad(chain, (0, 1))(x, k))
        second = jax.value_and_grad(first, (0, 1))
        return jax.jit(jax.vmap(second, (None, 0)))

    got, want = grads(ours)(x, kernels), grads(lax_conv)(x, kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (4, 9)])
def test_max_pool_3x3_and_its_gradient_equal_reduce_window(x64, shape):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    other = lambda x: lax_pool(x, 3, 2, 1)
    np.testing.assert_array_equal(lowering.max_pool_3x3(x), other(x))
    grad = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x)
    np.testing.assert_allclose(grad(lowering.max_pool_3x3), grad(other), rtol=1e-12)


def plain_norm_relu_pool(y, scale, bias, first):
    """The composition; the ReLU comes last, since zeros would tie in the pool."""
    axes = (0, 1, 2)
    mean, var = jnp.mean(y[:first], axes), jnp.var(y[:first], axes)
    z = (y - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    h, w = z.shape[1] // 2, z.shape[2] // 2
    entries = [z[:, i : 2 * h : 2, j : 2 * w : 2] for i in range(2) for j in range(2)]
    return nn.relu(functools.reduce(jnp.maximum, entries))


def plain_block(x, kernel, scale, bias, first):
    y = lax_conv(x, kernel, 1, len(kernel) // 2)
    return plain_norm_relu_pool(y, scale, bias, first)


SCALES = jnp.array([1.5, -0.7, 0.3])


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (4, 9)])
def test_norm_relu_pool_and_its_first_two_derivatives_equal_the_composition(x64, shape, first):
    y = 2 + jax.random.normal(jax.random.key(0), (5, *shape, 3))
    bias = jnp.array([0.4, 0.1, -0.2])
    got, want = (
        derivatives(lambda *args, f=f: f(*args, first), y, SCALES.astype(float), bias)
        for f in (lowering.norm_relu_pool, plain_norm_relu_pool)
    )
    close(got, want)


@pytest.mark.parametrize("first", [None, 1])
def test_norm_relu_pool_equals_the_composition_under_vmap_inside_scan(x64, first):
    y = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    scales = jax.random.normal(jax.random.key(1), (3, 4, 3))  # 3 at once, 4 in turn

    def chain(f):
        def total(y, scales):
            def body(shift, scale):
                return shift + jnp.mean(jnp.sin(f(y * (1 + shift), scale, scale, first))), None

            return jax.lax.scan(body, 0.0, scales)[0]

        squares = lambda *args: sum(jnp.sum(g**2) for g in jax.grad(total, (0, 1))(*args))
        return jax.jit(jax.vmap(jax.value_and_grad(squares, (0, 1)), (None, 0)))(y, scales)

    close(chain(lowering.norm_relu_pool), chain(plain_norm_relu_pool))


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
def test_norm_relu_pool_sends_the_gradient_of_a_tie_to_the_first_entry(x64, scale):
    # statistics of other examples, so that nothing else reaches the map
    y = jnp.zeros((2, 4, 4, 1)).at[0].set(jax.random.normal(jax.random.key(0), (4, 4, 1)))
    y = y.at[1, 0, 2].set(-scale)  # the first of the upper right window is the smallest
    total = lambda y, scale: jnp.sum(lowering.norm_relu_pool(y, scale, jnp.ones(1) * 9, 1)[1])
    grad = jax.jit(jax.grad(total))(y, jnp.full(1, scale))[1, :, :, 0]
    want = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    rate = 1 / np.sqrt(np.var(np.asarray(y[0])) + 1e-5)
    np.testing.assert_allclose(grad, scale * rate * want, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "inputs", "first", "name"),
    [(3, 2, None, "cpu"), (1, 3, 3, "winograd of one"), (3, 8, 2, "cpu")]
    + [(3, 2, 2, name) for name in LOWERINGS],
)
def test_block_and_its_first_two_derivatives_equal_the_composition(x64, size, inputs, first, name):
    keys = jax.random.split(jax.random.key(size), 2)
    x = 2 + jax.random.normal(keys[0], (4, 7, 10, inputs))
    kernel = jax.random.normal(keys[1], (size, size, inputs, 3))
    args = x, kernel, SCALES.astype(float), jnp.array([0.4, 0.1, -0.2])
    ours = functools.partial(block, how=LOWERINGS[name])
    got, want = (
        derivatives(lambda *args, f=f: f(*args, first), *args) for f in (ours, plain_block)
    )
    close(got, want)


def test_block_equals_the_composition_under_vmap_inside_scan(x64):
    ours = functools.partial(block, how=Lowering(pixels=50))  # one image at a time
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 2))
    kernels = jax.random.normal(jax.random.key(1), (3, 4, 3, 3, 2, 3))  # 3 at once, 4 in turn

    def chain(f):
        def total(x, kernels):
            def body(shift, kernel):
                scale, bias = kernel[0, 0]
                return shift + jnp.mean(jnp.sin(f(x * (1 + shift), kernel, scale, bias, 1))), None

            return jax.lax.scan(body, 0.0, kernels)[0]

        squares = lambda *args: sum(jnp.sum(g**2) for g in jax.grad(total, (0, 1))(*args))
        return jax.jit(jax.vmap(jax.value_and_grad(squares, (0, 1)), (None, 0)))(x, kernels)

    close(chain(ours), chain(plain_block))


@pytest.mark.parametrize(
    ("scale", "chosen"), [(1, (0, 1, 0, 0)), (-1, (0, 0, -1, 0)), (0, (0, 1, 0, 0))]
)
def test_block_takes_the_first_of_equal_entries(x64, scale, chosen):
    """Of a channel with scale 0 all are equal, and the gradient by the scale names the entry."""
    x = jnp.zeros((2, 4, 4, 1)).at[0].set(jax.random.normal(jax.random.key(0), (4, 4, 1)))
    x = x.at[1, 0, 2].set(1).at[1, 3, 1].set(-1)  # first of upper right, last of lower left
    total = lambda scale: jnp.sum(block(x, jnp.ones((1, 1, 1, 1)), scale, jnp.ones(1) * 9, 1)[1])
    got = jax.jit(jax.grad(total))(jnp.full(1, float(scale)))
    mean, std = np.mean(x[0]), np.sqrt(np.var(x[0]) + 1e-5)
    np.testing.assert_allclose(got[0], sum((entry - mean) / std for entry in chosen), rtol=1e-12)


def test_no_variance_of_a_block_is_negative():
    """A map that cancels but for rounding, of images whose squares are large."""
    x = 1e3 * jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    x = jnp.concatenate([x, 3 * x], -1)
    kernel = jnp.array([[3.0], [-1.0]]) * jax.random.normal(jax.random.key(1), (20,))
    total = lambda kernel: jnp.sum(block(x, kernel, jnp.ones(20), jnp.ones(20)))
    found = jax.jit(jax.value_and_grad(total))(kernel.reshape(1, 1, 2, 20))
    assert all(jnp.isfinite(leaf).all() for leaf in found)


def products(jaxpr):
    """Types of the operands of all products in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({str(operand.aval.dtype) for operand in equation.invars})
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


@pytest.mark.parametrize("way", [3, None])
def test_bfloat16_is_for_products_of_maps_and_nothing_else(way):
    """On a CPU kernels and maps are rounded as well, but then widened."""
    net = nets.resnet10(way, image=(32, 32, 3), dtype=jnp.bfloat16, lowering=Lowering())

    def loss(params, x):
        inner = lambda params: jnp.mean(jnp.square(net.apply(params, x)))
        return inner(optax.tree.add_scale(params, -0.1, jax.grad(inner)(params)))

    x = jnp.zeros((2, 32, 32, 3))
    found = jax.eval_shape(jax.value_and_grad(loss), shapes(net), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    found = products(jax.make_jaxpr(net.apply)(shapes(net), x).jaxpr)
    head = [] if way is None else [{"float32"}]
    assert found == [{"bfloat16"}] * 12 + head
    first_order = jax.grad(lambda params: jnp.mean(jnp.square(net.apply(params, x))))
    found = products(jax.make_jaxpr(first_order)(shapes(net)).jaxpr)
    assert len(found) > 30
    assert found.count({"bfloat16"}) == len(found) - 3 * len(head)


def test_bfloat16_is_near_float32(key):
    make = functools.partial(nets.conv4, 3, width=16, image=(16, 16, 3))
    params = make().init(key)
    x = jax.random.normal(jax.random.key(1), (12, 16, 16, 3))

    def both(net):
        loss = lambda params: jnp.mean(jnp.square(net.apply(params, x)))
        return jax.jit(lambda params: (net.apply(params, x), jax.grad(loss)(params)))(params)

    for a, b in zip(both(make(dtype=jnp.bfloat16)), both(make()), strict=True):
        off = optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)
        assert 1e-4 < off < 0.15


def test_a_network_computes_in_bfloat16_or_as_it_is_given():
    with pytest.raises(ValueError, match=r"must be jnp.bfloat16, or None"):
        nets.conv4(5, dtype=jnp.float16)


def test_a_bias_before_a_norm_does_nothing(x64):
    net = small_conv()
    params = randomised(shapes(net))
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 1))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(net.apply(params, x)))))(params)
    assert not grads["conv1"]["bias"].any()
    assert grads["norm1"]["bias"].any()


def test_max_pool_3x3_sends_the_gradient_of_a_tie_to_the_first_entry():
    grad = jax.grad(lambda x: jnp.sum(lowering.max_pool_3x3(x)))(jnp.zeros((1, 4, 4, 1)))
    want = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(grad[0, :, :, 0], want)


@pytest.mark.parametrize("net", [small_conv(), nets.mlp((4,), inputs=4)], ids=["conv", "mlp"])
def test_map_tasks_maps(net):
    got = lowering.map_tasks(
        net, lambda a, b: (a @ b, {"sum": a + b}), jnp.eye(3), jnp.ones((3, 3))
    )
    np.testing.assert_array_equal(got[0], np.ones(3))
    np.testing.assert_array_equal(got[1]["sum"], np.eye(3) + 1)


# --- batch norm -----------------------------------------------------------------------------


def test_batch_norm_output_has_the_moments_asked_for(x64):
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (5, 4, 6, 3))
    params = {"scale": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.0, 1.0, -3.0])}
    y = np.asarray(layers.BatchNorm().apply({"params": params}, x))
    var = np.var(np.asarray(x), axis=(0, 1, 2))
    np.testing.assert_allclose(y.mean((0, 1, 2)), params["bias"], atol=1e-12)
    want = np.abs(params["scale"]) * np.sqrt(var / (var + 1e-5))
    np.testing.assert_allclose(y.std((0, 1, 2)), want, rtol=1e-10)


def test_batch_norm_by_first_takes_the_moments_of_the_first_examples(x64):
    x = jax.random.normal(jax.random.key(0), (7, 2, 2, 3))
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    y = np.asarray(layers.BatchNorm(4).apply({"params": params}, x))
    first = np.asarray(x)[:4]
    want = (x - first.mean((0, 1, 2))) / np.sqrt(first.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-10)


@pytest.mark.parametrize(("forward", "depends"), [(inductive, False), (transductive, True)])
def test_a_query_depends_on_the_other_queries_only_transductively(x64, forward, depends):
    net = small_conv()
    params = randomised(shapes(net))
    support, x, others = jax.random.normal(jax.random.key(1), (3, 4, 16, 16, 1))
    predict = jax.jit(lambda x: forward(net, params, Examples(support, None), x))
    change = jnp.abs(predict(x)[0] - predict(x.at[1:].set(others[1:]))[0]).max()
    assert change > 1e-3 if depends else change < 1e-12


def test_apply_by_all_equals_apply(x64):
    net = nets.conv4(3, width=4, image=(16, 16, 1))
    params = randomised(shapes(net))
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 1))
    by_all = jax.jit(lambda params, x: net.apply_by_first(params, x, 3))(params, x)
    np.testing.assert_allclose(by_all, jax.jit(net.apply)(params, x), rtol=1e-12)


@pytest.mark.parametrize("make", [maml, protonet])
def test_a_method_refuses_inductive_on_a_net_that_cannot(make):
    with pytest.raises(ValueError, match="cannot choose its statistics"):
        make(nets.mlp(), forward=inductive)


def test_inductive_refuses_a_net_that_cannot():
    net = nets.mlp()
    x = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="cannot choose its statistics"):
        inductive(net, net.init(jax.random.key(0)), Examples(x, x), x)


# --- adapters -------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x)).mean((1, 2)))


class NnxNorm(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=False, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(256, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def functional_init(key):
    k_in, k_out = jax.random.split(key)
    hidden = {"w": 0.1 * jax.random.normal(k_in, (256, 8)), "b": jnp.zeros(8)}
    return [hidden, {"w": jax.random.normal(k_out, (8, 3)), "b": jnp.zeros(3)}]


def functional_apply(params, x):
    hidden, out = params
    h = jax.nn.relu(x.reshape(len(x), -1) @ hidden["w"] + hidden["b"])
    return h @ out["w"] + out["b"]


ADAPTED = {
    "linen": lambda: nets.from_linen(Linen(), (16, 16, 1), head="Dense_0"),
    "nnx conv": lambda: nets.from_nnx(lambda rngs: NnxConv(rngs), head="out"),
    "nnx norm": lambda: nets.from_nnx(lambda rngs: NnxNorm(rngs), head="out"),
    "nnx mlp": lambda: nets.from_nnx(lambda rngs: NnxMlp(rngs), head="out"),
    "functions": lambda: nets.from_functions(functional_init, functional_apply, head="1"),
}


def roles_by_name(net):
    """`{"conv/kernel": (prunable, width, head)}`."""
    leaves = jax.tree_util.tree_leaves_with_path(net.roles)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): (role.prunable, role.width, role.head) for path, role in leaves}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_model_meta_trains_with_cp(name):
    net = ADAPTED[name]()
    train = trainer(cp(keep=0.5)(fomaml(net, lr=0.1, steps=1)), optax.sgd(0.1))
    state = jax.jit(train.init)(jax.random.key(0))
    new, info = jax.jit(train.step)(jax.random.key(1), state, make_tasks(jax.random.key(2)))
    assert jnp.isfinite(info["loss"])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params.net, new.params.net)
    for role, change in zip(jax.tree.leaves(net.roles), jax.tree.leaves(moved), strict=True):
        assert np.isfinite(change)
        assert change > 0 or not (role.prunable or role.head)


def test_from_linen_guesses_roles_and_applies_the_module(key):
    net = ADAPTED["linen"]()
    assert roles_by_name(net) == {
        "Conv_0/kernel": (True, 3, False),
        "Conv_0/bias": (False, 0, False),
        "BatchNorm_0/scale": (False, 0, False),
        "BatchNorm_0/bias": (False, 0, False),
        "Dense_0/kernel": (False, None, True),
        "Dense_0/bias": (False, None, True),
    }
    x = make_tasks(key).support.x[0]
    variables = Linen().init(key, x)
    want = Linen().apply(variables, x, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(net.apply(variables["params"], x), want, rtol=1e-5, atol=1e-6)


def test_from_nnx_guesses_roles_and_applies_the_module(key):
    net = ADAPTED["nnx norm"]()
    assert roles_by_name(net) == {
        "conv/kernel": (True, 3, False),
        "conv/bias": (False, 0, False),
        "norm/scale": (False, 0, False),
        "norm/bias": (False, 0, False),
        "out/kernel": (False, None, True),
        "out/bias": (False, None, True),
    }
    x = make_tasks(key).support.x[0]
    want = NnxNorm(nnx.Rngs(key))(x)
    np.testing.assert_allclose(net.apply(net.init(key), x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "hidden", "out"), [("nnx mlp", "hidden", "out")])
def test_a_dense_net_has_its_hidden_kernels_pruned(name, hidden, out):
    assert roles_by_name(ADAPTED[name]()) == {
        f"{hidden}/kernel": (True, 1, False),
        f"{hidden}/bias": (False, 0, False),
        f"{out}/kernel": (False, None, True),
        f"{out}/bias": (False, None, True),
    }


def test_from_functions_names_an_index_as_head():
    assert roles_by_name(ADAPTED["functions"]()) == {
        "0/w": (True, 1, False),
        "0/b": (False, 0, False),
        "1/w": (False, None, True),
        "1/b": (False, None, True),
    }


def test_in_a_convolutional_net_no_dense_kernel_is_pruned():
    roles = nets.from_linen(Linen(), (16, 16, 1)).roles
    assert roles["Conv_0"]["kernel"].prunable
    assert not roles["Dense_0"]["kernel"].prunable


@pytest.mark.parametrize("make", [lambda h: nets.from_linen(Linen(), (16, 16, 1), head=h)])
def test_an_unknown_head_is_refused_with_the_layers_there_are(make):
    with pytest.raises(ValueError, match=r"'Dense_7'.*Conv_0"):
        make("Dense_7")


def headless():
    return nets.from_functions(functional_init, functional_apply)


def linear():
    apply = lambda params, x: x.reshape(len(x), -1) @ params["w"]
    return nets.from_functions(lambda key: {"w": jnp.zeros((256, 3))}, apply, head="w")


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("make", [headless, linear])
def test_a_net_without_prunable_layers_is_refused_by_every_pruner(make, pruner):
    with pytest.raises(ValueError, match="nothing it could prune"):
        PRUNERS[pruner](fomaml(make()))


def test_anil_refuses_a_net_without_a_named_head():
    with pytest.raises(ValueError, match="head"):
        anil(headless())


def test_mlp_shapes():
    net = nets.mlp((7, 6), inputs=2, outputs=3)
    want = {"dense0": (2, 7), "dense1": (7, 6), "head": (6, 3)}
    assert {name: leaf["kernel"].shape for name, leaf in shapes(net).items()} == want
    assert roles_by_name(net)["dense1/kernel"] == (True, 1, False)
    assert roles_by_name(net)["head/kernel"] == (False, None, True)
    with pytest.raises(ValueError, match="twice"):
        PRUNERS["cp"](mgaug(pruning.width, keep=0.5)(fomaml(net)))

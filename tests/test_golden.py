"""One meta-step of algorithms, pruners and changes in float64, against numbers on file.

`python tests/test_golden.py` writes them anew; do so only when a change of results is meant.
"""

import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import ALGORITHMS, CHANGES, PRUNERS, mlp

from mgaug_jax import feedback, meta, probe_gradients
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles
from mgaug_jax.types import Examples, Probe, Task

FILE = pathlib.Path(__file__).with_name("golden.json")
REFRESH = "python tests/test_golden.py"
RTOL = 1e-9
MEASURED = ("maml", "fomaml", "anil", "meta_sgd", "protonet", "lslr")
CHANGED = ("noise", "noise_update", "noise_outer", "noise_outer_update", "drop", "drop_outer", "l2")
"""Of `maml` with CP; feedback, which needs stored gradients, is made in `measure`."""
IN_BLOCKS = ("inequality", "entropy", "metamix", "channel_shuffle", "multi_step", "maxup")
IN_BLOCKS += ("reptile", "mr_weights", "mr_activations", "weight_decay", "shuffle", "rotate")
"""The same, of a perceptron of three blocks, which compiles fast. (`aug` is float32.)"""
NAMES = [f"{algorithm}-{pruner}" for algorithm in MEASURED for pruner in PRUNERS]
NAMES += [f"maml-cp-{change}" for change in (*CHANGED, "feedback", *IN_BLOCKS)]


def conv(way):
    return net_of(ConvNet(way, 6, 1), (8, 8, 1), conv_roles)


def measure(name: str) -> dict[str, float]:
    """One step's metrics; inputs come from numpy, whose generator does not change."""
    algorithm, pruner, *change = name.split("-")
    net = mlp if set(change) & set(IN_BLOCKS) else conv
    method = PRUNERS[pruner](ALGORITHMS[algorithm](net))
    if change and change != ["feedback"]:
        method = CHANGES[change[0]](method)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    shapes = jax.eval_shape(method.algorithm(method.net, method.inner).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), shapes)
    if net is conv:
        norm = params.net["norm0"]
        params.net["norm0"] = {**norm, "scale": 0.3 + 0.3 * norm["scale"]}  # no channel dies
    means = np.random.default_rng(1).normal(size=(2, 3, 8, 8, 1))

    def part(n):
        x = jnp.asarray(np.repeat(means, n, axis=1)) + normal(2, 3 * n, 8, 8, 1)
        return Examples(x, jnp.tile(jnp.repeat(jnp.eye(3), n, axis=0), (2, 1, 1)))

    tasks = Task(part(1), part(4))
    if change == ["feedback"]:
        stored = jax.jit(partial(probe_gradients, method))(jax.random.key(3), params, tasks)
        method = feedback(jax.tree.map(lambda leaf: leaf[:1], stored))(method)
    step = jax.jit(partial(meta.meta_gradient, method))
    grads, info = step(jax.random.key(0), params, tasks)
    rule = method.outer(optax.with_extra_args_support(optax.sgd(1.0)))
    updates, _ = rule.update(grads, rule.init(params), params, key=jax.random.key(2))
    kept = 1.0
    if method.views is not None:
        probe = Probe(grads.net, lambda weights: jnp.zeros(()))
        masks = jax.jit(lambda key: method.views.masks(key, method.net, params.net, probe))
        drawn = masks(jax.random.key(1))
        ones = jax.tree.map(
            lambda m, w: m.reshape(m.shape + (1,) * (w.ndim + 1 - m.ndim)) * jnp.ones(w.shape),
            drawn,
            params.net,
        )
        kept = float(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ones)]).mean())
    return {
        "loss": float(info["loss"]),
        "accuracy": float(info["accuracy"]),
        "gradient_norm": float(optax.global_norm(updates)),
        "kept": kept,
    }


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", NAMES)
def test_a_meta_step_gives_the_numbers_on_file(x64, name):
    want, got = json.loads(FILE.read_text())[name], measure(name)
    assert set(got) == set(want), f"{name}: other metrics are on file; refresh by {REFRESH}"
    for metric, value in want.items():
        assert np.isclose(got[metric], value, rtol=RTOL, atol=0), (
            f"{name}: {metric} is {got[metric]!r}, but {value!r} is on file. If the change is "
            f"meant, refresh by {REFRESH}"
        )


def test_the_file_holds_every_method_and_tells_them_apart():
    golden = json.loads(FILE.read_text())
    assert list(golden) == NAMES
    assert all(np.isfinite(list(row.values())).all() for row in golden.values())
    # anil, fomaml and maml differ in their gradients; the pruners in everything
    norms = [row["gradient_norm"] for row in golden.values()]
    assert len({round(norm, 6) for norm in norms}) == len(NAMES)
    assert all((row["kept"] < 1) == ("-none" not in name) for name, row in golden.items())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        FILE.write_text(json.dumps({name: measure(name) for name in NAMES}, indent=1) + "\n")

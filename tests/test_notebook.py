"""The notebook on Theorem 1: it is its source, it runs, and what it computes is what it says."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks, small_conv

from experiments import cli, linear, loading, pruned, runs, store
from mgaug_jax import bounds, fomaml, nets
from mgaug_jax.divergences import LAWS
from mgaug_jax.losses import accuracy

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "experiments" / "pac_bayes.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


# --- the notebook ---------------------------------------------------------------------------


def cells_of_source() -> list[tuple[str, str]]:
    """`(kind, text)` of the cells of a py:percent file."""
    _, *parts = SOURCE.read_text().split("\n# %%")
    found = []
    for part in parts:
        head, _, text = part.partition("\n")
        kind = "markdown" if head.strip() == "[markdown]" else "code"
        if kind == "markdown":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.split("\n"))
        found.append((kind, text.strip("\n")))
    return found


def test_notebook_is_its_source_and_was_run():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == cells_of_source()
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert NOTEBOOK.stat().st_size < 300_000


def test_notebook_runs(tmp_path):
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "error::RuntimeWarning"}
    short = {"PAC_BAYES_SHORT": "1", "PAC_BAYES_OUT": str(tmp_path)}
    command = [sys.executable, "-m", "experiments.pac_bayes"]
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        copy = tmp_path / "copy.ipynb"
        command = [sys.executable, "-m", "jupyter", "execute", str(NOTEBOOK), f"--output={copy}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **fast, **short}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = copy.read_text() if "jupyter" in command else done.stdout
    for text in ("centred, best noise", "MR-MAML: ", "exact, 1e-3 and 100", "CP: rho"):
        assert text in said
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == ["linear", "need", "noise", "slack", "terms"]


@pytest.fixture
def begun(tmp_path, monkeypatch, glyph_cache):
    """Folders of runs that are at their beginning, by their data."""
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))

    def make(data: str, **other) -> Path:
        sizes = {"way": 3, "shot": 1, "queries": 2, "tasks": 1, "steps": 1}
        settings = {
            "method": "fomaml(lr=0.1,steps=1)|cp(keep=0.9,subnets=1)",
            "labels": "exclusive",
        }
        run = {"data_dir": None, "outer_lr": 1e-3, "eval_every": 1, "seed": 5}
        config = runs.Config(**(settings | sizes | run | {"data": data} | other))
        made = loading.setup(config)
        home = tmp_path / data
        home.mkdir()
        store.save(made, home, runs.begin(made))
        store.write_config(home, made)
        return home

    return make


def test_a_run_is_taken_as_it_is(begun):
    made, params = pruned.trained(begun("glyphs", net="conv4(width=4)"))
    assert (made.config.way, made.config.seed) == (3, 5)
    expected = jax.jit(made.trainer.init)(runs.keys(5)[0]).params
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    home = begun("sinusoid", net=None, method="maml(lr=0.01,steps=1)")
    with pytest.raises(cli.BadInput, match="trained on sinusoid; the bound here counts errors"):
        pruned.trained(home)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_notebook_runs_on_a_run(begun):
    home = begun("glyphs", net="conv4(width=4)")
    words = {"PAC_BAYES_SHORT": "1", "PAC_BAYES_RUN": str(home), "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "experiments.pac_bayes"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "(chance 0.67)" in done.stdout  # the run has three ways, the notebook's own five
    assert "m = 48, centred, whole, the" in done.stdout


@pytest.fixture
def shared_keys():
    """Draws are shared on purpose by the points of a grid, which the check of keys would refuse."""
    with jax.debug_key_reuse(False):
        yield


# --- what it computes -----------------------------------------------------------------------


def adapted_mlp(key):
    """A small network, tasks of vectors, and what two inner steps make of them."""
    k_net, k_tasks, k_adapt = jax.random.split(key, 3)
    net = nets.mlp((6,), inputs=4, outputs=3)
    method = fomaml(net, lr=0.5, steps=2)
    params = method.algorithm(net, method.test).init(k_net)
    tasks = make_tasks(k_tasks, tasks=3, shape=(4,))
    return (
        net,
        method,
        params,
        tasks,
        jax.jit(partial(pruned.adapt, method, net))(k_adapt, params, tasks),
    )


@pytest.mark.usefixtures("quick_compile")
def test_fixed_norm_lets_no_prediction_depend_on_another(key):
    net = small_conv()
    task = jax.tree.map(lambda x: x[0], make_tasks(key))
    judged = pruned.fixed_norm(net, task.support.x)
    params = net.init(jax.random.key(1))
    together = judged.apply(params, task.query.x)
    alone = jnp.concatenate([judged.apply(params, x[None]) for x in task.query.x])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert np.abs(together - net.apply(params, task.query.x)).max() > 1e-3
    with pytest.raises(ValueError, match="cannot choose its statistics"):
        pruned.fixed_norm(nets.mlp((6,), inputs=4, outputs=3), task.support.x)


@pytest.mark.usefixtures("quick_compile", "shared_keys")
def test_errors_and_norms_are_those_of_a_loop(key):
    net, _, params, tasks, adapted = adapted_mlp(key)
    keep, draws = 0.5, 2
    judge = jax.jit(partial(pruned.judge, net))
    for name, law in LAWS.items():
        prune = jax.jit(partial(pruned.prune, net, law, draws=draws))
        found = prune(jax.random.key(2), params, adapted, keep)
        errors = judge(jax.random.key(3), adapted.weights, found.masks, tasks, jnp.zeros(draws))
        differ = False
        for t in range(3):
            row = lambda tree, t=t: jax.tree.map(lambda x: x[t], tree)
            weights, masks, task = row(adapted.weights), row(found.masks), row(tasks)
            both = jax.tree.map(lambda *x: jnp.concatenate(x), task.support, task.query)
            for g in range(draws):
                sub = jax.tree.map(lambda m, w, g=g: m[g] * w, masks, weights)
                error = 1 - accuracy(net.apply(sub, both.x), both.y)
                np.testing.assert_allclose(errors[t, g], error, atol=1e-6)
            kernel = masks["dense0"]["kernel"]
            differ |= bool(jnp.any(kernel[0] != kernel[1]))
            if name == "cp":
                moved = jax.tree.map(jnp.subtract, weights, params.net)
                kept = jax.tree.map(lambda m, w: m[0] * w, masks, moved)
                np.testing.assert_allclose(
                    found.moved[t], optax.tree.norm(kept, squared=True), rtol=1e-5
                )
                np.testing.assert_allclose(found.price[t], math.log(math.comb(24, 12)), rtol=1e-5)
            elif name == "bernoulli":
                size = {k: 0.5 if k == "dense0" else 1.0 for k in weights}
                square = sum(
                    (size[k] if leaf == "kernel" else 1.0) * np.sum(np.square(w))
                    for k, layer in weights.items()
                    for leaf, w in layer.items()
                )
                np.testing.assert_allclose(found.norm[t], square, rtol=1e-5)
                assert found.price[t] == 0
        assert differ == (name in ("pp", "bernoulli"))


def test_theorem_is_the_bound_at_the_best_noise():
    rng = np.random.default_rng(0)
    norm, moved, price = (jnp.asarray(rng.uniform(0.1, 2, 5)) for _ in range(3))
    found = pruned.Masked(None, norm, moved, price)
    errors, stds = jnp.asarray(rng.uniform(0, 1, (5, 3))), jnp.array([0.1, 0.5, 1.0])
    best = pruned.theorem(errors, found, "moved", stds, 40, 0.1)
    by_hand = []
    for g, std in enumerate(stds):
        delta = 0.1 / 3
        high = min(1, np.mean(errors[:, g]) + math.sqrt(math.log(2 / (0.2 * delta)) / 10))
        kl = moved / (2 * std**2) + price
        by_hand.append(bounds.meta_bound(high, 0.0, kl, 40, 5, 0.9 * delta).total)
    np.testing.assert_allclose(best.bound.total, min(by_hand), rtol=1e-5)
    assert best.std == stds[int(np.argmin(by_hand))]


@pytest.mark.usefixtures("quick_compile", "shared_keys")
def test_linear_catfish_pays_for_its_choice():
    problem = linear.Problem(dim=5, pruner="cp")
    k_data, k_learn, k_judge = jax.random.split(jax.random.key(0), 3)
    tasks = linear.draw_tasks(problem, k_data, 3, 40)
    method = linear.plain(problem)
    params = method.algorithm(method.net, method.test).init(jax.random.key(1))
    params = params._replace(net={"w": jnp.ones(5)})
    means = linear.learned(problem, k_learn, params, tasks, 0.0, 1)
    point = linear.Point(*(jnp.full(1, value) for value in (0.5, 0.5, 1.0)))
    _, kl = linear.judged(problem, k_judge, means, tasks, jnp.asarray(0.6), point)
    for t in range(3):
        moved = np.asarray(means.adapted["w"][t, 0] - means.prior["w"][t, 0])
        gone = np.argsort(-np.abs(np.asarray(means.grads["w"][t, 0])))[:2]
        kept = np.sum(np.delete(moved, gone) ** 2) / (2 * 0.25)
        np.testing.assert_allclose(kl[0, t, 0], math.log(10) + kept, rtol=1e-4)

"""jax-meta's side of `experiments.benchmark`: its `MAML` on the network of sinusoids.

It has second-order MAML alone, vmapped over tasks. Its loss is cross-entropy, so that of the
regression is put in its place.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.workloads import HIDDEN, LR, OUTER_LR, Problem, tasks, weights
from mgaug_jax import nets


class Batch(NamedTuple):
    """What it calls examples."""

    inputs: Any
    targets: Any


def learner(problem: Problem) -> Any:
    """Its MAML."""
    from jax_meta.metalearners import MAML

    net = nets.mlp(HIDDEN)

    class Regression(MAML):
        def loss(self, params, state, inputs, targets, args):
            outputs, state = self.model.apply(params, state, inputs, *args)
            value = jnp.mean(jnp.square(outputs - targets))
            return value, (state, {"loss": value})

    model = SimpleNamespace(
        init=lambda key: (net.init(key), {}),
        apply=lambda params, state, inputs: (net.apply(params, inputs), state),
    )
    return Regression(model, num_steps=problem.steps, alpha=LR)


def arrays(problem: Problem) -> tuple[Any, Batch, Batch]:
    """Weights, supports and queries, in the widest float there is."""
    put = lambda tree: jax.tree.map(jnp.asarray, tree)
    support, query = (Batch(*part) for part in tasks(problem))
    return put(weights(problem)), put(support), put(query)


def gradient(problem: Problem) -> dict[str, Any]:
    """The meta-gradient in float64, for comparison."""
    with jax.enable_x64(True):
        params, support, query = arrays(problem)
        of = jax.jit(jax.grad(learner(problem).batch_outer_loss, has_aux=True), static_argnums=4)
        return jax.tree.map(np.asarray, of(params, {}, support, query, ())[0])


def step(problem: Problem) -> Callable[[], Any]:
    """A meta-step with Adam, in float32, waited for."""
    params, support, query = arrays(problem)
    made = learner(problem)
    _, state = made.init(jax.random.key(0), optax.adam(OUTER_LR))
    return lambda: jax.block_until_ready(made.step(params, state, support, query))

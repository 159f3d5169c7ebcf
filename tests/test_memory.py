"""What programs take."""

from functools import partial

import jax
import optax
import pytest

import mgaug_jax as mg
from mgaug_jax import meta_gradient, nets
from mgaug_jax.memory import taken, tasks_at_once


def compiled(method, params, tasks):
    f = jax.jit(partial(meta_gradient, method))
    return f.lower(jax.random.key(2), params, tasks).compile()


def test_fewer_tasks_at_once_take_less_memory():
    method = mg.fomaml(nets.mlp((64, 64)), lr=0.01, steps=1, loss=mg.losses.squared_error)
    x = jax.numpy.ones((16, 400, 1))
    tasks = mg.Task(mg.Examples(x, x), mg.Examples(x, x))
    params = mg.MetaParams(method.net.init(jax.random.key(0)), {})
    whole, some = (taken(compiled(m, params, tasks)) for m in (method, tasks_at_once(2)(method)))
    assert some < 0.4 * whole


@pytest.mark.slow
def test_a_resnet_at_224_takes_little_more_than_one_task_at_a_time():
    """Compiled for arrays that are never made."""
    method = mg.fomaml(nets.resnet10(5), lr=0.01, steps=1)
    params = mg.MetaParams(jax.eval_shape(method.net.init, jax.random.key(0)), {})

    def found(tasks: int, at_once: int) -> int:
        shape = lambda *sizes: jax.ShapeDtypeStruct((tasks, *sizes), "float32")
        part = lambda n: mg.Examples(shape(n, 224, 224, 3), shape(n, 5))
        batch = mg.Task(part(5), part(10))
        return taken(compiled(tasks_at_once(at_once)(method), params, batch))

    images = 4 * 2 * 15 * 224 * 224 * 3
    one = found(1, 1)
    assert one < found(2, 1) < 1.3 * one + images
    assert found(2, 2) > 1.6 * one


def test_what_is_taken_is_at_least_what_goes_in_and_out():
    learner = mg.trainer(mg.fomaml(nets.mlp((8,)), lr=0.1), optax.sgd(0.1))
    state = learner.init(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    program = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s)).lower(state).compile()
    assert 2 * size <= taken(program) <= 2 * size + 4096


def test_no_tasks_at_once_are_refused():
    with pytest.raises(ValueError, match="number"):
        tasks_at_once(0)

"""Published protocols, and what tests may do differently from training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import refused, start

from experiments import loading, problem, scoring, spec, train, vocabulary
from experiments.protocols import PROTOCOLS
from mgaug_jax import episodes, losses
from mgaug_jax.data import DATASETS

SINES = ("--data=sinusoid", "--net=mlp((8,))", "--steps=2", "--eval_every=2", "--tasks=2")


@pytest.fixture(autouse=True)
def small_tests(monkeypatch):
    for name, value in (("TEST", 20), ("VALIDATION", 10), ("MEMORY", 10)):
        monkeypatch.setattr(scoring, f"{name}_EPISODES", value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_names_flags_data_networks_and_methods_that_exist(name):
    values = PROTOCOLS[name].flags
    assert values.keys() <= set(flags.FLAGS)
    for flag, value in values.items():
        flags.FLAGS[flag].parser.parse(value if isinstance(value, str) else str(value))
    regression = values["data"] == "sinusoid"
    assert regression or values["data"] in DATASETS
    for flag, known in (
        ("labels", loading.LABELS),
        ("test_labels", loading.TEST_LABELS),
    ):
        assert values.get(flag, "exclusive") in known
    size = values.get("image_size") or (28 if "omniglot" in values["data"] else 84)
    fixed = {"inputs": 21} if regression else {"image": (size, size, 3)}
    net = spec.net(values["net"], **fixed)
    pixels = None if regression else (jnp.zeros(3), jnp.ones(3))
    way, loss = (None, losses.squared_error) if regression else (5, losses.cross_entropy)
    made = vocabulary.Problem(net, way, loss, values["steps"], pixels)
    for steps in {None, values.get("test_steps")}:
        assert spec.method(values["method"], made, steps)(jnp.zeros((), jnp.int32)).net
    assert values["steps"] % values["eval_every"] == 0


def test_published_counts_of_updates():
    """MGAug: 4800 epochs of 16 updates and 1600 of 101, half for 5-shot (methods as released)."""
    steps = {name: protocol.flags["steps"] for name, protocol in PROTOCOLS.items()}
    assert steps["mgaug-cub-1shot-conv4-fomaml"] == 76_800
    assert steps["mgaug-mini-5shot-resnet10-fomaml"] == 38_400
    assert steps["mgaug-cub-1shot-conv4-protonet"] == 161_600


def test_a_protocol_sets_defaults_and_the_command_line_comes_first():
    name = "meta-augmentation-dclaw2"
    with flagsaver.flagsaver():
        flags.FLAGS(["train", f"--protocol={name}", "--shot=3", "--tasks=4"])
        problem.adopt_protocol()
        config = problem.config(flags.FLAGS.method, 0, flags.FLAGS.eval_every)
    assert (config.data, config.way, config.queries) == ("dclaw2", 2, 15)
    assert (config.shot, config.tasks) == (3, 4)
    assert (config.test_queries, config.test_labels) == (1, "shuffled_groups")
    assert config.method == "maml(lr=0.01,steps=5)"


def test_an_unknown_protocol_is_refused(monkeypatch, capsys):
    text = refused(capsys, monkeypatch, train, "--protocol=mgaug")
    assert "'mgaug' is no protocol; known: mgaug-cub-1shot" in text


def test_tests_may_have_their_own_shots_queries_and_steps(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(train, "train", lambda *arguments: made.setdefault("setup", arguments[0]))
    monkeypatch.setattr(train, "report", lambda *arguments: None)
    monkeypatch.setattr(scoring, "print_results", lambda results: None)
    more = ("--shot=4", "--queries=3", "--test_shot=7", "--test_queries=9", "--test_steps=6")
    method = "--method=maml(0.01,2)"
    assert start(monkeypatch, train, *SINES, *more, method, f"--out={tmp_path / 'run'}") == 0
    setup = made["setup"]
    task = setup.episode(jax.random.key(0), None)
    assert (task.support.x.shape, task.query.x.shape) == ((1, 7, 1), (1, 9, 1))
    tasks = setup.sample(jax.random.key(0), None)
    assert (tasks.support.x.shape, tasks.query.x.shape) == ((2, 4, 1), (2, 3, 1))
    one = jax.tree.map(lambda leaf: leaf[0], task)
    for method, steps in ((setup.tested, 6), (setup.method(0), 2)):
        learner = method.algorithm(method.net, method.inner)
        params = learner.init(jax.random.key(1))
        path = jax.eval_shape(learner.path, jax.random.key(2), params, one.support)
        assert jax.tree.leaves(path.params)[0].shape[0] == steps


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method=lslr(steps=2)", "--test_steps=3"), "learned rate for each"),
        (("--test_steps=0",), "--test_steps=0 must be 1 or more"),
        (("--test_labels=own",), "--test_labels=own is none of exclusive, shuffled_groups"),
        (("--test_labels=shuffled_groups",), "is for classes; leave it out"),
    ],
)
def test_tests_that_make_no_sense_are_refused(arguments, says, tmp_path, monkeypatch, capsys):
    given = (*SINES, *arguments, f"--out={tmp_path / 'run'}")
    assert says in refused(capsys, monkeypatch, train, *given)
    assert not (tmp_path / "run").exists()


def test_shuffled_groups_are_neighbours_in_any_order():
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.vmap(lambda key: episodes.shuffled_groups(key, 7, 3))(keys))
    assert set(map(tuple, np.sort(drawn, axis=1))) == {(0, 1, 2), (3, 4, 5)}
    for group in (0, 3):
        orders = [tuple(row) for row in drawn if min(row) == group]
        counts = np.unique(orders, axis=0, return_counts=True)[1]
        assert len(counts) == 6
        assert (abs(counts - len(orders) / 6) < 4.5 * (len(orders) / 6) ** 0.5).all()

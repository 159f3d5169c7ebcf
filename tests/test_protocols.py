"""Published protocols, and what tests may do differently from training."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import refused, start

from experiments import loading, problem, scoring, train, training
from experiments.protocols import PROTOCOLS
from mgaug_jax import episodes
from mgaug_jax.data import DATASETS

ROOT = Path(__file__).parents[1]
SINES = ("--data=sinusoid", "--net=mlp((8,))", "--steps=2", "--eval_every=2", "--tasks=2")


@pytest.fixture(autouse=True)
def small_tests(monkeypatch):
    for name, value in (("TEST", 20), ("VALIDATION", 10), ("MEMORY", 10)):
        monkeypatch.setattr(scoring, f"{name}_EPISODES", value)


def config_of(*arguments: str):
    """The configuration that a command line of `train` asks for."""
    with flagsaver.flagsaver():
        flags.FLAGS(["train", *arguments])
        problem.adopt_protocol()
        return problem.config(flags.FLAGS.method, 0, flags.FLAGS.eval_every)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_builds(name):
    values = PROTOCOLS[name].flags
    assert values.keys() <= {"eval_every", "method", "data", *problem.NAMES}
    config = config_of(f"--protocol={name}")
    assert {flag: getattr(config, flag) for flag in values} == values
    assert config.steps % config.eval_every == 0
    if config.data == "sinusoid":
        loading.setup(config)
        return
    own = DATASETS[config.data]
    size, channels = config.image_size or own.parameters["size"], len(own.mean)
    loading.for_images(config, (size, size, channels), jnp.array(own.mean), jnp.array(own.std))
    assert config.labels in loading.LABELS
    assert config.test_labels in loading.TEST_LABELS
    for split in ("train", "val", "test"):
        enough = len(own.parameters["splits"][split]) >= config.way
        assert enough or "needs --splits" in PROTOCOLS[name].source


def test_every_published_table_has_its_protocols():
    """Rows and columns of tables that need data, ways or episodes of their own."""
    names = {
        *(f"{paper}-{data}-{shot}shot" for paper in ("mr-maml", "metamix")
          for data in ("omniglot", "mini") for shot in (1, 5)),
        *(f"taskaug-{data}-{shot}shot" for data in ("mini", "cifar-fs", "fc100")
          for shot in (1, 5)),
        *(f"{paper}-{data}-{way}way-{shot}shot" for paper in ("maml", "meta-sgd")
          for data in ("omniglot", "mini") for way in (5, 20) for shot in (1, 5)),
        *(f"taml-{data}-5way-{shot}shot" for data in ("omniglot", "mini") for shot in (1, 5)),
        *(f"meta-augmentation-{data}{column}" for column in ("", "-intrashuffle", "-intershuffle")
          for data in ("omniglot", "mini", "mini-protonet", "dclaw1", "dclaw2", "dclaw3")),
    }  # fmt: skip
    assert names <= set(PROTOCOLS)


def test_finn_s_values():
    """Rates times the ways, since the loss here is the mean; ten steps in mini-ImageNet's tests."""
    flags = {name: protocol.flags for name, protocol in PROTOCOLS.items()}
    assert flags["mr-maml-omniglot-1shot"]["method"] == "maml(lr=2,steps=5)"
    assert flags["metamix-omniglot-1shot"]["method"] == "maml(lr=0.1,steps=5)"
    assert flags["meta-augmentation-mini-intrashuffle"]["method"] == (
        "maml(lr=0.05,steps=5)|shuffle_labels()"
    )
    assert flags["meta-augmentation-mini-intershuffle"]["labels"] == "exclusive"
    for name, values in flags.items():
        if values["data"] == "mini_imagenet" and values["method"].startswith("maml"):
            assert values["test_steps"] == 10, name


def test_list_prints_every_protocol():
    command = [sys.executable, "-m", "experiments.protocols", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line[0] != " "] == list(PROTOCOLS)


def test_published_counts_of_updates():
    """MGAug: 4800 epochs of 16 updates and 1600 of 101, half for 5-shot (methods as released)."""
    steps = {name: protocol.flags["steps"] for name, protocol in PROTOCOLS.items()}
    assert steps["mgaug-cub-1shot-conv4-fomaml"] == 76_800
    assert steps["mgaug-mini-5shot-resnet10-fomaml"] == 38_400
    assert steps["mgaug-cub-1shot-conv4-protonet"] == 161_600


def test_a_protocol_sets_defaults_and_the_command_line_comes_first():
    config = config_of("--protocol=meta-augmentation-dclaw2", "--shot=3", "--tasks=4")
    assert (config.data, config.way, config.queries) == ("dclaw2", 2, 15)
    assert (config.shot, config.tasks) == (3, 4)
    assert (config.test_queries, config.test_labels) == (1, "shuffled_groups")
    assert config.method == "maml(lr=0.02,steps=5)"


def test_an_unknown_protocol_is_refused(monkeypatch, capsys):
    text = refused(capsys, monkeypatch, train, "--protocol=mgaug")
    assert "'mgaug' is no protocol; known: mgaug-cub-1shot" in text


def test_tests_may_have_their_own_shots_queries_and_steps(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(
        training, "train", lambda *arguments: made.setdefault("setup", arguments[0])
    )
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

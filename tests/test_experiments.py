"""The entry points, as a user meets them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from conftest import few_episodes, make_tasks, refused, start

from experiments import cli, compare, evaluate, loading, metrics, spec, store, train, vocabulary
from mgaug_jax import losses, meta, nets
from mgaug_jax.data import pixels

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]
TINY = [
    "--net=conv4(width=4)",
    "--way=3",
    "--queries=2",
    "--tasks=2",
    "--steps=4",
    "--eval_every=2",
    "--method=fomaml(lr=0.1,steps=2)|cp(keep=0.9,subnets=2)",
]


@pytest.fixture(autouse=True)
def small_tests(monkeypatch, glyph_cache):
    """Few episodes, and the glyphs that the session has rendered."""
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    few_episodes(monkeypatch, test=60)


# --- a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, glyph_cache):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "four steps ü"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
        few_episodes(patch, test=60)
        assert start(patch, train, *TINY, f"--out={folder}") == 0
    return folder


def final_state(folder: Path):
    return store.restore(loading.setup(store.read_config(folder)), folder)


def test_run_leaves_everything_behind(finished):
    results = json.loads((finished / "results.json").read_text())
    names = ("adapted", "step0", "untrained", "pixels", "train", "train_step0", "label_memory")
    for name in names:
        assert set(results[name]) == {"mean", "half_width", "std", "episodes"}
    assert results["adapted"]["episodes"] == 60
    assert results["chance"] == 1 / 3
    with np.load(finished / "episodes.npz") as stored:
        assert stored["adapted"].shape == (60,)
        np.testing.assert_allclose(stored["adapted"].mean(), results["adapted"]["mean"], rtol=1e-6)
    assert (finished / "curves.png").stat().st_size > 10_000
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    validations = [record for record in records if "val_accuracy" in record]
    assert [record["step"] for record in validations] == [2, 4]
    names = "step val_accuracy val_half_width val_step0 train_accuracy train_step0 label_memory"
    assert all(set(record) == set(names.split()) for record in validations)


def test_resumed_run_equals_uninterrupted_one(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shorter = [*TINY, "--steps=3", f"--out={folder}"]  # between two evaluations
    assert start(monkeypatch, train, *shorter) == 0
    said = capsys.readouterr().out
    digests = json.loads((folder / "config.json").read_text())["digests"]
    assert all(f"{split:<6} hash {digest}" in said for split, digest in digests.items())
    assert start(monkeypatch, train, *TINY, f"--out={folder}", "--resume") == 0
    resumed, whole = final_state(folder), final_state(finished)
    assert resumed.state.step == whole.state.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    records = lambda folder: [r for r in metrics.read(folder) if "val_accuracy" in r]
    assert [record["step"] for record in records(folder)] == [2, 3, 4]
    assert records(folder)[-1] == records(finished)[-1]


def test_evaluate_repeats_the_test(finished, tmp_path, monkeypatch):
    arguments = (f"--run={finished}", f"--output={tmp_path}", "--episodes=60")
    assert start(monkeypatch, evaluate, *arguments, "--ci_group=5", "--ci_z=1") == 0
    with np.load(finished / "episodes.npz") as first, np.load(tmp_path / "episodes.npz") as again:
        for name in ("adapted", "step0", "untrained", "pixels"):
            np.testing.assert_array_equal(first[name], again[name])
        groups = first["adapted"].reshape(-1, 5).mean(1)
    found = json.loads((tmp_path / "evaluation.json").read_text())["adapted"]
    results = json.loads((finished / "results.json").read_text())["adapted"]
    assert found["std"] == results["std"]
    got = [found[name] for name in ("mean", "group_std", "half_width")]
    want = (results["mean"], groups.std(), groups.std() / 12**0.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ci_z=nan",), "--ci_z=nan must be a number from 0 up"),
        (("--ci_group=0",), "--ci_group=0 must divide --episodes=600 and the 10 training tasks"),
        (("--ci_group=4",), "--ci_group=4 must divide"),  # the 10
        (("--ci_group=7", "--data=cub"), "--ci_group=7 must divide --episodes=600."),
        (("--ci_group=4", "--data=cub"), "is not a run folder"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(arguments, says, monkeypatch, capsys):
    assert says in refused(capsys, monkeypatch, evaluate, "--run=nowhere", *arguments)


def test_compare_gives_the_paired_difference(finished, tmp_path, monkeypatch, capsys):
    arguments = (f"--run={finished}", f"--output={tmp_path}", "--episodes=60")
    assert start(monkeypatch, evaluate, *arguments) == 0
    capsys.readouterr()
    assert start(monkeypatch, compare, f"--run_a={finished}", f"--run_b={tmp_path}") == 0
    assert "a - b  +0.0000 +- 0.0000" in capsys.readouterr().out


def test_compare_refuses_other_episodes(finished, tmp_path, monkeypatch, capsys):
    arguments = (f"--run={finished}", f"--output={tmp_path}", "--episodes=50")
    assert start(monkeypatch, evaluate, *arguments) == 0
    text = refused(capsys, monkeypatch, compare, f"--run_a={finished}", f"--run_b={tmp_path}")
    assert "different episodes" in text
    assert "episodes 60 and 50" in text


def test_existing_run_is_not_overwritten(finished, monkeypatch, capsys):
    text = refused(capsys, monkeypatch, train, *TINY, f"--out={finished}")
    assert "--resume" in text


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--outer_lr=0.5", "--outer_lr is 0.5 but was 0.001"),
        ("--way=2", "--way is 2 but was 3"),
        ("--net=conv4(width=5)", "--net is 'conv4(width=5)' but was 'conv4(width=4)'"),
    ],
)
def test_resume_with_other_settings_is_refused(flag, says, finished, monkeypatch, capsys):
    arguments = (*TINY, f"--out={finished}", "--resume", flag)
    assert says in refused(capsys, monkeypatch, train, *arguments)


def test_fewer_steps_than_done_are_refused(finished, monkeypatch, capsys):
    arguments = (*TINY, f"--out={finished}", "--resume", "--steps=2")
    assert "is at step 4 already" in refused(capsys, monkeypatch, train, *arguments)
    assert store.read_config(finished).steps == 4  # what was refused leaves no trace
    assert start(monkeypatch, train, *TINY, f"--out={finished}", "--resume") == 0


def test_loss_that_is_not_finite_exits_3(tmp_path, monkeypatch, capsys):
    arguments = ("--data=sinusoid", "--shot=5", "--steps=2", "--method=maml(lr=1e30,steps=3)")
    assert start(monkeypatch, train, *arguments, f"--out={tmp_path / 'run'}") == 3
    assert "of step 1 is not finite; the state of step 0 is saved" in capsys.readouterr().err


def test_regression_run(tmp_path, monkeypatch, capsys):
    arguments = ("--data=sinusoid", "--shot=5", "--queries=10", "--steps=4", "--eval_every=2")
    method = "--method=maml(lr=0.01,steps=1)|cp(keep=0.9)"
    assert start(monkeypatch, train, *arguments, method, f"--out={tmp_path / 'run'}") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"] == "mse"
    assert results["adapted"]["mean"] > 0
    assert results["train"]["mean"] > 0
    assert "label_memory" not in results  # an amplitude and a phase name no task
    records = metrics.read(tmp_path / "run")
    assert {"val_mse", "train_mse", "train_step0"} <= set(records[-1])


# --- bad input ------------------------------------------------------------------------------

BAD = {
    "--method=fomal(lr=0.1)": "'fomal' is no algorithm; known: anil, fomaml, lslr, maml",
    "--method=fomaml(rate=0.1)": "fomaml takes no argument 'rate'; its arguments: lr, steps",
    "--method=fomaml|dropout(0.1)": "no modifier; known: aug, cp, drop_grad, dsd, first_order",
    "--method=fomaml(lr=": "is not a spec",
    "--method=fomaml(lr=__import__('os'))": "is not a literal",
    "--method=fomaml|cp(keep=0)": "keep=0 was asked for",
    "--method=fomaml|cp(keep=1.5)": "keep=1.5 was asked for",
    "--method=fomaml|cp(keep='nan')": "keep='nan' was asked for",
    "--method=fomaml|cp": "cp needs keep",
    "--method=fomaml|cp(keep=0.9)|wp(keep=0.9)": "Sub-networks were asked for twice",
    "--method=fomaml|cp(keep=0.9,scores='best')": "scores is one of adapted, initial",
    "--method=fomaml(lr=-1)": "lr=-1 was asked for",
    "--method=fomaml(lr=1e999)": "lr=inf was asked for",
    "--method=fomaml(steps=0)": "steps=0 was asked for",
    "--method=fomaml|cp(keep=0.9,sizes=(4,))": "too small",
    "--method=fomaml|cp(keep=0.9,sizes=16)": "sizes=16 must be a tuple",
    "--method=fomaml|cp(keep=True)": "keep=True was asked for",
    "--method=fomaml|cp(keep=0.9,start=5,stop=2)": "stop=2 was asked for",
    "--method=fomaml(lr=0.1,lr=5)": "fomaml was given lr twice",
    "--method=fomaml(0.1,5,'inductive',7)": "fomaml takes at most 3 arguments",
    "--method=fomaml(steps=True)": "steps=True was asked for",
    f"--method=fomaml(lr={10**400})": "was asked for",
    "--net=conv4(width=0)": "width=0 was asked for",
    "--net=conv4(width='a')": "width='a' was asked for",
    "--net=mlp": "the data are images",
    "--seed=-1": "--seed=-1 must be from 0",
    f"--seed={10**30}": "must be from 0",
    "--net=conv5": "'conv5' is no network",
    "--way=1": "way=1 was asked for",
    "--way=5000": "way=5000 was asked for, but the train split has",
    "--queries=20": "shot + queries = 1 + 20 images",
    "--steps=0": "--steps=0 must be 1 or more",
    "--outer_lr=nan": "--outer_lr=nan must be a positive number",
    "--data=imagenet": "imagenet",
    "--labels=none": "--labels=none is none of exclusive",
    "--shot=one": "--shot=one",
    "--no_such_flag=1": "no_such_flag",
    "--splits=none.json": "splits=none.json was asked for, but",
    "--image_size=0": "size=0 was asked for",
    "--image_size=32": "glyphs was asked for with other splits, another size",
    "--skip_bad_images=-1": "skip_bad_images=-1 was asked for",
    "stray": "'stray' is not a flag",
    "--resume": "--resume needs --out",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_is_one_sentence_and_exit_2(argument, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert BAD[argument] in refused(capsys, monkeypatch, train, argument)
    assert not list(tmp_path.iterdir())


def test_wrong_data_folder_shows_the_expected_tree(monkeypatch, capsys, tmp_path):
    arguments = ("--data=omniglot", f"--data_dir={tmp_path}")
    assert start(monkeypatch, train, *arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: omniglot was asked for from")
    assert "\n  images_background/ " in text
    assert "\n      character01/" in text


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "parity", "lowering"])
def test_help_exits_0_and_teaches(name):
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"python -m experiments.{name}" in done.stdout
    assert ("--steps (default 400)" in done.stdout) == (name == "train")


def test_every_flag_says_what_it_is():
    own = flags.FLAGS.get_key_flags_for_module(train)
    assert all(len(flag.help) > 10 for flag in own)


# --- specs ----------------------------------------------------------------------------------


def problem(way=3):
    return vocabulary.Problem(
        lambda outputs: nets.conv4(outputs, width=4, image=(16, 16, 1)),
        way,
        losses.cross_entropy,
        100,
        (jnp.full(1, 0.5), jnp.full(1, 0.25)),
    )


@pytest.mark.parametrize("algorithm", vocabulary.ALGORITHMS)
@pytest.mark.parametrize("modifier", ["", *vocabulary.MODIFIERS])
def test_every_algorithm_takes_every_modifier(algorithm, modifier):
    bare = modifier in {"first_order", "fresh_optimizer", "shuffle_labels", "aug"}
    bare |= modifier in {"maxup", "reptile"}
    text = f"{algorithm}|{modifier}({'' if bare else 0.9})" if modifier else algorithm
    inner = {"noise", "drop_grad", "first_order", "metamix", "multi_step_loss", "mr_weights"}
    inner |= {"reptile", "taml_entropy", "mr_activations"}
    whole = {"reptile", "mr_weights", "mr_activations"}
    partial = {"anil": whole, "meta_sgd": {"reptile"}, "lslr": {"reptile"}}
    if modifier == "shift_targets" or modifier in partial.get(algorithm, ()):
        with pytest.raises(cli.BadInput, match=r"use maml|use shuffle_labels"):
            spec.method(text, problem())
        return
    if algorithm == "protonet" and modifier in inner:
        with pytest.raises(cli.BadInput, match="protonet"):
            spec.method(text, problem())
        return
    method = spec.method(text, problem())(0)
    assert (method.views is not None) == (modifier in {"wp", "pp", "cp"})


def test_a_constant_ramp_is_none():
    tasks = make_tasks(jax.random.key(1), shape=(16, 16, 1))

    def loss(modifier: str, step=0):
        method = spec.method(f"fomaml(lr=0.5,steps=2)|{modifier}", problem())(step)
        params = method.algorithm(method.net, method.inner).init(jax.random.key(0))
        step = jax.jit(lambda key: meta.meta_gradient(method, key, params, tasks)[1]["loss"])
        return float(step(jax.random.key(2)))

    plain = loss("multi_step_loss(0.25)")
    assert loss("multi_step_loss(0.25,ramp='constant')") == plain
    assert loss("multi_step_loss(0.25,ramp='linear')") == plain  # at its beginning
    last = loss("multi_step_loss(0.25,ramp='linear')", 100)
    assert last == loss("multi_step_loss(1)") != plain


def test_channel_shuffle_starts_where_it_is_told_even_in_a_sweep():
    def rate(s):
        text = "fomaml(lr=0.1)|metamix(shuffle=s,start=10)"
        assert spec.method(text, problem(), numbers={"s": s})(jnp.asarray(3)).judge is not None
        return s

    jax.eval_shape(rate, 0.5)
    with pytest.raises(cli.BadInput, match="give shuffle, or leave it out"):
        spec.method("fomaml(lr=0.1)|metamix(start=10)", problem())


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("maml(lr=0.1)|dsd(0.5)", True),
        ("maml(lr=0.1)|dsd(0.5,start=10)", True),
        ("maml(lr=0.1)|dsd(0.5,10,20)", False),
        ("maml(lr=0.1)|dsd(keep=0.5,start=10,stop=20)", False),
        ("maml(lr=0.1)|drop_grad(0.1,ramp='linear')", True),
        ("maml(lr=0.1)|drop_grad(0.1,ramp='constant')", False),
    ],
)
def test_what_depends_on_the_number_of_steps(text, spans):
    assert spec.spans_run(text) == spans


def change_of(text, step, site="inner"):
    """What a modifier's perturbation makes of a gradient of ones at a step of a run of 100."""
    captured = {}

    def capture(method, change):
        captured["change"] = change
        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocabulary.WORDS["site"], site, capture)
        spec.method(f"fomaml|{text}", problem())(jnp.asarray(step))
    ones = {"w": jnp.ones(1000)}
    return np.asarray(captured["change"](jax.random.key(0), ones, ones)["w"])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", (1, 1, 1)), ("linear", (1, 0.5, 0)), ("cosine", (1, 0.5, 0))],
)
def test_sigma_follows_the_schedule_of_its_spec(schedule, factors):
    text = f"noise(0.4,site='inner',schedule='{schedule}')"
    base = change_of("noise(0.4,site='inner')", 0) - 1
    assert abs(base.std() - 0.4) < 0.05
    for step, factor in zip((0, 50, 100), factors, strict=True):
        got = change_of(text, step) - 1
        np.testing.assert_allclose(got, factor * base, atol=1e-6)


def test_drop_grad_is_ramped_by_its_spec():
    text = "drop_grad(0.2,site='inner',ramp='linear')"
    spreads = [change_of(text, step).std() for step in (0, 50, 100)]
    np.testing.assert_allclose(spreads, np.array([0, 0.25, 0.5]), rtol=0.08, atol=1e-7)


def test_a_schedule_makes_the_number_of_steps_part_of_the_run(tmp_path, monkeypatch, capsys):
    assert spec.spans_run("fomaml|noise(0.1,'inner','gaussian','unit','linear')")
    assert not spec.spans_run("fomaml(0.1)|noise(0.1,'inner')|cp(0.9,start=3)")
    run = ["--data=sinusoid", "--net=mlp((4,))", "--shot=2", "--queries=2", "--tasks=2"]
    run += ["--method=maml(lr=0.1,steps=1)|noise(0.1,schedule='linear')", f"--out={tmp_path / 'x'}"]
    assert start(monkeypatch, train, *run, "--steps=2") == 0
    text = refused(capsys, monkeypatch, train, *run, "--steps=4", "--resume")
    assert "--steps is 4 but was 2" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fomaml|noise", "noise needs std"),
        ("fomaml|drop_grad", "drop_grad needs rate"),
        ("fomaml|l2", "l2 needs weight"),
        ("fomaml|noise(-1)", "std=-1 was asked for"),
        ("fomaml|noise('loud')", "std='loud' was asked for"),
        ("fomaml|noise(0.1,schedule='odd')", "schedule is one of constant, linear, cosine"),
        ("fomaml|drop_grad(1.0)", "rate=1.0 was asked for"),
        ("protonet|noise(0.1)", "site='outer'"),
    ],
)
def test_specs_of_perturbations_are_refused_with_a_sentence(text, says):
    with pytest.raises(cli.BadInput, match=re.escape(says)):
        spec.method(text, problem())


def test_spec_values_arrive():
    text = "fomaml(lr=0.5,steps=2) | cp(0.9, subnets=2, sizes=(16,), start=10, stop=20)"
    at = spec.method(text, problem())
    active = [bool(at(np.int32(step)).views.active) for step in (9, 10, 19, 20)]
    assert active == [False, True, True, False]
    assert at(np.int32(0)).views.count == 2
    assert at(np.int32(0)).views.sizes == (16,)


# --- the package ----------------------------------------------------------------------------


def test_import_is_light():
    code = "import sys, mgaug_jax; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "PIL", "orbax", "tensorstore"}
    assert not loaded & heavy


def test_readme_code_runs(finished, tmp_path, monkeypatch, glyph_cache):
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(finished)
    for place in ("support/a", "support/b", "support/c", "query"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(pixels.encode(np.eye(9, dtype=np.uint8) * 255))
    text = (ROOT / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(block.replace("steps=200", "steps=2").replace("600", "10"), namespace)
        if "predict.restored" in block:
            assert namespace["classes"] == ["a", "b", "c"]
            np.testing.assert_allclose(namespace["probabilities"].sum(1), [1], rtol=1e-5)

"""The entry points that train several seeds, as a user meets them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from entry import Entries

from experiments import cli, loading, scoring, spec, store, vocabulary
from experiments.seeds import expand, over_seeds
from mgaug_jax import losses, nets

ENTRIES = Entries()
COLUMNS = ("adapted", "step0", "label_memory", "train_loss")
NUMBERS = ("barrier", "rise", "spread", "cosine", "entropy", "settled", "instability")
SINES = (
    "--data=sinusoid",
    "--labels=fixed_labels",
    "--net=mlp((8,))",
    "--shot=4",
    "--queries=4",
    "--tasks=3",
    "--steps=4",
    "--seeds=2",
)


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    ENTRIES.close()


def done(module, *arguments) -> str:
    """What it printed, having exited 0."""
    finished = ENTRIES.run(module, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def refused(module, *arguments) -> str:
    """The one sentence it exits 2 with."""
    finished = ENTRIES.run(module, *arguments)
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_over_seeds_is_students_t():
    mean, half = over_seeds([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5, rel=1e-6)
    assert np.isnan(over_seeds([1.0])[1])


def test_braces_make_a_row_each():
    got = expand(" a; b|noise({1,2},site='{x}') ; a")
    assert got == ["a", "b|noise(1,site='x')", "b|noise(2,site='x')"]
    with pytest.raises(cli.BadInput, match="names no method"):
        expand(" ; ")


def test_grid_equals_single_runs_and_adds_rows(tmp_path):
    out = f"--out={tmp_path}"
    one, two = "maml(lr=0.01,steps=1)", "maml(lr=0.01,steps=1)|noise(0.5)"
    base = (*SINES, "--episodes=6", out)
    done("grid", *base, f"--methods={one}")
    first = json.loads((tmp_path / "grid.json").read_text())
    shown = done("grid", *base, f"--methods={one};{two}")
    table = json.loads((tmp_path / "grid.json").read_text())
    assert table["rows"][one] == first["rows"][one]
    assert list(table["rows"]) == [one, two]
    assert (tmp_path / "grid.png").stat().st_size > 5_000
    assert "| `maml(lr=0.01,steps=1)\\|noise(0.5)` |" in shown
    for name in COLUMNS:
        assert len(table["rows"][two][name]) == 2

    run = tmp_path / "single"
    single = [a for a in SINES if "seeds" not in a]
    arguments = (*single, f"--method={one}", "--seed=1", "--eval_every=4", f"--out={run}")
    done("train", *arguments)
    made = loading.setup(store.read_config(run))
    params = store.restore(made, run).state.params
    alone = scoring.evaluator(made)(params, None, scoring.TEST_SEED, 6).adapted.mean()
    assert table["rows"][one]["adapted"][1] == pytest.approx(float(alone), rel=1e-4)


def test_grid_refuses_the_table_of_another_problem(tmp_path):
    base = (*SINES, "--episodes=6", f"--out={tmp_path}", "--methods=maml")
    done("grid", *base)
    text = refused("grid", *base, "--shot=5")
    assert "another problem (shot differ)" in text


def test_a_fresh_optimizer_refuses_a_schedule_of_its_rate(tmp_path):
    methods = "--methods=maml|fresh_optimizer()"
    text = refused("grid", *SINES, methods, "--schedule=cosine", f"--out={tmp_path}")
    assert "--schedule=cosine was asked for, but fresh_optimizer begins it anew" in text


def test_feedback_runs_its_phases(tmp_path):
    arguments = (*SINES, "--method=maml(lr=0.01,steps=1)", "--retrain_steps=4", "--episodes=6")
    rest = ("--refresh=2", "--stream", "--probes=2", "--begin=scratch", "--outlier")
    for i, extra in enumerate(((), rest, ("--temperature=1e9",))):
        folder = tmp_path / str(i)
        done("feedback", *arguments, *extra, f"--out={folder}")
        found = json.loads((folder / "feedback.json").read_text())
        per_seed = found["per_seed"]
        assert set(per_seed) == {"before", "feedback", "control"}
        assert ("arrival" in per_seed["feedback"]) == (i == 1)
        assert all(len(v) == 2 for by_kind in per_seed.values() for v in by_kind.values())
        changed = per_seed["feedback"]["probed"] != per_seed["control"]["probed"]
        again = per_seed["before"]["unrelated"] == per_seed["control"]["unrelated"]
        assert again == (i == 1)  # from scratch, as long as the first time: the same training
        if i < 2:
            assert changed
        else:  # equal weights are no feedback
            got, want = (per_seed[name]["unrelated"] for name in ("feedback", "control"))
            assert got == pytest.approx(want, rel=1e-5)


def test_feedback_from_scratch_stores_the_gradients_of_the_trained_network(tmp_path):
    """Phase 1 reaches re-training from scratch by the stored gradients alone."""
    arguments = (*SINES, "--method=maml(lr=0.01,steps=1)", "--retrain_steps=4", "--episodes=6")
    found = []
    for steps in ("4", "60"):
        base = (*arguments, "--begin=scratch", f"--steps={steps}", f"--out={tmp_path / steps}")
        done("feedback", *base)
        found.append(json.loads((tmp_path / steps / "feedback.json").read_text())["per_seed"])
    short, long = found
    assert short["control"] == long["control"]
    assert short["feedback"] != long["feedback"]


@pytest.mark.parametrize("module", ["feedback", "grid", "mechanism", "adapt_noise"])
def test_a_loss_that_is_not_finite_ends_with_3(tmp_path, module):
    wild = "maml(lr=1e30,steps=2)"
    method = {"grid": f"--methods=maml;{wild}"}.get(module, f"--method={wild}")
    turns = ("--every=2",) if module == "adapt_noise" else ()
    finished = ENTRIES.run(module, *SINES, method, *turns, f"--out={tmp_path}")
    assert finished.returncode == 3, finished.stderr
    assert "is not finite. Lower a learning rate" in finished.stderr
    if module == "grid":  # the other row is kept
        assert list(json.loads((tmp_path / "grid.json").read_text())["rows"]) == ["maml"]


@pytest.mark.parametrize("module", ["feedback", "grid"])
def test_a_step_too_far_in_the_outer_loop_ends_with_3(tmp_path, module):
    """The losses are finite up to the last step, which leaves parameters that are not."""
    method = "--methods=maml" if module == "grid" else "--method=maml"
    arguments = (*SINES, "--steps=1", "--outer_lr=1e30", method, f"--out={tmp_path}")
    finished = ENTRIES.run(module, *arguments)
    assert finished.returncode == 3, finished.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("module", ["feedback", "grid", "mechanism", "adapt_noise"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, module):
    (tmp_path / "file").write_text("")
    extra = {"grid": ("--methods=maml",), "adapt_noise": ("--every=2",)}.get(module, ())
    assert "cannot write to" in refused(module, *SINES, *extra, f"--out={tmp_path / 'file'}")
    assert "--out is missing" in refused(module, *SINES, *extra)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--weights=odd",), "--weights=odd is none of softmax, rectified"),
        (("--stream",), "--stream needs --refresh"),
        (("--temperature=0",), "temperature=0.0 was asked for"),
        (("--probes=0",), "--probes=0 must be 1 or more"),
        (("--refresh=300",), "--refresh=300 must be from 0 to --retrain_steps"),
        (("--judge=both",), "--judge=both is none of support, query"),
        (("--begin=anew",), "--begin=anew is none of trained, scratch"),
        (("--tasks=1",), "--tasks=1 leaves nothing to weigh"),
        (("--outlier", "--shot=1"), "--outlier with --shot=1 only renames the classes"),
    ],
)
def test_feedback_refuses_with_a_sentence(tmp_path, arguments, says):
    assert says in refused("feedback", *SINES, f"--out={tmp_path}", *arguments)


def test_adapted_noise_grows_with_memory_and_starts_from_the_plain_method(tmp_path):
    arguments = (*SINES, "--steps=120", "--every=20", "--method=maml(lr=0.01,steps=1)")
    shown = done("adapt_noise", *arguments, "--episodes=6", f"--out={tmp_path}")
    found = json.loads((tmp_path / "adapt_noise.json").read_text())
    assert "adapted - plain" in shown
    stds = np.array(found["stds"])
    assert stds.shape == (6, 2)
    largest = 50 ** (20 / 120)
    ratios = stds[1:] / stds[:-1]
    assert (ratios < largest * 1.001).all()
    assert (ratios > 0.999 / largest).all()
    # a network that memorises gets more noise, one that noise keeps from learning gets less
    learns = ("--net=mlp", "--outer_lr=0.01", "--steps=900", "--every=300", "--begin=0.001")
    for more, grows in ((learns, True), (("--steps=120", "--every=60", "--begin=1e6"), False)):
        done("adapt_noise", *arguments, *more, "--episodes=6", f"--out={tmp_path}")
        stds = np.array(json.loads((tmp_path / "adapt_noise.json").read_text())["stds"])
        assert ((stds[-1] > stds[-2]) == grows).all()
    rows = found["rows"]
    assert rows["adapted"]["adapted"] != rows["plain"]["adapted"]
    # a std of next to nothing for one turn: the plain method's seeds, tasks and test
    tiny = ("--begin=1e-30", "--every=119", "--reach=1.1")
    done("adapt_noise", *arguments, *tiny, "--episodes=6", f"--out={tmp_path}")
    rows = json.loads((tmp_path / "adapt_noise.json").read_text())["rows"]
    assert rows["adapted"]["adapted"] == pytest.approx(rows["plain"]["adapted"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--labels=exclusive",), "nothing that could be memorised by name"),
        (("--noise=l2()|l2()",), "names more than one modifier"),
        (("--noise=noise(std=7)",), "leave std out, which is set elsewhere"),
        (("--noise=noise(7)",), "leave std out, which is set elsewhere"),
        (("--noise=noise(schedule='linear')",), "has two masters"),
        (("--method=protonet()",), "protonet needs classes"),
        (("--noise=noise(site='test',schedule='linear')",), "has two masters"),
        (("--every=4",), "--every=4 leaves no turn in --steps=4"),
        (("--begin=1e300",), "--begin=1e+300 must be a positive number below 1e30"),
        (("--noise=cp(keep=0.5)",), "cp takes no argument 'std'"),
        (("--begin=0",), "--begin=0.0 must be a positive number"),
        (("--reach=1",), "--reach=1.0 must be a number above 1"),
    ],
)
def test_adapted_noise_refuses_with_a_sentence(tmp_path, arguments, says):
    method = "--method=maml(lr=0.01,steps=1)"
    base = (*SINES, method, "--every=2", f"--out={tmp_path}")
    assert says in refused("adapt_noise", *base, *arguments)


def test_mechanism_measures_everything(tmp_path):
    arguments = (*SINES, "--method=maml(lr=0.01,steps=1)", "--noise=noise({})", "--stds=0.5,2")
    done("mechanism", *arguments, f"--out={tmp_path}")
    found = json.loads((tmp_path / "mechanism.json").read_text())
    assert list(found["rows"]) == ["0", "0.5", "2"]
    for row in found["rows"].values():
        assert all(len(row[name]) == 2 for name in NUMBERS)
    spread = [np.mean(row["spread"]) for row in found["rows"].values()]
    assert len(set(spread)) == 3
    assert np.abs(found["rows"]["0"]["barrier"]).max() < 1e-5
    assert (tmp_path / "mechanism.png").stat().st_size > 5_000


def test_mechanism_needs_a_place_for_the_std(tmp_path):
    text = refused("mechanism", *SINES, f"--out={tmp_path}", "--noise=noise(1)")
    assert "has no {} where the std goes" in text


# --- the catalogue --------------------------------------------------------------------------


def rows():
    """Names and specs that `--list` prints."""
    table, beside = done("catalogue", "--list").split("\n\n")
    assert "experiments.feedback" in beside
    lines = [line.split() for line in table.splitlines()]
    return {line[0]: line[1] for line in lines}


def test_every_row_of_the_catalogue_is_a_method():
    problem = vocabulary.Problem(
        lambda way: nets.conv4(way, width=4, image=(16, 16, 3)),
        5,
        losses.cross_entropy,
        100,
        (jnp.full(3, 0.5), jnp.full(3, 0.25)),
    )
    found = rows()
    tables = {"fomaml+mgaug-cp", "fomaml+metamix", "fomaml+taml", "fomaml+mr", "protonet+taskaug"}
    assert tables <= found.keys()
    assert len(set(found.values())) == len(found)
    for text in found.values():
        assert spec.method(text, problem)(jnp.zeros((), jnp.int32)).net.depth == 4
    assert done("catalogue", "--spec=anil").strip() == found["anil"]


def test_the_catalogue_refuses_rows_it_does_not_have(tmp_path):
    assert "'odd' is no row; known: fomaml, " in refused("catalogue", "--spec=odd")
    assert "'odd' is no row" in refused("catalogue", "--only=fomaml,odd", f"--out={tmp_path}")
    assert "--out is missing" in refused("catalogue", "--only=fomaml")


@pytest.mark.slow
def test_every_row_of_the_catalogue_lowers_its_objective(tmp_path):
    done("catalogue", f"--out={tmp_path}")
    found = json.loads((tmp_path / "catalogue.json").read_text())["rows"]
    assert found.keys() == rows().keys()
    for name, row in found.items():
        # aug() leaves 200 steps near chance, and a body that the inner loop does not move is slow
        least = 0.02 if name in ("fomaml+aug", "anil") else 0.1
        assert row["after"] < (1 - least) * row["before"], name

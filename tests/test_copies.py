"""Meta-MaxUp and the changes of its pool: the worst copy, and the laws of what is drawn."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks
from grid import mlp
from small import assert_close, batch, gradient, params_of, row, zero

from mgaug_jax import (
    augment,
    copies,
    maml,
    maxup,
    meta_gradient,
    nets,
    protonet,
)
from mgaug_jax.losses import squared_error
from mgaug_jax.meta import task_keys, view
from mgaug_jax.types import Examples, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


def shifted(by):
    """A change that moves the query images."""
    return lambda key, task: task._replace(query=task.query._replace(x=task.query.x + by))


def test_one_copy_of_maxup_is_plain_augmentation(x64):
    method = maml(mlp(), lr=0.5, steps=2)
    tasks, params = batch(3), params_of(method)
    change = shifted(0.7)
    want = gradient(augment(change)(method), params, tasks)
    got = gradient(maxup(pool=[change], copies=1)(method), params, tasks)
    assert_close(got, want)


@pytest.mark.parametrize("level", ["by_task", "by_query"])
@pytest.mark.parametrize("algorithm", ["maml", "protonet"])
def test_maxup_is_the_worst_of_its_copies(x64, algorithm, level):
    """Two changes, eight copies: all but surely both are among them, and the worst is known."""
    method = {"maml": maml(mlp(), lr=0.5, steps=2), "protonet": protonet(mlp())}[algorithm]
    tasks, params = batch(3), params_of(method)
    changes = [shifted(0.9), shifted(-1.5)]
    learner = method.algorithm(method.net, method.inner)

    def losses(params, task):
        of = []
        for change in changes:
            now = change(zero(), task)
            out = learner.predict(learner.adapt(zero(), params, now.support), now.query.x)
            of.append(-jnp.sum(now.query.y * jax.nn.log_softmax(out), axis=-1))
        return jnp.stack(of)

    def objective(params):
        each = [losses(params, row(tasks, t)) for t in range(3)]
        if level == "by_task":
            return sum(jnp.max(jnp.mean(x, axis=1)) for x in each) / 3
        return sum(jnp.mean(jnp.max(x, axis=0)) for x in each) / 3

    want, grads = jax.jit(jax.value_and_grad(objective))(params)
    rule = maxup(pool=changes, copies=8, level=getattr(copies, level))
    got, info = gradient(rule(method), params, tasks, jax.random.key(3))
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-10)
    assert_close(got, grads)


def images(n=6, side=12, seed=0):
    x = jax.random.uniform(jax.random.key(seed), (n, side, side, 2), minval=0.1)
    return Examples(x, jnp.eye(n))


def test_cutmix_pastes_a_box_and_mixes_labels_by_its_share():
    before, shares = images(), []
    for seed in range(60):
        after = jax.jit(copies.cutmix)(jax.random.key(seed), before)
        x, y = np.asarray(after.x), np.asarray(after.y)
        share = []
        for i in range(6):
            other = [j for j in range(6) if j != i and y[i, j] > 0]
            changed = (x[i] != np.asarray(before.x[i])).all(-1)
            if not other:  # its own partner, or no box
                assert not changed.any()
                continue
            np.testing.assert_array_equal(x[i][changed], before.x[other[0]][changed])
            rows, columns = np.where(changed)
            assert changed.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert y[i, other[0]] == pytest.approx(changed.mean(), abs=1e-6)
            assert y[i].sum() == pytest.approx(1, abs=1e-6)
            share.append(changed.mean())
        assert len(set(share)) <= 1
        shares += share[:1]
    assert 0.2 < np.mean(shares) < 0.5  # E (1 - lambda) = 1/2, less what the border cuts off


def test_the_share_that_cutmix_pastes_follows_beta_2_2():
    """Mean, variance and deciles, against boxes that numpy draws, cuts off and counts."""
    side, n = 24, 6000
    pair = Examples(jnp.stack([jnp.zeros((side, side, 1)), jnp.ones((side, side, 1))]), jnp.eye(2))
    after = jax.jit(jax.vmap(lambda key: copies.cutmix(key, pair)))(jax.random.split(zero(), n))
    share = np.asarray(after.x[:, 0].mean((1, 2, 3)))
    assert bool((after.x[:, 0] + after.x[:, 1] == 1).all())  # one box for both
    np.testing.assert_allclose(after.y[:, 0, 1], share, atol=1e-6)
    rng, want = np.random.default_rng(0), []
    for _ in range(60_000):
        length = round(np.sqrt(1 - rng.beta(2, 2)) * side)
        starts = np.floor(rng.uniform(0, side, 2) - length / 2 + 0.5)
        inside = np.minimum(starts + length, side) - np.maximum(starts, 0)
        want.append(np.prod(inside) / side**2)
    want = np.array(want)
    share = share[share > 0]  # half of the permutations of two exchange nothing
    assert abs(len(share) - n / 2) < 4.5 * n**0.5 / 2
    assert abs(share.mean() - want.mean()) < 4.5 * want.std() / len(share) ** 0.5
    assert abs(share.var() / want.var() - 1) < 0.12
    tenths = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(share, tenths), np.quantile(want, tenths), atol=0.02)


def test_erase_blanks_a_box_of_half_of_the_images():
    before = images(400, 16)
    after = np.asarray(jax.jit(copies.erase)(zero(), before).x)
    blank = (after == 0).all(-1)
    np.testing.assert_array_equal(after[~blank], np.asarray(before.x)[~blank])
    areas = []
    for one in blank[blank.any((1, 2))]:
        rows, columns = np.where(one)
        sides = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert one.sum() == sides[0] * sides[1]
        areas.append(one.mean())
    assert abs(len(areas) - 200) < 4.5 * 10
    # a pixel of a side of 16 is what rounding can add
    assert min(areas) > 0.02 - 2 / 16 * 0.25
    assert max(areas) < 0.4 + 2 / 16
    assert np.mean(areas) == pytest.approx(0.21, abs=0.03)


def test_the_aspect_of_an_erased_box_is_log_uniform_whatever_its_area():
    """Deciles of aspect and area, against the law drawn and rounded in numpy."""
    side, n = 64, 3000
    before = Examples(jnp.ones((n, side, side, 1)), jnp.ones((n, 1)))
    blank = np.asarray(jax.jit(copies.erase)(zero(), before).x[..., 0] == 0)
    blank = blank[blank.any((1, 2))]
    mine = np.stack([blank.any(axis).sum(1) for axis in (2, 1)], axis=1)
    rng = np.random.default_rng(0)
    area = rng.uniform(0.02, 0.4, 60_000)
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(10 / 3), len(area)))
    theirs = np.minimum(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)), 1)
    theirs = np.round(theirs * side)
    tenths = np.linspace(0.1, 0.9, 9)
    for law in (lambda hw: np.log(hw[:, 0] / hw[:, 1]), lambda hw: hw.prod(1) / side**2):
        got, want = np.quantile(law(mine), tenths), np.quantile(law(theirs), tenths)
        np.testing.assert_allclose(got, want, atol=0.05 * np.ptp(want))
    small = mine.prod(1) < 0.2 * side**2
    assert abs(np.log(mine[small, 0] / mine[small, 1]).mean()) < 4 * 0.7 / small.sum() ** 0.5


def test_self_mix_moves_a_turned_patch_within_the_image():
    before = images(50, 8)
    after = np.asarray(jax.jit(copies.self_mix)(zero(), before).x)
    moved = 0
    for x, y in zip(np.asarray(before.x), after, strict=True):
        changed = (x != y).any(-1)
        assert changed.sum() <= 16
        values = {tuple(v) for v in x.reshape(-1, 2)}
        assert {tuple(v) for v in y.reshape(-1, 2)} <= values
        moved += changed.any()
    assert moved > 40
    np.testing.assert_array_equal(jax.jit(copies.self_mix)(zero(), before).y, before.y)


def test_the_patch_of_self_mix_is_half_as_wide_and_turned_by_every_quarter_alike():
    """Pixels say where they came from: under a turn by k quarters one pair of sums is constant."""
    side, n, turns = 16, 800, Counter()
    x = jnp.broadcast_to(
        jnp.arange(side**2, dtype=float).reshape(side, side, 1), (n, side, side, 1)
    )
    after = jax.jit(copies.self_mix)(zero(), Examples(x, jnp.ones((n, 1)))).x
    i, j = np.indices((side, side))
    for image in np.asarray(after[..., 0], int):
        row, column = np.divmod(image, side)
        # np.rot90 takes [i, j] from [j, m - i], and so on
        pairs = [
            (row - i, column - j),
            (row - j, column + i),
            (row + i, column + j),
            (row + j, column - i),
        ]
        moved = (row != i) | (column != j)
        if not moved.any():  # not turned, and pasted where it was
            turns[0] += 1
            continue
        fits = [k for k, pair in enumerate(pairs) if all(np.ptp(a[moved]) == 0 for a in pair)]
        assert len(fits) == 1
        turns[fits[0]] += 1
        assert max(np.ptp(i[moved]), np.ptp(j[moved])) < side // 2
        assert moved.sum() >= (side // 2) ** 2 - 1  # one pixel may be turned into its own place
    for k in range(4):
        assert abs(turns[k] - n / 4) < 4.5 * (n * 3 / 16) ** 0.5


def test_large_rotation_leaves_half_of_the_classes():
    tasks = make_tasks(zero(), 300, way=5, queries=1, shape=(4, 4, 1))
    after = jax.vmap(copies.large_rotation)(task_keys(zero(), tasks), tasks)
    same = np.asarray((after.support.x == tasks.support.x).all((2, 3, 4)))
    assert abs(same.mean() - 0.5) < 4.5 * 0.5 / 1500**0.5


def test_more_shots_doubles_the_support():
    task = row(batch(shape=(20, 12, 2)), 0)
    moves = set()
    for seed in range(20):
        after = copies.more_shots(jax.random.key(seed), task)
        np.testing.assert_array_equal(after.support.x[:3], task.support.x)
        np.testing.assert_array_equal(after.support.y, np.tile(task.support.y, (2, 1)))
        for before, copy in zip(task.support.x, np.asarray(after.support.x[3:]), strict=True):
            flipped = np.pad(np.asarray(before)[:, ::-1], ((2, 2), (1, 1), (0, 0)))
            crops = {(i, j): flipped[i : i + 20, j : j + 12] for i in range(5) for j in range(3)}
            moves |= {move for move, crop in crops.items() if (crop == copy).all()}
    assert len(moves) == 15
    method = maxup(pool=[copies.more_shots], copies=2)(protonet(mlp()))
    meta_gradient(method, zero(), method.algorithm(method.net, method.inner).init(zero()), batch())


def test_the_released_pool_has_its_six_changes():
    """What each does to support, to query and to the query's labels, and where it blanks."""
    task = Task(images(4), images(6, seed=1)._replace(y=jnp.eye(4)[jnp.arange(6) % 4]))
    found = []
    for change in copies.default_pool():
        after = jax.jit(jax.vmap(lambda key, change=change: change(key, task)))(
            jax.random.split(zero(), 30)
        )
        changed = lambda new, old: bool((new != old).any())
        found.append(
            (
                changed(after.support.x, task.support.x),
                changed(after.query.x, task.query.x),
                changed(after.query.y, task.query.y),
                bool((after.support.x == 0).any()),
                bool((after.query.x == 0).any()),
            )
        )
        assert not changed(after.support.y, task.support.y)
    assert found == [
        (False, True, True, False, False),  # query CutMix
        (False, True, False, False, True),  # query erase
        (True, False, False, True, False),  # support erase
        (True, True, False, False, False),  # large rotation
        (True, True, True, False, False),
        (True, True, False, False, True),
    ]


def test_copies_draw_from_the_pool_uniformly_and_apart():
    """All 36 pairs of two copies are as frequent; the loss says which change a copy has had."""
    to = lambda i: (
        lambda key, task: task._replace(query=task.query._replace(x=jnp.full_like(task.query.x, i)))
    )
    net = nets.from_functions(lambda key: {"w": jnp.ones((1, 1))}, lambda p, x: x @ p["w"])
    plain = maml(net, lr=0.0, steps=1, loss=lambda outputs, y: jnp.mean(outputs))
    which = lambda losses: 6 * losses[0, 0] + losses[1, 0]
    method = maxup(pool=[to(i) for i in range(6)], copies=2, level=which)(plain)
    part, params = Examples(jnp.zeros((1, 1)), jnp.zeros((1, 1))), params_of(plain)
    n = 7200
    loss = jax.jit(jax.vmap(lambda key: view(method, key, params, Task(part, part)).loss))
    counts = Counter(np.asarray(loss(jax.random.split(zero(), n))).round().astype(int).tolist())
    assert set(counts) == set(range(36))
    assert all(abs(c - n / 36) < 4.5 * (n / 36) ** 0.5 for c in counts.values())


def test_changes_in_turn_have_keys_of_their_own():
    seen = []

    def spy(key, task):
        seen.append(jax.random.key_data(key).tolist())
        return task

    copies.in_turn(spy, spy)(zero(), row(batch(), 0))
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("make", "says"),
    [(lambda: maxup(copies=0), "copies=0"), (lambda: maxup(pool=()), "empty pool")],
)
def test_maxup_refuses(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("change", [copies.large_rotation, copies.on_query(copies.cutmix)])
def test_copies_that_take_classes_refuse_a_regression(change):
    method = maxup(pool=(change,), copies=2)(maml(mlp(1), lr=0.1, loss=squared_error))
    tasks = Task(*(part._replace(y=part.y[..., :1]) for part in batch(2)))
    with pytest.raises(ValueError, match=r"targets are (none|no classes)"):
        gradient(method, params_of(method), tasks)


def test_maxup_refuses_what_is_no_image_and_changes_of_other_shapes():
    vectors = make_tasks(zero(), 2, shape=(64,))
    for change in (copies.cutmix, copies.erase, copies.self_mix):
        with pytest.raises(ValueError, match="are not images"):
            change(zero(), row(vectors, 0).query)
    with pytest.raises(ValueError, match="are not images"):
        copies.more_shots(zero(), row(vectors, 0))
    method = maxup(pool=[copies.more_shots, copies.large_rotation])(protonet(mlp()))
    params = method.algorithm(method.net, method.inner).init(zero())
    with pytest.raises(ValueError, match="tasks of different shapes"):
        meta_gradient(method, zero(), params, batch())

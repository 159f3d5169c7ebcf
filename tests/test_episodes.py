"""Episodes, over many keys: what a task may hold and how labels are dealt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgaug_jax import Images, episodes, evaluate, fomaml, nets, sample_task, sampler
from mgaug_jax.types import Examples, Task

SIZES = WAY, SHOT, QUERIES = 3, 2, 3
COUNTS = (5, 8, 6, 9, 7, 5, 9)
LAWS = {
    "mutually exclusive": episodes.mutually_exclusive,
    "fixed labels": episodes.fixed_labels,
    "fixed groups": episodes.fixed_groups,
    "shuffled groups": episodes.shuffled_groups,
}


def coded(counts=COUNTS):
    """Images of one pixel and two channels: (class, index); the padding is (255, 255)."""
    pixels = np.full((len(counts), max(counts), 1, 1, 2), 255, np.uint8)
    for c, count in enumerate(counts):
        pixels[c, :count, ..., 0] = c
        pixels[c, :count, ..., 1] = np.arange(count)[:, None, None]
    one = jnp.ones(2)
    return Images(jnp.asarray(pixels), jnp.asarray(counts), 0 * one, one / 255)


def draw(choose=episodes.mutually_exclusive, keys=256, images=None, sizes=(WAY, SHOT, QUERIES)):
    """`keys` tasks, support and query decoded to `[keys, W, K or Q]` classes and indices."""
    images = coded() if images is None else images
    tasks = jax.jit(jax.vmap(lambda key: sample_task(key, images, *sizes, choose)))(
        jax.random.split(jax.random.key(0), keys)
    )
    return tasks, [
        np.rint(np.asarray(part.x)).astype(int).reshape(keys, sizes[0], -1, 2) for part in tasks
    ]


@pytest.mark.parametrize("law", LAWS)
def test_support_and_query_are_different_images_of_the_class(law):
    _, (support, query) = draw(LAWS[law])
    assert support.shape == (256, WAY, SHOT, 2)
    assert query.shape == (256, WAY, QUERIES, 2)
    both = np.concatenate([support, query], axis=2)
    for task in both:
        assert len(set(task[:, 0, 0])) == WAY
        for of_class in task:
            assert (of_class[:, 0] == of_class[0, 0]).all()
            assert len(set(of_class[:, 1])) == SHOT + QUERIES


@pytest.mark.parametrize("law", LAWS)
def test_labels_are_balanced_and_class_major(law):
    tasks, _ = draw(LAWS[law], 8)
    for part, n in ((tasks.support, SHOT), (tasks.query, QUERIES)):
        want = [[float(label == c) for c in range(WAY)] for label in range(WAY) for _ in range(n)]
        np.testing.assert_array_equal(part.y, np.broadcast_to(want, (8, WAY * n, WAY)))


def test_padding_is_never_drawn_and_every_image_is():
    _, parts = draw(keys=1024)
    seen = np.concatenate([part.reshape(-1, 2) for part in parts])
    assert set(map(tuple, seen)) == {(c, i) for c, count in enumerate(COUNTS) for i in range(count)}


def test_images_of_a_class_are_drawn_equally_often():
    _, (support, _) = draw(keys=2048)
    for c, count in enumerate(COUNTS):
        indices = support[support[..., 0] == c][:, 1]
        p, n = 1 / count, len(indices)
        observed = np.bincount(indices, minlength=count) / n
        assert np.abs(observed - p).max() < 4.5 * (p * (1 - p) / n) ** 0.5


def test_mutually_exclusive_gives_every_class_every_label_equally_often():
    classes = jax.vmap(lambda key: episodes.mutually_exclusive(key, 7, 3))(
        jax.random.split(jax.random.key(0), 4096)
    )
    counts = np.array([np.bincount(np.asarray(classes)[:, n], minlength=7) for n in range(3)])
    chi = ((counts - 4096 / 7) ** 2 / (4096 / 7)).sum()
    assert chi < 45  # 18 degrees of freedom, p < 0.0005
    assert all(len(set(row)) == 3 for row in np.asarray(classes).tolist())


@pytest.mark.parametrize(("classes", "way"), [(10, 5), (13, 5), (64, 5), (7, 3), (5, 5)])
def test_fixed_labels_are_those_of_pools_that_partition_the_classes(classes, way):
    drawn = jax.vmap(lambda key: episodes.fixed_labels(key, classes, way))(
        jax.random.split(jax.random.key(0), 2048)
    )
    pools = [sorted(set(np.asarray(drawn)[:, n].tolist())) for n in range(way)]
    assert [c for pool in pools for c in pool] == list(range(classes))
    sizes = [len(pool) for pool in pools]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    for n, size in enumerate(sizes):
        observed = np.bincount(np.asarray(drawn)[:, n] - pools[n][0], minlength=size) / 2048
        error = (1 / size * (1 - 1 / size) / 2048) ** 0.5
        assert np.abs(observed - 1 / size).max() <= 4.5 * error
    if classes > way:
        assert len({tuple(row) for row in np.asarray(drawn).tolist()}) > classes // way


@pytest.mark.parametrize(("classes", "way"), [(10, 5), (14, 5), (64, 5), (7, 3), (5, 5)])
def test_fixed_groups_are_neighbours_in_order(classes, way):
    drawn = jax.vmap(lambda key: episodes.fixed_groups(key, classes, way))(
        jax.random.split(jax.random.key(0), 1024)
    )
    groups = {tuple(row) for row in np.asarray(drawn).tolist()}
    assert groups == {tuple(range(g * way, (g + 1) * way)) for g in range(classes // way)}


def test_normalise_scales_shifts_and_divides():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([1.0, 2.0, 0.5], np.float32)
    want = (pixels / 255.0 - mean) / std
    got = episodes.normalise(jnp.asarray(pixels), jnp.asarray(mean), jnp.asarray(std))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_networks_that_learned_nothing_guess(quick_compile):
    """Accuracy before adaptation is 1 / W: no law gives a label away. A network for every task, for
    one network may happen to know what fixed labels are.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (7, 1, 16, 16, 1)) + rng.integers(0, 56, (7, 9, 16, 16, 1))
    pixels = pixels.astype(np.uint8)
    images = Images(jnp.asarray(pixels), jnp.asarray(COUNTS), jnp.full(1, 0.5), jnp.full(1, 0.3))
    method = fomaml(nets.conv4(WAY, width=4, image=(16, 16, 1)), lr=0.1, steps=1)
    init = method.algorithm(method.net, method.inner).init

    def score(given):
        key, classes = given
        k_init, k_task = jax.random.split(key)
        sample = sampler(*SIZES, 1, lambda *_: classes)
        return evaluate(method, k_task, init(k_init), sample, images, 1).initial[0]

    scored = jax.jit(lambda *given: jax.lax.map(score, given))
    for law in LAWS.values():
        k_classes, k_score = jax.random.split(jax.random.key(0))
        drawn = jax.vmap(law, (0, None, None))(jax.random.split(k_classes, 600), 7, WAY)
        scores = np.asarray(scored(jax.random.split(k_score, 600), drawn))
        assert abs(scores.mean() - 1 / WAY) < 4 * scores.std() / 600**0.5


# --- sampler --------------------------------------------------------------------------------


def test_a_task_of_a_batch_depends_on_the_key_and_its_number_alone():
    images = coded()
    few, many = (
        jax.jit(sampler(WAY, SHOT, QUERIES, tasks))(jax.random.key(4), images) for tasks in (2, 5)
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)
    alone = sample_task(jax.random.fold_in(jax.random.key(4), 3), images, WAY, SHOT, QUERIES)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[3]), alone, many)
    assert len({np.asarray(x).tobytes() for x in many.support.x}) == 5
    other = jax.jit(sampler(WAY, SHOT, QUERIES, 2))(jax.random.key(5), images)
    assert (other.support.x != few.support.x).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("way", 1), ("shot", 0), ("queries", 0), ("tasks", 0), ("way", 2.0), ("shot", None)],
)
def test_sampler_refuses_impossible_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} was asked for"):
        sampler(**{"way": 5, "shot": 1, "queries": 1, "tasks": 1, name: value})


def test_check_refuses_what_the_data_cannot_serve():
    images = coded()
    episodes.check(images, 7, 2, 3)
    with pytest.raises(ValueError, match=r"way=8 .*the test split has 7 classes; lower --way"):
        episodes.check(images, 8, 2, 3, "the test split")
    with pytest.raises(ValueError, match=r"2 \+ 4 images .*has only 5; lower --shot or --queries"):
        episodes.check(images, 7, 2, 4)


# --- labels ---------------------------------------------------------------------------------


def test_permute_labels_changes_every_label_alike_in_support_and_query():
    way = 4
    part = lambda n: Examples(jnp.arange(way * n * 1.0)[:, None], jnp.repeat(jnp.eye(way), n, 0))
    task = Task(part(1), part(3))
    moved = jax.vmap(lambda key: episodes.permute_labels(key, task))(
        jax.random.split(jax.random.key(0), 256)
    )
    labels = [np.asarray(p.y).argmax(-1) for p in moved]
    np.testing.assert_array_equal(np.repeat(labels[0], 3, axis=1), labels[1])
    assert (labels[0] != np.arange(way)).all()
    assert all(sorted(row) == list(range(way)) for row in labels[0].tolist())
    assert set(labels[0][:, 0].tolist()) == {1, 2, 3}
    np.testing.assert_array_equal(moved.query.x[7], task.query.x)
    for y in (moved.support.y, moved.query.y):
        np.testing.assert_array_equal(np.sort(y, -1)[..., -1], 1)
        np.testing.assert_array_equal(np.sum(y, -1), 1)

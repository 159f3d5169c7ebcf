"""Recomputes one meta-step of the released PyTorch implementation and compares every number.

    python -m experiments.parity FILE.npz [FILE.npz ...]

A file holds what the authors' code computed in float64 on two CUB episodes: parameters, images,
every loss and logit in order, scores, masks, the summed meta-gradient and the parameters after
Adam. Everything is computed again by the functions that training uses, in float64, one task at a
time, since the released code scores a task with the gradients accumulated over the tasks before
it. The exit code is 1 if a row fails.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cli
from mgaug_jax import episodes, losses, meta, methods, nets, pruning
from mgaug_jax.resize import resize_task
from mgaug_jax.types import Examples, MetaParams, Method, Net, Params, Probe, Task

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT, SCORE_LIMIT, ACCURACY_LIMIT = 1e-8, 1e-6, 1e-6
LR, OUTER_LR = 0.01, 1e-3

ALGORITHMS = {"fomaml": methods.fomaml, "maml": methods.maml, "protonet": methods.protonet}


class Row(NamedTuple):
    """One compared quantity; it passes when `error <= limit`."""

    quantity: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.limit)


class Released(NamedTuple):
    """A file, read: the problem in this library's layouts, and the rest by name."""

    method: Method
    one_step: Method
    params: Params
    tasks: list[Task]
    steps: int
    keeps: np.ndarray
    sizes: np.ndarray
    arrays: Mapping[str, np.ndarray]


def read(path: Path) -> Released:
    """Reads a file; numbers of tasks, ways, shots, steps and sub-networks come from its arrays.

    Raises:
      BadInput: The file is missing, is not such a file, or names an unknown algorithm.
    """
    algorithm = path.name.split("_")[0]
    if algorithm not in ALGORITHMS:
        raise cli.BadInput(
            f"the algorithm of {path} is the first word of its name, and {algorithm!r} is none of "
            f"{', '.join(ALGORITHMS)}."
        )
    try:
        arrays = dict(np.load(path))
        count = sum(1 for name in arrays if re.fullmatch(r"task\d+/xs", name))
        tasks = [_task(arrays, i) for i in range(count)]
        keeps = arrays.get("keep_rates_as_used_sorted_desc", np.zeros((count, 0)))
        image = arrays["task0/xs"].shape[1:]
        params = to_tree(arrays, "param")
        passes = len(arrays["losses_in_order"]) // (count * (1 + keeps.shape[1]))
        sizes = arrays.get("resolutions", np.full(keeps.size, image[0])).reshape(keeps.shape)
        width = params["conv0"]["kernel"].shape[-1]
    except (OSError, EOFError, LookupError, ValueError, ArithmeticError, BadZipFile) as error:
        raise cli.BadInput(f"{path} is not a file of reference numbers: {error}") from error
    head = params.get("head")
    net = nets.conv4(head and head["bias"].size, width=width, image=image)
    make = ALGORITHMS[algorithm]
    if head is None:
        return Released(make(net), make(net), params, tasks, 0, keeps, sizes, arrays)
    steps = passes - 1
    method, one_step = (make(net, lr=LR, steps=n) for n in (steps, 1))
    return Released(method, one_step, params, tasks, steps, keeps, sizes, arrays)


def _task(arrays: Mapping[str, np.ndarray], i: int) -> Task:
    way = int(arrays[f"task{i}/ys"].max()) + 1
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)

    def part(which: str) -> Examples:
        x = episodes.normalise(jnp.asarray(arrays[f"task{i}/x{which}"]), mean, std)
        return Examples(x, jnp.eye(way)[arrays[f"task{i}/y{which}"]])

    return Task(part("s"), part("q"))


def to_tree(arrays: Mapping[str, np.ndarray], kind: str) -> Params:
    """PyTorch's `kind/<name>` arrays as parameters of `nets.conv4`, in its layouts."""
    leaves = {"conv.weight": "kernel", "bn.weight": "scale", "conv.bias": "bias", "bn.bias": "bias"}
    tree: dict = {}
    for name, value in arrays.items():
        if not name.startswith(f"{kind}/"):
            continue
        if block := re.fullmatch(r".*?(\d+)\.((conv|bn)\.(weight|bias))", name):
            number, leaf, module, _ = block.groups()
            layer = {"conv": "conv", "bn": "norm"}[module] + number
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            tree.setdefault(layer, {})[leaves[leaf]] = jnp.asarray(value)
        else:
            leaf = {"weight": "kernel", "bias": "bias"}[name.rsplit(".")[-1]]
            tree.setdefault("head", {})[leaf] = jnp.asarray(value.T)
    return tree


def compare(released: Released) -> Iterator[Row]:
    """Computes the step again, task by task, and yields a row for everything the file holds."""
    method, arrays = released.method, released.arrays
    net, params = method.net, MetaParams(released.params, {})
    view = jax.jit(partial(meta.view, method))
    inner = jax.jit(partial(inner_step, released.one_step))
    key = jax.random.key(0)  # nothing here is random
    nothing = jax.tree.map(jnp.zeros_like, params)
    add = partial(jax.tree.map, jnp.add)
    dense = pruning.per_layer(net, nothing.net, jnp.ones(()))

    outputs: list[tuple[jax.Array, jax.Array]] = []  # (logits, loss) in the order of the file
    full_losses, query_losses, accuracies = [], [], []
    accumulated = nothing

    def record(task: Task, mask: Params) -> meta.View:
        moved = params
        for _ in range(released.steps):
            moved, logits, loss = inner(moved, task.support, mask)
            outputs.append((logits, loss))
        seen = view(key, params, task, mask)
        outputs.append((seen.logits, seen.loss))
        query_losses.append(seen.loss)
        return seen

    for i, task in enumerate(released.tasks):
        full = record(task, dense)
        accumulated = add(accumulated, full.grads)
        full_losses.append(full.loss)
        accuracies.append(losses.accuracy(full.logits, task.query.y))
        shown = accumulated if released.steps else full.grads
        scores = pruning.adapted(params.net, Probe(shown.net, lambda _: jnp.zeros(())))
        for j, score in enumerate(prunable(net, scores)):
            if (theirs := arrays.get(f"task{i}/score_normalised/layer{j}")) is not None:
                yield Row(f"task{i} scores, layer {j}", error(hwio(theirs), score), SCORE_LIMIT)
        for u, keep in enumerate(released.keeps[i]):
            mask = pruning.per_layer(net, scores, jnp.asarray(keep))
            for j, ours in enumerate(prunable(net, mask)):
                shape = arrays[f"mask_shape/layer{j}"]
                bits = np.unpackbits(arrays[f"task{i}/mask{u}/layer{j}"], count=np.prod(shape))
                differing = np.sum(hwio(bits.reshape(shape)) != ours)
                yield Row(f"task{i} mask {u}, layer {j}: bits that differ", float(differing), 0)
            pruned = record(resize_task(task, int(released.sizes[i, u])), mask)
            accumulated = add(accumulated, pruned.grads)

    theirs = arrays["losses_in_order"]
    their_logits = {
        int(name.rsplit("/", 1)[1]): value
        for name, value in arrays.items()
        if name.startswith("logits_in_order/")
    }
    yield Row("number of losses that differ", abs(len(outputs) - len(theirs)), 0)
    for k, (logits, loss) in enumerate(outputs[: len(theirs)]):
        yield Row(f"logits {k}", error(their_logits[k], logits), LIMIT)
        yield Row(f"loss {k}", error(theirs[k], loss), LIMIT)
    logged = query_losses if released.steps else full_losses
    yield Row("mean loss", error(arrays["mean_loss"], np.mean(logged)), LIMIT)
    yield Row("mean accuracy", error(arrays["mean_acc"], np.mean(accuracies)), ACCURACY_LIMIT)
    yield from trees_agree("meta-gradient", to_tree(arrays, "meta_grad_sum"), accumulated.net)
    adam = optax.adam(OUTER_LR)
    updates, _ = adam.update(accumulated, adam.init(params), params)
    after = optax.apply_updates(params, updates)
    yield from trees_agree("after Adam", to_tree(arrays, "param_after_adam"), after.net)


def inner_step(method: Method, params: MetaParams, support: Examples, mask: Params):
    """One step of the inner loop: the next parameters, and logits and loss before it."""
    learner = method.algorithm(meta.subnet(method.net, mask), method.inner)
    logits = learner.predict(learner.start(params, support), support.x)
    fast = learner.adapt(jax.random.key(0), params, support)
    return MetaParams(fast.params, {}), logits, learner.loss(logits, support.y)


def prunable(net: Net, tree: Params) -> list[jax.Array]:
    """The prunable leaves, in the order of the layers."""
    pairs = zip(jax.tree.leaves(net.roles), jax.tree.leaves(tree), strict=True)
    return [leaf for role, leaf in pairs if role.prunable]


def hwio(kernel: np.ndarray) -> np.ndarray:
    """A kernel in PyTorch's OIHW, in HWIO."""
    return kernel.transpose(2, 3, 1, 0)


def error(theirs, ours, floor: float = 0.0) -> float:
    """`|ours - theirs| / max(|theirs|, floor)` in Euclidean norm; infinite if a shape differs or a
    number is not finite.
    """
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    if theirs.shape != ours.shape:
        return np.inf
    difference = float(np.linalg.norm(ours - theirs))
    scale = max(float(np.linalg.norm(theirs)), floor)
    relative = difference / scale if scale else difference
    return relative if np.isfinite(relative) else np.inf


def trees_agree(what: str, theirs: Params, ours: Params) -> Iterator[Row]:
    """A row per leaf. A bias before a batch norm has a true gradient of zero, so a leaf's norm
    counts as at least 1e-6 of the whole tree's.
    """
    floor = 1e-6 * float(optax.tree.norm(theirs))
    leaves = jax.tree_util.tree_leaves_with_path(theirs)
    for (path, leaf), mine in zip(leaves, jax.tree.leaves(ours), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield Row(f"{what} {name}", error(leaf, mine, floor), LIMIT)


def main(arguments: Sequence[str]) -> int:
    jax.config.update("jax_enable_x64", True)
    failed = 0
    for path in arguments:
        try:
            rows = list(compare(read(Path(path))))
        except KeyError as error:
            raise cli.BadInput(f"{path} lacks the array {error}.") from error
        failed += report(path, rows)
    return 1 if failed else 0


def report(path: str, rows: list[Row]) -> int:
    """Prints the table of one file and returns the number of failed rows."""
    failed = sum(not row.passed for row in rows)
    width = max(len(row.quantity) for row in rows)
    print(f"{path}\n{'quantity':<{width}}  relative error   limit  result")
    for row in rows:
        verdict = "pass" if row.passed else "FAIL"
        print(f"{row.quantity:<{width}}  {row.error:14.1e}  {row.limit:6.0e}  {verdict}")
    print(f"{len(rows) - failed} of {len(rows)} rows pass\n", flush=True)
    return failed


if __name__ == "__main__":
    cli.start(main, __doc__, positional="one reference FILE.npz or more")

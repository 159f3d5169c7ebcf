"""What `experiments.benchmark` times: problems, weights, tasks, operations. Numpy alone.

Both sides start from these arrays. A weight's name is its path in the parameters of `nets.conv4`,
`nets.resnet10` or `nets.mlp`, with this library's layout (HWIO kernels, dense kernels `[in, out]`).
"""

from typing import Any, NamedTuple

import numpy as np

HIDDEN = (40, 40)


class Problem(NamedTuple):
    """A meta-step.

    Attributes:
      algorithm: "fomaml", "maml" (second order) or "protonet".
      image: Height, width and channels of the images; None: sinusoids and the MLP.
      way: Classes.
      shot: Support examples per class (of a sinusoid task: in all).
      queries: As `shot`.
      tasks: T.
      steps: Inner steps.
      keeps: Fraction of its kernels that each sub-network of MGAug-CP keeps; empty: no MGAug.
      width: Channels of Conv-4.
      configurations: Runs trained at once, with inner rates of their own; 0: one run.
      dtype: "bfloat16" for this library's maps and products; None: float32.
      native: This library's convolutions are XLA's own (`nets.Lowering`).
      devices: Over so many the tasks are spread; 0: over as many as share them evenly.
      blocks: Basic blocks per stage of a ResNet; 0: Conv-4.
      chunk: So many meta-steps are one program, which draws and augments its tasks; 0: one step, of
        given tasks.
    """

    algorithm: str
    image: tuple[int, int, int] | None = (84, 84, 3)
    way: int = 5
    shot: int = 1
    queries: int = 15
    tasks: int = 4
    steps: int = 5
    keeps: tuple[float, ...] = ()
    width: int = 64
    configurations: int = 0
    dtype: str | None = None
    native: bool = False
    devices: int = 0
    blocks: int = 0
    chunk: int = 0


LR, OUTER_LR = 0.01, 1e-3
KEEPS = (0.9, 0.8, 0.7)
FOMAML, PROTONET = Problem("fomaml"), Problem("protonet", steps=0)
SINUSOID = Problem("maml", None, 1, 10, 10, 25)
PROBLEMS = {
    "fomaml-84-1shot": FOMAML,
    "fomaml-84-5shot": FOMAML._replace(shot=5),
    "fomaml-mgaug-84-1shot": FOMAML._replace(keeps=KEEPS),
    "fomaml-mgaug-84-5shot": FOMAML._replace(keeps=KEEPS, shot=5),
    "protonet-84-1shot": PROTONET,
    "protonet-84-5shot": PROTONET._replace(shot=5),
    "protonet-mgaug-84-1shot": PROTONET._replace(keeps=KEEPS),
    "protonet-mgaug-84-5shot": PROTONET._replace(keeps=KEEPS, shot=5),
    "fomaml-omniglot-20way": FOMAML._replace(image=(28, 28, 1), way=20),
    "fomaml-84-1shot-bfloat16": FOMAML._replace(dtype="bfloat16"),
    "fomaml-mgaug-84-1shot-bfloat16": FOMAML._replace(keeps=KEEPS, dtype="bfloat16"),
    "fomaml-mgaug-84-1shot-bfloat16-native": FOMAML._replace(
        keeps=KEEPS, dtype="bfloat16", native=True
    ),
    "fomaml-84-1shot-chunk": FOMAML._replace(chunk=4, devices=1),
    "resnet10-224-mgaug": FOMAML._replace(image=(224, 224, 3), tasks=1, keeps=KEEPS, blocks=1),
    "maml-sinusoid": SINUSOID,
    "sweep-sinusoid": SINUSOID._replace(configurations=8),
}
QUICK = {
    "fomaml-84-1shot": FOMAML._replace(tasks=1),
    "protonet-84-1shot": PROTONET._replace(tasks=1),
    "fomaml-omniglot-20way": PROBLEMS["fomaml-omniglot-20way"]._replace(tasks=1),
    "maml-sinusoid": SINUSOID,
    "sweep-sinusoid": PROBLEMS["sweep-sinusoid"],
}


class Layer(NamedTuple):
    """A convolution and the norm behind it.

    Attributes:
      path: Names on the way to it in the parameters, and what the two are called by at the end.
      size, inputs, out: Of the kernel.
      side: Height and width of its map.
      bias: Whether the convolution has one.
    """

    path: tuple[str, ...]
    size: int
    inputs: int
    out: int
    side: tuple[int, int]
    bias: bool


def layers(problem: Problem) -> list[Layer]:
    """The convolutions of the network, the first one first."""
    assert problem.image is not None
    height, width, inputs = problem.image
    made = []
    if not problem.blocks:
        for i in range(4):
            made.append(Layer((str(i),), 3, inputs, problem.width, (height, width), True))
            height, width, inputs = height // 2, width // 2, problem.width
        return made
    halved = lambda: (-(-height // 2), -(-width // 2))
    height, width = halved()
    made.append(Layer(("",), 7, inputs, 64, (height, width), False))
    height, width = halved()  # the pool
    inputs = 64
    for stage in range(4):
        for i in range(problem.blocks):
            if stage and not i:
                height, width = halved()
            out, name = 64 * 2**stage, f"stage{stage}_block{i}"
            add = lambda end, size, n: made.append(
                Layer((name, end), size, n, out, (height, width), False)  # noqa: B023
            )
            add("0", 3, inputs)
            add("1", 3, out)
            if inputs != out:
                add("_shortcut", 1, inputs)
            inputs = out
    return made


def features(problem: Problem) -> int:
    """Inputs of the head."""
    last = layers(problem)[-1]
    return last.out * (1 if problem.blocks else (last.side[0] // 2) * (last.side[1] // 2))


def weights(problem: Problem) -> dict[str, Any]:
    """Random weights in the tree of the network's parameters, float64, none of them special."""
    rng = np.random.default_rng(0)

    def layer(*shape: int, bias: bool = True) -> dict[str, np.ndarray]:
        bound = np.prod(shape[:-1]) ** -0.5
        draw = lambda *shape: rng.uniform(-bound, bound, shape)
        return {"kernel": draw(*shape)} | ({"bias": draw(shape[-1])} if bias else {})

    if problem.image is None:
        sizes = (1, *HIDDEN)
        tree = {f"dense{i}": layer(*sizes[i : i + 2]) for i in range(len(HIDDEN))}
        return {**tree, "head": layer(HIDDEN[-1], 1)}
    tree: dict[str, Any] = {}
    for (*where, end), size, inputs, out, _, bias in layers(problem):
        at = tree.setdefault(where[0], {}) if where else tree
        at[f"conv{end}"] = layer(size, size, inputs, out, bias=bias)
        at[f"norm{end}"] = {"scale": rng.uniform(0.5, 1.5, out), "bias": rng.normal(0, 0.1, out)}
    if problem.algorithm != "protonet":
        tree["head"] = layer(features(problem), problem.way)
    return tree


Part = tuple[np.ndarray, np.ndarray]


def tasks(problem: Problem) -> tuple[Part, Part]:
    """Support and query, each `(x [T, n, ...], y [T, n, d])`, float64; classes in order."""
    rng = np.random.default_rng(1)
    count = problem.tasks
    if problem.image is None:
        amplitude, phase = rng.uniform(0.1, 5, (count, 1, 1)), rng.uniform(0, np.pi, (count, 1, 1))

        def part(n: int) -> Part:
            x = rng.uniform(-5, 5, (count, n, 1))
            return x, amplitude * np.sin(x - phase)
    else:
        means = rng.normal(size=(count, problem.way, *problem.image))

        def part(n: int) -> Part:
            x = np.repeat(means, n, axis=1)
            y = np.repeat(np.eye(problem.way), n, axis=0)
            return x + rng.normal(size=x.shape), np.broadcast_to(y, (count, *y.shape))

    return part(problem.shot), part(problem.queries)


def flops(problem: Problem) -> float | None:
    """Multiplications and additions of a meta-step by direct convolution; None for an MLP.

    Backwards costs twice the forward pass, less the gradient of the images. Norms and pools, which
    are passes over memory, count nothing.
    """
    if problem.image is None:
        return None
    convs = layers(problem)
    forward = [2 * c.size**2 * c.inputs * c.out * c.side[0] * c.side[1] for c in convs]
    if problem.algorithm != "protonet":
        forward.append(2 * features(problem) * problem.way)
    passes = problem.way * (problem.queries + problem.shot * max(problem.steps, 1))
    networks = problem.tasks * (1 + len(problem.keeps))
    return float(networks * passes * (3 * sum(forward) - forward[0]))

"""What `experiments.benchmark` times: problems, weights, tasks, operations. Numpy alone.

Both sides start from these arrays. A weight's name is its path in the parameters of `nets.conv4` or
`nets.mlp`, with this library's layout (HWIO kernels, dense kernels `[in, out]`).
"""

from typing import NamedTuple

import numpy as np

HIDDEN = (40, 40)


class Problem(NamedTuple):
    """A meta-step.

    Attributes:
      algorithm: "fomaml", "maml" (second order) or "protonet".
      image: Height, width and channels of Conv-4's images; None: sinusoids and the MLP.
      way: Classes.
      shot: Support examples per class (of a sinusoid task: in all).
      queries: As `shot`.
      tasks: T.
      steps: Inner steps.
      keeps: Fraction of its kernels that each sub-network of MGAug-CP keeps; empty: no MGAug.
      width: Channels of Conv-4.
      configurations: Runs trained at once, with inner rates of their own; 0: one run.
      dtype: "bfloat16" for this library's maps and products; None: float32.
      devices: Over so many the tasks are spread; 0: over as many as share them evenly.
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
    devices: int = 0


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


def weights(problem: Problem) -> dict[str, dict[str, np.ndarray]]:
    """Random weights in the tree of the network's parameters, float64, none of them special."""
    rng = np.random.default_rng(0)

    def layer(*shape: int) -> dict[str, np.ndarray]:
        bound = np.prod(shape[:-1]) ** -0.5
        draw = lambda *shape: rng.uniform(-bound, bound, shape)
        return {"kernel": draw(*shape), "bias": draw(shape[-1])}

    if problem.image is None:
        sizes = (1, *HIDDEN)
        tree = {f"dense{i}": layer(*sizes[i : i + 2]) for i in range(len(HIDDEN))}
        return {**tree, "head": layer(HIDDEN[-1], 1)}
    height, width, channels = problem.image
    tree = {}
    for i in range(4):
        tree[f"conv{i}"] = layer(3, 3, channels, problem.width)
        scale = rng.uniform(0.5, 1.5, problem.width)
        tree[f"norm{i}"] = {"scale": scale, "bias": rng.normal(0, 0.1, problem.width)}
        height, width, channels = height // 2, width // 2, problem.width
    if problem.algorithm != "protonet":
        tree["head"] = layer(height * width * channels, problem.way)
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
    height, width, channels = problem.image
    forward = []
    for _ in range(4):
        forward.append(2 * 9 * height * width * channels * problem.width)
        height, width, channels = height // 2, width // 2, problem.width
    if problem.algorithm != "protonet":
        forward.append(2 * height * width * channels * problem.way)
    passes = problem.way * (problem.queries + problem.shot * max(problem.steps, 1))
    networks = problem.tasks * (1 + len(problem.keeps))
    return float(networks * passes * (3 * sum(forward) - forward[0]))

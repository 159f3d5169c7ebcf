"""PyTorch's side of `experiments.benchmark`: what a careful author writes, and the libraries.

The plain loop is eager, one task after another, channels last, the ReLU on the pooled map. Only
this module imports torch. jax-meta, which needs none, is in `by_jax_meta`.
JAX is imported only where it is used, since a peer's memory is measured in a process of its own.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.bench.workloads import LR, OUTER_LR, Problem, tasks, weights

Named = dict[str, Tensor]
Part = tuple[Tensor, Tensor]


def named(problem: Problem, dtype: torch.dtype, device: str) -> Named:
    """The weights in PyTorch's layouts, by their path in ours."""
    made = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{path}/{name}" if path else name, inner)
            return
        value = torch.from_numpy(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)
        form = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        value = value.to(device, dtype).contiguous(memory_format=form)
        made[path] = value.requires_grad_()

    add("", weights(problem))
    return made


def tree(found: Named) -> dict[str, Any]:
    """The way back of `named`."""
    made: dict[str, Any] = {}
    for path, value in found.items():
        *where, name = path.split("/")
        back, at = value.detach().cpu().numpy(), made
        for part in where:
            at = at.setdefault(part, {})
        at[name] = back.transpose(2, 3, 1, 0) if back.ndim == 4 else back.T
    return made


def batches(problem: Problem, dtype: torch.dtype, device: str) -> tuple[Part, Part]:
    """Support and query with the axis of tasks in front; images channels last."""

    def put(x: np.ndarray, y: np.ndarray) -> Part:
        images, targets = (torch.tensor(a).to(device, dtype) for a in (x, y))
        # NHWC in memory, NCHW to PyTorch, which is what it calls channels last
        return images.movedim(-1, 2) if images.ndim == 5 else images, targets

    support, query = tasks(problem)
    return put(*support), put(*query)


# --- the problem ----------------------------------------------------------------------------


def forward(p: Named, x: Tensor) -> Tensor:
    """Conv-4, a ResNet or the MLP; an embedding where there is no head."""
    if "dense0/kernel" in p:
        for i in range(sum(name.startswith("dense") for name in p) // 2):
            x = F.relu(F.linear(x, p[f"dense{i}/kernel"], p[f"dense{i}/bias"]))
        return F.linear(x, p["head/kernel"], p["head/bias"])
    x = resnet(p, x) if "conv/kernel" in p else conv4(p, x)
    return F.linear(x, p["head/kernel"], p["head/bias"]) if "head/kernel" in p else x


def normed(p: Named, name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, p[f"{name}/scale"], p[f"{name}/bias"], training=True)


def conv4(p: Named, x: Tensor) -> Tensor:
    for i in range(4):
        x = F.conv2d(x, p[f"conv{i}/kernel"], p[f"conv{i}/bias"], padding=1)
        x = F.relu(F.max_pool2d(normed(p, f"norm{i}", x), 2))
    return x.flatten(1)


def resnet(p: Named, x: Tensor) -> Tensor:
    """As torchvision's, with the mean of the last map."""

    def conv_norm(x: Tensor, block: str, end: str, stride: int) -> Tensor:
        kernel = p[f"{block}conv{end}/kernel"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return normed(p, f"{block}norm{end}", x)

    x = F.max_pool2d(F.relu(conv_norm(x, "", "", 2)), 3, 2, 1)
    for name in [name for name in p if name.endswith("conv0/kernel")]:
        block = name.removesuffix("conv0/kernel")
        stride = 2 if f"{block}conv_shortcut/kernel" in p else 1
        y = conv_norm(F.relu(conv_norm(x, block, "0", stride)), block, "1", 1)
        x = conv_norm(x, block, "_shortcut", stride) if stride == 2 else x
        x = F.relu(x + y)
    return x.mean((2, 3))


def loss(p: Named, part: Part) -> Tensor:
    x, y = part
    return criterion(forward(p, x), y)


def criterion(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, or the squared error of a regression."""
    return F.cross_entropy(outputs, y) if y.shape[-1] > 1 else F.mse_loss(outputs, y)


def proto_loss(p: Named, support: Part, query: Part) -> Tensor:
    (x, y), (xq, yq) = support, query
    means = (y.T @ forward(p, x)) / y.sum(0)[:, None]
    z = forward(p, xq)
    # |z - c|^2 by the product
    distances = (z**2).sum(-1, keepdim=True) - 2 * z @ means.T + (means**2).sum(-1)
    return F.cross_entropy(-distances, yq)


def task_gradient(problem: Problem, p: Named, support: Part, query: Part, mask: Named) -> Named:
    """Of one network, whose weights and gradients are multiplied by `mask` where it has any."""
    masked = lambda values: {n: v * mask[n] if n in mask else v for n, v in values.items()}
    with torch.no_grad():
        p = {name: w.detach().requires_grad_() for name, w in masked(p).items()}
    if problem.algorithm == "protonet":
        value, last = proto_loss(p, support, query), p
    else:
        second, last = problem.algorithm == "maml", p
        for _ in range(problem.steps):
            found = torch.autograd.grad(
                loss(last, support), tuple(last.values()), create_graph=second
            )
            grads = masked(dict(zip(last, found, strict=True)))
            last = {name: w - LR * grads[name] for name, w in last.items()}
            if not second:
                last = {name: w.detach().requires_grad_() for name, w in last.items()}
        value = loss(last, query)
        last = p if second else last
    found = torch.autograd.grad(value, tuple(last.values()))
    return masked(dict(zip(last, found, strict=True)))


def masks(problem: Problem, p: Named, grads: Named) -> list[Named]:
    """CP's masks, per layer: the threshold is the k-th largest score, and stays."""
    made = []
    for keep in problem.keeps:
        mask = {}
        for name, w in p.items():
            if w.ndim == 4:
                scores = (grads[name] * w.detach()).abs()
                count = max(1, int(w.numel() * (1 - keep) + 1e-6))
                threshold = torch.topk(scores.flatten(), count, sorted=False).values.min()
                mask[name] = (scores <= threshold).to(w.dtype)
        made.append(mask)
    return made


# --- ways to the meta-gradient --------------------------------------------------------------


def loop(problem: Problem, p: Named, support: Part, query: Part) -> Named:
    """Task after task, network after network, eagerly."""
    total = {name: torch.zeros_like(w) for name, w in p.items()}

    def add(grads: Named) -> Named:
        torch._foreach_add_(list(total.values()), [grads[name] for name in total])
        return grads

    for t in range(problem.tasks):
        task = (support[0][t], support[1][t]), (query[0][t], query[1][t])
        full = add(task_gradient(problem, p, *task, {}))
        for mask in masks(problem, p, full):
            add(task_gradient(problem, p, *task, mask))
    return {name: value / problem.tasks for name, value in total.items()}


def vmapped(problem: Problem, p: Named, support: Part, query: Part) -> Named:
    """`torch.func`: every task at once."""
    from torch.func import grad, vmap

    def after(p: Named, support: Part, query: Part) -> Tensor:
        last = p
        for _ in range(problem.steps):
            grads = grad(loss)(last, support)
            if problem.algorithm == "fomaml":
                grads = {name: g.detach() for name, g in grads.items()}
            last = {name: w - LR * grads[name] for name, w in last.items()}
        return loss(last, query)

    p = {name: w.detach() for name, w in p.items()}
    grads = vmap(grad(after), (None, 0, 0))(p, support, query)
    return {name: g.mean(0) for name, g in grads.items()}


class Model(torch.nn.Module):
    """`forward` as the module that libraries want."""

    def __init__(self, p: Named):
        super().__init__()
        self.names = list(p)
        for name, w in p.items():
            self.register_parameter(name, torch.nn.Parameter(w.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return forward({name: getattr(self, name) for name in self.names}, x)


def by_higher(problem: Problem, p: Named, support: Part, query: Part) -> Named:
    """`higher.innerloop_ctx`, task after task."""
    import higher

    model, second = Model(p), problem.algorithm == "maml"
    total = {name: torch.zeros_like(w) for name, w in p.items()}
    for t in range(problem.tasks):
        rule = torch.optim.SGD(model.parameters(), LR)
        options = {"copy_initial_weights": False, "track_higher_grads": second}
        with higher.innerloop_ctx(model, rule, **options) as (fast, descent):
            for _ in range(problem.steps):
                descent.step(criterion(fast(support[0][t]), support[1][t]))
            value = criterion(fast(query[0][t]), query[1][t])
            last = list(fast.parameters(time=0) if second else fast.parameters())
            torch._foreach_add_(list(total.values()), torch.autograd.grad(value, last))
    return {name: value / problem.tasks for name, value in total.items()}


def by_torchopt(problem: Problem, p: Named, support: Part, query: Part) -> Named:
    """`torchopt.MetaSGD`, task after task, the weights put back after each."""
    import torchopt

    model, second = Model(p), problem.algorithm == "maml"
    start = list(model.parameters())
    rule = torchopt.MetaSGD(model, lr=LR)
    first = torchopt.extract_state_dict(model, by="reference")
    total = {name: torch.zeros_like(w) for name, w in p.items()}
    for t in range(problem.tasks):
        for _ in range(problem.steps):
            rule.step(criterion(model(support[0][t]), support[1][t]))
            if not second:
                torchopt.stop_gradient(model)
        value = criterion(model(query[0][t]), query[1][t])
        last = start if second else [getattr(model, name) for name in model.names]
        torch._foreach_add_(list(total.values()), torch.autograd.grad(value, last))
        torchopt.recover_state_dict(model, first)
    return {name: value / problem.tasks for name, value in total.items()}


class Peer(NamedTuple):
    """A way to compute the meta-gradient.

    Attributes:
      module: What has to be installed beside torch.
      gradient: `(problem, weights, support, query) -> meta-gradient`; None: not by torch.
      takes: Which problems it can do in reasonable time.
    """

    module: str
    gradient: Callable[[Problem, Named, Part, Part], Named] | None
    takes: Callable[[Problem], bool]


def _plain(problem: Problem) -> bool:
    return problem.algorithm != "protonet" and not problem.keeps


def _small(problem: Problem) -> bool:
    return _plain(problem) and (problem.image is None or problem.image[0] <= 28)


PEERS = {
    "loop": Peer("torch", loop, lambda problem: True),
    "torch.func": Peer("torch", vmapped, _small),
    "higher": Peer("higher", by_higher, _plain),
    "torchopt": Peer("torchopt", by_torchopt, _plain),
    "jax-meta": Peer("jax_meta", None, lambda problem: problem.image is None),
}

WITHOUT_ADAPTER = ("learn2learn", "parallel-metalearn")
"""Peers of the field that nothing here calls."""


def missing() -> list[str]:
    """Peers that cannot be imported here."""
    return [name for name, peer in PEERS.items() if find_spec(peer.module) is None]


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def device() -> str:
    """Where PyTorch computes: on the GPU if JAX does, too."""
    if not torch.cuda.is_available():
        return "cpu"
    import jax

    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def peak() -> int | None:
    """Most bytes of the GPU that tensors have taken so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device() == "cuda" else None


def use_threads(count: int) -> None:
    torch.set_num_threads(count)


def gradient(name: str, problem: Problem) -> dict[str, Any]:
    """The meta-gradient in float64, for comparison."""
    of, arguments = PEERS[name].gradient, (torch.float64, "cpu")
    if of is None:
        from experiments.bench import by_jax_meta

        return by_jax_meta.gradient(problem)
    p = named(problem, *arguments)
    return tree(of(problem, p, *batches(problem, *arguments)))


def step(name: str, problem: Problem, device: str) -> Callable[[], Any]:
    """A meta-step with Adam, in float32, waited for."""
    gradient = PEERS[name].gradient
    if gradient is None:
        from experiments.bench import by_jax_meta

        return by_jax_meta.step(problem)
    p = named(problem, torch.float32, device)
    parts = batches(problem, torch.float32, device)
    adam = torch.optim.Adam(p.values(), lr=OUTER_LR, fused=True)

    def one() -> None:
        grads = gradient(problem, p, *parts)
        for path, w in p.items():
            w.grad = grads[path]
        adam.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return one


def matmul_rate(device: str, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of a float32 product of square matrices, the best of some."""
    from time import perf_counter

    x, times = torch.ones(size, size, device=device), []
    for _ in range(repeats + 1):
        begin = perf_counter()
        x @ x
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(perf_counter() - begin)
    return 2 * size**3 / min(times)

r"""Published protocols by name: data, ways, shots, steps and rates, as `--protocol` sets them.

    python -m experiments.protocols
    python -m experiments.train --protocol=mgaug-cub-1shot-conv4-fomaml --data_dir=DIR
    python -m experiments.train --protocol=mr-maml-sinusoid-10shot \\
        --method='maml(lr=0.01,steps=1)|mr_weights(beta=5e-5,blocks=2,start=-50.0)|fresh_optimizer()'

A protocol sets the defaults of flags; what the command line says comes first. Its method is the
plain baseline of the table; experiments.catalogue has the rows. Where a source leaves a value open,
its note says so, and the value is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import cli

FLAG_NAMES = (
    "data labels way shot queries tasks steps eval_every outer_lr net method image_size rotations "
    "test_shot test_steps test_queries test_labels"
).split()


class Protocol(NamedTuple):
    """Values of flags, and where they come from."""

    flags: dict[str, Any]
    source: str


def mgaug(data: str, shot: int, net: str, learner: str) -> Protocol:
    """MGAug, Tables 1 and 2 (epochs and updates per epoch as in the released code)."""
    updates, epochs, tasks = (16, 4800, 4) if learner == "fomaml" else (101, 1600, 1)
    epochs = epochs if shot == 1 else epochs // 2
    methods = {"fomaml": "fomaml(lr=0.01,steps=5)|aug()", "protonet": "protonet()|aug()"}
    return Protocol(
        {
            "data": data,
            "way": 5,
            "shot": shot,
            "queries": 15,
            "tasks": tasks,
            "steps": epochs * updates,
            "eval_every": 50 * updates,
            "outer_lr": 1e-3,
            "net": {"conv4": "conv4(width=64)", "resnet10": "resnet10"}[net],
            "image_size": {"conv4": 84, "resnet10": 224}[net],
            "method": methods[learner],
        },
        f"MGAug, Table {1 if learner == 'protonet' else 2}",
    )


def mr_maml(data: str, shot: int) -> Protocol:
    """MR-MAML's classes with fixed labels."""
    omniglot = data == "omniglot_mr"
    return Protocol(
        {
            "data": data,
            "labels": "fixed_labels",
            "way": 20 if omniglot else 5,
            "shot": shot,
            "queries": shot,
            "tasks": 16 if omniglot else 4,
            "steps": 60_000,
            "eval_every": 1000,
            "outer_lr": 1e-3,
            "net": "conv4(width=64)" if omniglot else "conv4(width=32)",
            "method": f"maml(lr={0.1 if omniglot else 0.01},steps=5)",
            "test_queries": shot,
        },
        "MR-MAML (classes); steps and inner loop as Finn's, open in the source",
    )


def metamix(data: str, shot: int) -> Protocol:
    """MetaMix's classes with fixed labels."""
    omniglot = data == "omniglot_mr"
    return mr_maml(data, shot)._replace(
        flags=mr_maml(data, shot).flags
        | {
            "tasks": (8 if shot == 1 else 6) if omniglot else 4,
            "steps": 50_000,
            "test_steps": 10,
        },
        source="MetaMix; its Omniglot network pools by a global mean, ours does not",
    )


def mr_sinusoid(shot: int) -> Protocol:
    """MR-MAML's one-hot sinusoids."""
    return Protocol(
        {
            "data": "sinusoid",
            "labels": "fixed_labels",
            "shot": 10,
            "queries": 10,
            "tasks": 1,
            "steps": 15_000,
            "eval_every": 1000,
            "outer_lr": 1e-3,
            "net": "mlp((100,5,40,40))",
            "method": "maml(lr=0.01,steps=1)",
            "test_shot": shot,
            "test_steps": 100,
        },
        "MR-MAML (sinusoids); the notebook shows up to 100 steps at the test",
    )


def groups(data: str, **more: Any) -> Protocol:
    """Meta-augmentation's fixed groups of neighbouring classes."""
    return Protocol(
        {
            "data": data,
            "labels": "fixed_groups",
            "way": 5,
            "shot": 1,
            "queries": 1,
            "tasks": 4,
            "steps": 60_000,
            "eval_every": 1000,
            "outer_lr": 1e-3,
            "net": "conv4(width=32)",
            "method": "maml(lr=0.01,steps=5)",
        }
        | more,
        "meta-augmentation; tasks per step, steps and inner loop as Finn's, open in the source",
    )


DCLAW = {
    "way": 2,
    "queries": 15,
    "test_queries": 1,
    "test_labels": "shuffled_groups",
}
PROTOCOLS: Mapping[str, Protocol] = {
    **{
        f"mgaug-{name}-{shot}shot-{net}-{learner}": mgaug(data, shot, net, learner)
        for name, data in (("cub", "cub"), ("mini", "mini_imagenet"))
        for shot in (1, 5)
        for net in ("conv4", "resnet10")
        for learner in ("fomaml", "protonet")
    },
    **{
        f"{paper}-{name}-{shot}shot": make(data, shot)
        for paper, make in (("mr-maml", mr_maml), ("metamix", metamix))
        for name, data in (("omniglot", "omniglot_mr"), ("mini", "mini_imagenet"))
        for shot in (1, 5)
    },
    **{f"mr-maml-sinusoid-{shot}shot": mr_sinusoid(shot) for shot in (5, 10)},
    "perturbation-omniglot-1shot": mr_maml("omniglot_mr", 1)._replace(
        source="gradient perturbation; its protocol could not be read, MR-MAML's is very probable"
    ),
    "meta-augmentation-omniglot": groups(
        "omniglot_finn", net="conv4(width=64)", method="maml(lr=0.4,steps=1)", tasks=32
    ),
    "meta-augmentation-mini": groups("mini_imagenet"),
    **{f"meta-augmentation-dclaw{n}": groups(f"dclaw{n}", **DCLAW) for n in (1, 2, 3)},
    "meta-augmentation-sinusoid": groups(
        "sinusoid",
        shot=5,
        queries=5,
        tasks=6,
        net="mlp((40,40))",
        method="maml(lr=0.001,steps=1)",
        test_steps=10,
    ),
    "finn-sinusoid": Protocol(
        {
            "data": "sinusoid",
            "shot": 10,
            "queries": 10,
            "tasks": 25,
            "steps": 70_000,
            "eval_every": 1000,
            "net": "mlp((40,40))",
            "method": "maml(lr=0.01,steps=1)",
        },
        "MAML, sinusoids",
    ),
}


def main(arguments: Sequence[str]) -> int:
    del arguments
    for name, protocol in PROTOCOLS.items():
        values = " ".join(f"--{flag}={value}" for flag, value in protocol.flags.items())
        print(f"{name}\n    {protocol.source}\n    {values}")
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)

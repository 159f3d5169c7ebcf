r"""Published protocols by name: data, ways, shots, steps and rates, as `--protocol` sets them.

    python -m experiments.protocols --list
    python -m experiments.train --protocol=mgaug-cub-1shot-conv4-fomaml --data_dir=DIR
    python -m experiments.train --protocol=mr-maml-sinusoid-10shot \\
        --method='maml(lr=0.01,steps=1)|mr_weights(beta=5e-5,blocks=2,start=-50.0)|fresh_optimizer()'

A protocol sets the defaults of flags; what the command line says comes first. Its method is the
plain baseline of the table, or what the table is about; experiments.catalogue has the other rows.
Where a source leaves a value open, its note says so, and the value is ours.

Finn's inner loop descends a loss summed over classes (CE / K), ours the mean, so his rates are
multiplied by the ways here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import cli


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


def finn(data: str, way: int, shot: int) -> dict[str, Any]:
    """MAML's settings for classes: 64 filters for Omniglot, 32 and ten steps in tests for mini."""
    omniglot = data.startswith("omniglot")
    tasks, steps, rate = (4, 5, 0.01)
    if omniglot:
        tasks, steps, rate = (32, 1, 0.4) if way == 5 else (16, 5, 0.1)
    return {
        "data": data,
        "way": way,
        "shot": shot,
        "queries": shot if omniglot else 15,
        "tasks": tasks,
        "steps": 60_000,
        "eval_every": 1000,
        "outer_lr": 1e-3,
        "net": f"conv4(width={64 if omniglot else 32})",
        "method": f"maml(lr={rate * way:g},steps={steps})",
        **({} if omniglot else {"test_steps": 10}),
    }


TURNED = "|rotate_classes(0.75)"
"""Every class of a training task at one of four angles, as Finn's Omniglot."""


def maml(data: str, way: int, shot: int, learner: str) -> Protocol:
    """MAML in Finn's protocol, and what was held against it: Meta-SGD, TAML."""
    values = finn(data, way, shot)
    if learner == "meta-sgd":
        values["method"] = "meta_sgd(lr=0.01,steps=1)"
        values.pop("test_steps", None)
    elif learner == "taml":
        values["method"] += "|taml_inequality(0.1)"
    if data == "omniglot_finn":
        values |= {"method": values["method"] + TURNED, "test_rotations": True}
    sources = {
        "maml": "MAML; queries and steps open, 20-way mini-ImageNet as Meta-SGD reports it",
        "meta-sgd": "Meta-SGD; all but its one step as Finn's, open in what could be read",
        "taml": "TAML; all but its term as Finn's, the term's weight ours: open in the source",
    }
    short = way == 20 and data == "mini_imagenet"
    more = "; needs --splits, as the 16 classes of validation are too few" if short else ""
    return Protocol(values, sources[learner] + more)


def mr_maml(data: str, shot: int) -> Protocol:
    """MR-MAML's classes with fixed labels."""
    values = finn(data, 20 if data == "omniglot_mr" else 5, shot)
    more = {"labels": "fixed_labels", "queries": shot, "test_queries": shot}
    return Protocol(
        values | more, "MR-MAML (classes); steps and inner loop as Finn's, open in the source"
    )


def metamix(data: str, shot: int) -> Protocol:
    """MetaMix's classes with fixed labels. Its loss is the mean, as ours."""
    omniglot = data == "omniglot_mr"
    more = {
        "tasks": (8 if shot == 1 else 6) if omniglot else 4,
        "steps": 50_000,
        "method": f"maml(lr={0.1 if omniglot else 0.01},steps=5)",
        "test_steps": 10,
    }
    return Protocol(
        mr_maml(data, shot).flags | more,
        "MetaMix; its Omniglot network pools by a global mean, ours does not",
    )


def taskaug(data: str, rate: float, shot: int) -> Protocol:
    """TaskAug: its rate grows to `rate` in 80,000 steps, of which 60,000 are made."""
    return Protocol(
        {
            "data": data,
            "way": 5,
            "shot": 5,
            "queries": 6,
            "tasks": 8,
            "steps": 60_000,
            "eval_every": 1000,
            "outer_lr": 1e-3,
            "net": "resnet10",
            "method": f"protonet()|aug()|rotate_classes({rate * 60 / 80:g},ramp='linear')",
            "test_shot": shot,
        },
        "TaskAug; there a ResNet-12 with R2-D2 or SVM heads and SGD, here ResNet-10, ProtoNet and "
        "Adam",
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


LAWS = {
    "": ("fixed_groups", ""),
    "-intrashuffle": ("fixed_groups", "|shuffle_labels()"),
    "-intershuffle": ("exclusive", ""),
}
"""Columns of meta-augmentation's table: labels of training tasks, and what is done to them."""


def groups(values: dict[str, Any], law: str = "", **more: Any) -> Protocol:
    """Meta-augmentation's groups of neighbouring classes, or a column with more entropy."""
    labels, change = LAWS[law]
    values = values | more
    return Protocol(
        values | {"labels": labels, "method": values["method"] + change},
        "meta-augmentation; tasks per step, steps and inner loop as Finn's, open in the source",
    )


MINI = finn("mini_imagenet", 5, 1)
SINES = {
    "data": "sinusoid",
    "shot": 5,
    "queries": 5,
    "tasks": 6,
    "steps": 60_000,
    "eval_every": 5000,
    "outer_lr": 1e-3,
    "net": "mlp((40,40))",
    "method": "maml(lr=0.001,steps=1)",
    "test_steps": 10,
}


def turned_groups(law: str) -> Protocol:
    """Omniglot, whose training classes are turned at random in every column."""
    values = finn("omniglot_finn", 5, 1)
    return groups(values, law, method=values["method"] + TURNED)


def prototypes(law: str) -> Protocol:
    """ProtoNet's row of meta-augmentation's table."""
    values = {name: value for name, value in MINI.items() if name != "test_steps"}
    return groups(values, law, method="protonet()", queries=1)


def dclaw(permutation: int, law: str) -> Protocol:
    """D'Claw, two classes of an object; Finn's inner loop of mini-ImageNet."""
    values = finn(f"dclaw{permutation}", 2, 1)
    values.pop("test_steps")
    return groups(values, law, test_queries=1, test_labels="shuffled_groups")


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
    **{
        f"{learner}-{name}-{way}way-{shot}shot": maml(data, way, shot, learner)
        for learner in ("maml", "meta-sgd", "taml")
        for name, data in (("omniglot", "omniglot_finn"), ("mini", "mini_imagenet"))
        for way in ((5,) if learner == "taml" else (5, 20))
        for shot in (1, 5)
    },
    **{
        f"taskaug-{name}-{shot}shot": taskaug(data, rate, shot)
        for name, data, rate in (
            ("mini", "mini_imagenet", 0.25),
            ("cifar-fs", "cifar_fs", 0.5),
            ("fc100", "fc100", 0.25),
        )
        for shot in (1, 5)
    },
    "perturbation-omniglot-1shot": mr_maml("omniglot_mr", 1)._replace(
        source="gradient perturbation; its protocol could not be read, MR-MAML's is very probable"
    ),
    **{
        f"meta-augmentation-{name}{law}": protocol
        for law in LAWS
        for name, protocol in (
            ("omniglot", turned_groups(law)),
            ("mini", groups(MINI, law, queries=1)),
            ("mini-protonet", prototypes(law)),
            *((f"dclaw{n}", dclaw(n, law)) for n in (1, 2, 3)),
        )
    },
    "meta-augmentation-sinusoid": groups(SINES),
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
    # Only here, for others import this module's table and have a flag of that name themselves.
    flags.DEFINE_bool("list", True, "Prints the protocols, which is all that this does.")
    cli.start(main, __doc__)

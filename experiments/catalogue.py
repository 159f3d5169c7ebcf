"""The methods of the published tables as specs, by name.

    python -m experiments.catalogue --list
    python -m experiments.catalogue --out=DIR
    python -m experiments.train --method="$(python -m experiments.catalogue --spec=fomaml+metamix)"

--list prints name, spec and source of every row. Without it every row is trained for --steps
meta-steps on glyphs, from one seed: shown are its own objective (penalties of weights, as of L2 and
MR-MAML, apart) in the first and the last tenth of training, which should fall, and the time of a
meta-step relative to FoMAML's, measured after compiling, in turns: median and range of five. Writes
catalogue.json into --out. aug() is for photographs and cuts letters beyond recognition, so that
here only the rows of aug() alone have it, unless --aug is given.

The numbers in the specs are the sources'; where a source gives none they are ours, to be tuned.
Protocols (data, ways, shots, numbers of steps) are not part of a spec, nor are the sizes of the
sub-networks' images, which published MGAug rows have (sizes=(84,64,48) at 84 pixels).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import cli, loading, runs, store
from mgaug_jax import loops

FOMAML, MAML, PROTONET = "fomaml(lr=0.01,steps=5)", "maml(lr=0.01,steps=5)", "protonet()"


class Row(NamedTuple):
    """A spec and where it comes from."""

    spec: str
    source: str


ROWS: Mapping[str, Row] = {
    "fomaml": Row(FOMAML, "MGAug, Table 2"),
    "fomaml+aug": Row(f"{FOMAML}|aug()", "MGAug, Table 2, + Aug"),
    "fomaml+mr": Row(f"{FOMAML}|aug()|mr_weights(beta=1e-5)", "MGAug, Table 2, + MR; recipe ours"),
    "fomaml+taml": Row(
        f"{FOMAML}|aug()|taml_inequality(0.1)",
        "MGAug, Table 2, + TAML; Theil and weight our reading",
    ),
    "fomaml+taml-entropy": Row(f"{FOMAML}|aug()|taml_entropy(0.1)", "TAML's entropy form"),
    "fomaml+graddrop": Row(
        f"{FOMAML}|aug()|drop_grad(0.1)",
        "MGAug, Table 2, + GradDrop; form, site and rate our reading",
    ),
    "fomaml+metamix": Row(f"{FOMAML}|aug()|metamix()", "MGAug, Table 2, + MetaMix; our reading"),
    "fomaml+metamix-cs": Row(
        f"{FOMAML}|aug()|metamix(shuffle=0.5)", "MetaMix, Channel Shuffle; there from step 5,000 on"
    ),
    "fomaml+mgaug-wp": Row(f"{FOMAML}|aug()|wp(keep=0.98)", "MGAug, Table 2; w_min as for CP"),
    "fomaml+mgaug-pp": Row(f"{FOMAML}|aug()|pp(keep=0.98)", "MGAug, Table 2; w_min as for CP"),
    "fomaml+mgaug-cp": Row(f"{FOMAML}|aug()|cp(keep=0.98)", "MGAug, Table 2; w_min of the code"),
    "fomaml+duplicate": Row(
        f"{FOMAML}|aug()|pp(keep=1.0,cap=1.0,subnets=1)", "control: one sub-network, whole"
    ),
    "fomaml+l2": Row(f"{FOMAML}|aug()|l2(0.001)", "control of every comparison"),
    "fomaml+weight-decay": Row(f"{FOMAML}|aug()|weight_decay(0.00001)", "decoupled control"),
    "protonet": Row(PROTONET, "MGAug, Table 1"),
    "protonet+aug": Row(f"{PROTONET}|aug()", "MGAug, Table 1, + Aug"),
    "protonet+taskaug": Row(
        f"{PROTONET}|aug()|rotate_classes(0.25,ramp='linear')",
        "MGAug, Table 1, + TaskAug; aug and ramp our reading",
    ),
    "protonet+maxup": Row(
        f"{PROTONET}|aug()|maxup()", "MGAug, Table 1, + Meta-MaxUp; by task, pool our reading"
    ),
    "protonet+mgaug-wp": Row(f"{PROTONET}|aug()|wp(keep=0.97,cap=0.99)", "MGAug, Table 1"),
    "protonet+mgaug-pp": Row(f"{PROTONET}|aug()|pp(keep=0.97,cap=0.99)", "MGAug, Table 1"),
    "protonet+mgaug-cp": Row(f"{PROTONET}|aug()|cp(keep=0.97,cap=0.99)", "MGAug, Table 1"),
    "protonet+duplicate": Row(
        f"{PROTONET}|aug()|pp(keep=1.0,cap=1.0,subnets=1)", "control: one sub-network, whole"
    ),
    "protonet+l2": Row(f"{PROTONET}|aug()|l2(0.001)", "control of every comparison"),
    "fomaml+noise": Row(f"{FOMAML}|noise(1,relative_to='gradient_rms')", "perturbation, inner"),
    "fomaml+noise-update": Row(
        f"{FOMAML}|noise(0.01,site='inner_update',relative_to='weight_rms')",
        "perturbation, on inner updates; the other reading",
    ),
    "fomaml+noise-outer": Row(
        f"{FOMAML}|noise(1,site='outer',relative_to='gradient_rms')", "perturbation, outer"
    ),
    "fomaml+noise-outer-update": Row(
        f"{FOMAML}|noise(1,site='outer_update',relative_to='gradient_rms')",
        "perturbation, on outer updates",
    ),
    "maml": Row(MAML, "MAML"),
    "maml+noise": Row(f"{MAML}|noise(1,relative_to='gradient_rms')", "perturbation, inner"),
    "maml+noise-update": Row(
        f"{MAML}|noise(0.01,site='inner_update',relative_to='weight_rms')",
        "perturbation, on inner updates; the other reading",
    ),
    "maml+noise-outer": Row(
        f"{MAML}|noise(1,site='outer',relative_to='gradient_rms')", "perturbation, outer"
    ),
    "maml+graddrop": Row(f"{MAML}|drop_grad(0.1)", "DropGrad"),
    "maml+l2": Row(f"{MAML}|l2(0.001)", "control of every comparison"),
    "maml+duplicate": Row(
        f"{MAML}|pp(keep=1.0,cap=1.0,subnets=1)", "control: one sub-network, whole"
    ),
    "maml+mgaug-cp": Row(f"{MAML}|cp(keep=0.98)", "MGAug on second-order MAML"),
    "anil": Row("anil(lr=0.01,steps=5)", "ANIL"),
    "meta-sgd": Row("meta_sgd(lr=0.01,steps=1)", "Meta-SGD"),
    "maml++": Row(
        "lslr(lr=0.01,steps=5)|multi_step_loss(ramp='linear')", "MAML++: rates and loss per step"
    ),
    "maml+dsd": Row(f"{MAML}|dsd(keep=0.5)", "MetaPruning's schedule on MAML; our reading"),
    "maml+iht": Row(f"{MAML}|iht(keep=0.5)", "MetaPruning's schedule on MAML; our reading"),
    "reptile+dsd": Row(f"{MAML}|reptile()|dsd(keep=0.5)", "MetaPruning, DSD; our reading"),
    "reptile+iht": Row(f"{MAML}|reptile()|iht(keep=0.5)", "MetaPruning, IHT; our reading"),
    "maml+intrashuffle": Row(f"{MAML}|shuffle_labels()", "meta-augmentation"),
    "mr-maml": Row(f"{MAML}|mr_weights(beta=1e-5)", "MR-MAML(W)"),
    "mr-maml-fresh": Row(
        f"{MAML}|mr_weights(beta=1e-5)|fresh_optimizer()", "MR-MAML(W), Adam made anew as released"
    ),
    "mr-maml-a": Row(f"{MAML}|mr_activations(beta=1e-2)", "MR-MAML(A); beta ours"),
}

BESIDE = """Not in a spec: feedback (perturbation), which trains again on stored gradients of tests:
    python -m experiments.feedback --method=SPEC --out=DIR
and intershuffle (meta-augmentation), which is --labels=exclusive. Its target noise is
shift_targets(), of a regression: --data=sinusoid."""

FEW = 5
"""Steps that are one program, and are timed."""

FLAGS = flags.FLAGS
flags.DEFINE_bool("list", False, "Prints the rows and ends.")
flags.DEFINE_string("spec", None, "Prints the spec of this row and ends.")
flags.DEFINE_list("only", [], "Rows to train, separated by commas. Default: all.")
flags.DEFINE_integer("steps", 200, "Meta-steps of every row.")
flags.DEFINE_bool("aug", False, "Trains every row with its aug(), if it has it.")
flags.DEFINE_string("net", "conv4(width=16)", "Spec of the network.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.list:
        width = max(map(len, ROWS))
        for name, row in ROWS.items():
            print(f"{name:<{width}}  {row.spec:<60}  {row.source}")
        print(f"\n{BESIDE}")
        return 0
    names = FLAGS.only or list(ROWS)
    for name in [*names, *filter(None, [FLAGS.spec])]:
        if name not in ROWS:
            raise cli.BadInput(f"{name!r} is no row; known: {', '.join(ROWS)}.")
    if FLAGS.spec:
        print(ROWS[FLAGS.spec].spec)
        return 0
    folder = store.output(FLAGS.out)
    first = loading.setup(config(ROWS["fomaml"].spec), say=print)
    base, _ = trained(first)
    table: dict[str, Any] = {}
    for name in names:
        spec = ROWS[name].spec
        spec = spec if FLAGS.aug else spec.replace("|aug()|", "|")
        step, losses = trained(runs.with_method(first, spec))
        tenth = max(1, len(losses) // 10)
        table[name] = {
            "spec": spec,
            "before": float(losses[:tenth].mean()),
            "after": float(losses[-tenth:].mean()),
            "times": relative_times(step, base),
        }
        print(markdown({name: table[name]})[-1], flush=True)
    store.write_json(folder / "catalogue.json", {"rows": table, "versions": store.versions()})
    print("\n" + "\n".join(markdown(table)))
    return 0


def config(method: str) -> runs.Config:
    """Glyphs, 5-way 1-shot, 4 tasks, as many queries as supports."""
    return runs.Config(
        method=method,
        net=FLAGS.net,
        data="glyphs",
        data_dir=None,
        labels="exclusive",
        way=5,
        shot=1,
        queries=5,
        tasks=4,
        steps=FLAGS.steps,
        outer_lr=1e-3,
        eval_every=FLAGS.steps,
        seed=0,
    )


def trained(made: runs.Setup) -> tuple[Callable[[], Any], np.ndarray]:
    """`(a compiled meta-step, ready to be timed; the objective at every step)`.

    Raises:
      NotFinite: A loss is not.
    """
    k_init, k_train = runs.keys(made.config.seed)
    state = jax.jit(made.trainer.init)(k_init)
    go = jax.jit(partial(loops.run, made.trainer, made.sample), static_argnames="steps")
    few = lambda state: jax.block_until_ready(go(k_train, state, made.splits["train"], steps=FEW))
    parts = []
    for _ in range(0, made.config.steps, FEW):
        state, info = few(state)
        parts.append(np.asarray(info["loss"]))
    losses = np.concatenate(parts)[: made.config.steps]
    if not np.isfinite(losses).all():
        raise cli.NotFinite(f"{made.config.method}: a loss is not finite. Lower a rate.")
    return partial(few, state), losses


def relative_times(step: Callable[[], Any], base: Callable[[], Any]) -> list[float]:
    """The time of one over the other's, of five turns in ascending order."""
    ratios = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        between = time.perf_counter()
        base()
        ratios.append((between - begin) / (time.perf_counter() - between))
    return sorted(ratios)


def markdown(table: dict[str, Any]) -> list[str]:
    """The table, as it can be pasted into a report."""
    lines = ["| row | objective, first tenth | last tenth | time of a step / FoMAML's |"]
    lines.append("| --- | --- | --- | --- |")
    for name, found in table.items():
        least, _, median, _, most = found["times"]
        ratio = f"{median:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {name} | {found['before']:.3f} | {found['after']:.3f} | {ratio} |")
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)

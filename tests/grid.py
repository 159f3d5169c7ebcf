"""Algorithms, pruners and changes by name, and which of them do not go together."""

import jax.numpy as jnp

from mgaug_jax import (
    anil,
    cp,
    drop_grad,
    feedback,
    first_order,
    fomaml,
    fresh_optimizer,
    l2,
    lslr,
    maml,
    maxup,
    meta_sgd,
    metamix,
    mr_activations,
    mr_weights,
    multi_step_loss,
    nets,
    noise,
    outer,
    perturb,
    photo,
    pp,
    protonet,
    reptile,
    rotate_classes,
    shift_targets,
    shuffle_labels,
    taml,
    weight_decay,
    wp,
)
from mgaug_jax.losses import squared_error
from mgaug_jax.weighting import cosine

FIRST_STEP = jnp.zeros((), jnp.int32)
ALGORITHMS = {
    "maml": lambda net: maml(net(3), lr=0.1, steps=2),
    "fomaml": lambda net: fomaml(net(3), lr=0.1, steps=2),
    "anil": lambda net: anil(net(3), lr=0.1, steps=2),
    "meta_sgd": lambda net: meta_sgd(net(3), lr=0.1),
    "lslr": lambda net: lslr(net(3), lr=0.1, steps=2),
    "regression": lambda net: maml(net(1), lr=0.1, steps=2, loss=squared_error),
    "protonet": lambda net: protonet(net(None)),
}
"""Of `way -> network`."""
PRUNERS = {
    "none": lambda method: method,
    "wp": wp(keep=0.5, high=0.9, subnets=2),
    "pp": pp(keep=0.5, high=0.9, subnets=2),
    "cp": cp(keep=0.5, high=0.9, subnets=2),
}
CHANGES = {
    "noise": noise(0.1),
    "noise_update": noise(0.1, site=perturb.inner_update, relative_to=perturb.weight_rms),
    "noise_outer": noise(0.5, site=perturb.outer, relative_to=perturb.gradient_rms),
    "noise_outer_update": noise(0.1, site=perturb.outer_update, distribution=perturb.uniform),
    "noise_test": noise(0.1, site=perturb.test),
    "drop": drop_grad(0.2),
    "drop_outer": drop_grad(0.2, site=perturb.outer, factors=perturb.bernoulli_factors),
    "first_order": first_order,
    # of any parameters, since it is put on before others that add some
    "feedback": feedback(jnp.ones(1), similarity=lambda g, one: one * cosine(g, g)),
    "l2": l2(0.1),
    "weight_decay": weight_decay(1e-3),
    "fresh": fresh_optimizer,
    "iht": outer.iterative_hard_thresholding(0.5, FIRST_STEP),
    "dsd": outer.dense_sparse_dense(0.5, FIRST_STEP, start=1, stop=2),
    "inequality": taml.inequality(0.1),
    "entropy": taml.entropy(0.1),
    "metamix": metamix(),
    "channel_shuffle": metamix(shuffle=0.5),
    "multi_step": multi_step_loss(),
    "maxup": maxup(copies=2),
    "reptile": reptile(),
    "mr_weights": mr_weights(1e-4),
    "mr_activations": mr_activations(1e-4),
    "shuffle": shuffle_labels(),
    "shift": shift_targets(),
    "rotate": rotate_classes(0.5),
    "aug": photo.photo_augment(jnp.full(1, 0.5), jnp.full(1, 0.25)),
}

OUTER_LOSSES = {"metamix", "channel_shuffle", "multi_step", "maxup", "reptile", "mr_activations"}
WHOLE = {"reptile", "mr_weights", "mr_activations"}
"""Take an inner loop that moves every weight, and not each other's."""
INNER = {"noise", "noise_update", "noise_test", "drop", "first_order", "entropy"}
INNER |= WHOLE | OUTER_LOSSES - {"maxup"}
CLASSES = {"entropy", "channel_shuffle", "maxup", "shuffle", "rotate"}
TARGETS = {"shift"}
REFUSALS = {
    "protonet has no inner loop": r"protonet.* has no inner loop|protonet has none|not protonet|"
    "protonet has no inner steps",
    "the loop must be whole": "must move every weight|moves every weight",
    "one outer loss": "Two outer losses were asked for",
    "classes": "no classes; use|use shift_targets|takes classes and more|turns classes",
    "targets": "use shuffle_labels",
}
"""What a refusal says, by its reason."""


def reasons(algorithm, names) -> set[str]:
    """Why an algorithm and changes make no sense together; empty if they do."""
    names = set(names)
    held = {
        "protonet has no inner loop": algorithm == "protonet" and INNER & names,
        "the loop must be whole": (algorithm == "anil" and WHOLE & names)
        or (algorithm in ("meta_sgd", "lslr") and "reptile" in names)
        or len(WHOLE & names) > 1,
        "one outer loss": len(OUTER_LOSSES & names) > 1,
        "classes": algorithm == "regression" and CLASSES & names,
        "targets": algorithm != "regression" and TARGETS & names,
    }
    return {reason for reason, holds in held.items() if holds}


def mlp(outputs=3, hidden=(6, 5)):
    """A network of `len(hidden)` blocks on flattened images."""
    inner = nets.mlp(hidden, inputs=64, outputs=outputs)
    flat = lambda x: x.reshape(len(x), -1)
    return inner._replace(
        apply=lambda params, x: inner.apply(params, flat(x)),
        part=lambda params, x, first, last: inner.part(params, flat(x), first, last),
    )


def small(algorithm):
    """A method of the grid on a perceptron."""
    return ALGORITHMS[algorithm](lambda way: mlp(way or 3))

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does MGAug's Theorem 1 say?
#
# MGAug trains sub-networks beside the full network, and justifies pruning by a bound on the
# error that a meta-learner will make on *new* tasks. A bound is a number, so it can be computed.
# This notebook does that, term by term: on a network trained here, where the bound turns out to
# be **vacuous** (an error rate of at most 150 % is no news), and on a small linear learner, where
# it says something. On the way it shows which part of the theorem does the work, and what has to
# be repaired before its numbers mean anything.
#
# Nothing is assumed but meta-learning: tasks $t = 1 \dots T$ of $m_t$ labelled samples each, a
# network with initial weights $\omega$ that adapts to $\omega_t$ on a task, and pruning by one of
#
# | | which weights go |
# | --- | --- |
# | **WP** | the last channels of every layer (width pruning) |
# | **PP** | a share $\rho$ of every layer, at random (parameter pruning) |
# | **CP** | the share $\rho$ with the highest \|gradient x weight\| on the task (catfish pruning) |
#
# The same text runs as a script, `python -m experiments.pac_bayes`; `PAC_BAYES_SHORT=1` in the
# environment makes it small, and `PAC_BAYES_OUT=DIR` writes the pictures to a folder.
# `PAC_BAYES_RUN=DIR` takes the network of a run of `experiments.train` in place of the one trained
# here (Conv-4 or ResNet-10, a learner that adapts); what the text says of numbers is about ours.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import linear, pictures, pruned
from mgaug_jax import bounds, cp, data, divergences, fomaml, nets, sampler
from mgaug_jax.divergences import LAWS
from mgaug_jax.loops import run
from mgaug_jax.meta import trainer

SHORT = bool(os.environ.get("PAC_BAYES_SHORT"))
RUN = os.environ.get("PAC_BAYES_RUN")
given, omega = pruned.trained(RUN) if RUN else (None, None)
WIDTH, STEPS, TASKS = (4, 2, 4) if SHORT else (8, 200, 200)
RHOS = (0.0, 0.3) if SHORT else (0.0, 0.1, 0.3)
STDS = jnp.array([0.02, 0.05, 0.1, 0.3, 1.0])
WAY, SHOT = (given.config.way, given.config.shot) if given else (5, 1)
QUERIES, DELTA = 15, 0.1
SAMPLES = WAY * (SHOT + QUERIES)
CHANCE = 1 - 1 / WAY

# %% [markdown]
# ## The bound of one task
#
# PAC-Bayes bounds are about *stochastic* predictors: the weights are no point but a distribution,
# the **posterior** $Q$, say a Gaussian of standard deviation $\sigma$ around the weights found.
# It is compared with a **prior** $P$, which had to be written down before the samples were seen.
# McAllester: with probability $1 - \delta$ over the $m$ samples, for all $Q$ at once,
#
# $$ \text{error} \;\le\; \text{error on the samples} +
#    \sqrt{\frac{\mathrm{KL}(Q \| P) + \log (m / \delta)}{2 (m - 1)}} . $$
#
# $\mathrm{KL}(Q \| P)$, in nats, is what the samples have told the weights. With equal noise on
# both sides it is the squared distance in units of the noise, $|w - w_P|^2 / 2 \sigma^2$. So
# noise is a currency: much of it makes the divergence cheap and the predictor bad.
#
# How many nats can a task of $m$ samples afford? With $m = 80$ (5 ways, 1 shot, 15 queries) the
# square root passes 1 at about 150 nats:

# %%
nats = np.logspace(-1, 4, 60)
curves = {
    m: np.asarray(bounds.slack(jnp.asarray(nats), m, DELTA / (2 * TASKS)))
    for m in (20, 80, 400, 2000)
}
pictures.slack(nats, curves)

# %% [markdown]
# ## Theorem 1
#
# The theorem (Eq. 8 of the paper) follows from using that bound twice: within every task, and for
# the tasks themselves, which are samples of an environment. With probability $1 - \delta$
#
# $$ er(\mathcal Q) \le
#    \underbrace{\frac1T \sum_t \widehat{er}_t}_{\text{empirical}} +
#    \underbrace{\sqrt{\frac{D(\mathcal Q \| \mathcal P) + \log \frac{2T}{\delta}}
#      {2 (T - 1)}}}_{\text{environment}} +
#    \underbrace{\frac1T \sum_t \sqrt{\frac{D(\mathcal Q \| \mathcal P) +
#      \log \frac{2 T m_t}{\delta} + \frac{1 - \rho}{2} |\omega_t|^2}
#      {2 (m_t - 1)}}}_{\text{task}} $$
#
# - **empirical**: the error, on the observed tasks, of the network that is pruned *and has noise
#   of standard deviation 1 on every weight*.
# - **environment**: how well $T$ tasks stand for all. $D(\mathcal Q \| \mathcal P)$ is the
#   divergence of what is learned across tasks.
# - **task**: how well $m_t$ samples stand for a task. $\frac{1 - \rho}{2} |\omega_t|^2$ is the
#   divergence from a prior at 0 with the same noise. If each weight survives with probability
#   $1 - \rho$, only survivors are paid for: here is where pruning is said to help.
#
# ### Reservations
#
# They belong beside every number below.
#
# 1. **CP's mask is not free.** The factor $1 - \rho$ supposes one law of masks for prior and
#    posterior, blind to the task's samples. So it is for PP and WP (for WP, it is
#    $\frac12 \sum_j \Pr(j \text{ kept})\, w_j^2$). CP lets the samples choose; $k$ of $n$ weights
#    can be chosen in $\binom nk$ ways, so a valid term pays
#    $\sum_{\text{layers}} \log \binom{n}{k} + \frac12 |\text{mask} \cdot \omega_t|^2$. As printed,
#    CP's is a diagnostic and no bound: `tests/test_bounds.py` has a learner for which it fails in
#    every draw.
# 2. **The noise is part of the theorem.** The error of the network without noise is not its
#    empirical term. We take noise $\sigma$ on posterior and prior alike, choose $\sigma$ from five
#    values, and pay for the choice: each is evaluated at $\delta / 5$. The empirical term is the
#    upper end of a Monte-Carlo interval, which costs a tenth of $\delta$.
# 3. **Where is the prior?** The statement draws it from the hyper-posterior, yet centres it at 0.
#    At 0 there is nothing to learn across tasks and $D = 0$. Around the meta-parameters $\omega$
#    (our *centred* variant, closer to Amit and Meir's) a task pays $|\omega_t - \omega|^2$ instead
#    of $|\omega_t|^2$. $D = 0$ is honest here because $\omega$ was learned on other letters than
#    those that the bound is evaluated on; otherwise it is not (below).
# 4. **One sub-network, one rate**; the algorithm has three at random rates. The theorem's learner
#    adapts and then prunes, MGAug's prunes and then adapts.
# 5. **Tasks are counted once**: $T$ independent tasks, not rounds, not an optimiser's path.
# 6. **Batch norm** makes the scale of a kernel arbitrary, so its norm says little; and it lets
#    predictions depend on each other, which we prevent (fixed statistics, `experiments.pruned`).
#
# ## A trained network
#
# Conv-4 of few filters on rendered letters (`glyphs`, 5-way 1-shot), FoMAML with one
# catfish-pruned sub-network. It is meta-trained on five scripts; the bound's tasks are drawn from
# letters of seven others, and "new tasks" means further draws from those letters.

# %%
keys = jax.random.split(jax.random.key(0), 7)
k_init, k_train, k_tasks, k_reference, k_adapt, k_prune, k_judge = keys
if given:
    net, plain = given.tested.net, given.tested
    train, test = given.splits["train"], given.splits["test"]
else:
    train, test = data.load("glyphs", "train"), data.load("glyphs", "test")
    net = nets.conv4(WAY, width=WIDTH, image=(28, 28, 1))
    plain = fomaml(net, lr=0.1, steps=5)
    learner = trainer(plain if SHORT else cp(keep=0.9, subnets=1)(plain), optax.adam(3e-3))
    meta_train = jax.jit(partial(run, learner, sampler(WAY, SHOT, 5, 4), steps=STEPS))
    omega = meta_train(k_train, jax.jit(learner.init)(k_init), train)[0].params

tasks = jax.jit(sampler(WAY, SHOT, QUERIES, TASKS))(k_tasks, test)
reference = jax.jit(sampler(WAY, SHOT, 4, 1))(k_reference, train).query.x[0]
judged = pruned.fixed_norm(net, reference)
adapted = jax.jit(partial(pruned.adapt, plain, judged))(k_adapt, omega, tasks)

square = optax.tree.norm(omega.net, squared=True)
print(f"{optax.tree.size(omega.net)} weights, |omega|^2 = {square:.1f}")
print(f"error on the queries of {TASKS} tasks: {jnp.mean(adapted.held):.3f} (chance {CHANCE:.2f})")

# %% [markdown]
# Now every law of masks at every rate: the two squared norms
# $\sum_j \Pr(j \text{ kept})\, w_j^2$, of the adapted weights and of what adaptation moved, the
# price of the mask, and for each task the errors of one network for each $\sigma$, mask and noise
# drawn anew. The last column of `errors` is without noise.

# %%
drawn = jnp.append(STDS, 0.0)
judge = jax.jit(partial(pruned.judge, judged))
found, errors = {}, {}
for kind in ("wp", "pp", "cp"):
    prune = jax.jit(partial(pruned.prune, net, LAWS[kind], draws=len(drawn)))
    for rho in RHOS:
        made = prune(k_prune, omega, adapted, keep=1 - rho)
        errors[kind, rho] = judge(k_judge, adapted.weights, made.masks, tasks, drawn)
        found[kind, rho] = made._replace(masks=None)

print("rho   pruner  error without noise   |omega_t|^2   |omega_t - omega|^2   mask, nats")
for (kind, rho), row in found.items():
    norm, moved, price = map(jnp.mean, (row.norm, row.moved, row.price))
    still = errors[kind, rho][:, -1].mean()
    print(f"{rho:<5} {kind:<7} {still:<21.3f} {norm:<13.1f} {moved:<21.2f} {price:.0f}")

# %% [markdown]
# Pruning saves a part of a small number, and CP's mask costs a multiple of what it saves.
#
# ## Noise: two walls
#
# Without pruning, over the noise: to the left the network works and its divergence is out of
# reach, to the right the divergence is cheap and the network is broken. A bound needs a $\sigma$
# at which both addends are small. A prior at the meta-parameters moves the wall of divergence to
# the left, since adaptation moves weights little; not far enough. (Solid line: 1. Dotted: chance.)

# %%
whole, noisy = found["pp", 0.0], errors["pp", 0.0]


def task_terms(prior):
    """The task term without pruning, for every noise."""
    each = [bounds.task_term(0.0, whole.kl(prior, s), SAMPLES, TASKS, DELTA) for s in STDS]
    return np.array(each)


pictures.noise(
    np.asarray(STDS),
    np.asarray(noisy.mean(axis=0)[:-1]),
    float(noisy[:, -1].mean()),
    {"prior at 0": task_terms("norm"), "prior at omega": task_terms("moved")},
    CHANCE,
)

# %% [markdown]
# ## The terms over the pruning rate
#
# Three readings: as printed, with the noise of 1 that the theorem supposes; as printed with the
# best noise of the five; and centred with the best noise. The part that CP's mask adds to the
# task term is shown apart (red): leave it out and you have the printed term, which is no bound.

# %%
ALL, UNIT = jnp.arange(len(STDS)), jnp.array([len(STDS) - 1])
READINGS = {
    "prior 0, noise 1": ("norm", UNIT),
    "prior 0, best noise": ("norm", ALL),
    "centred, best noise": ("moved", ALL),
}


@partial(jax.jit, static_argnames="prior")
def theorem(errors, row, prior, columns, samples=SAMPLES):
    """Eq. 8 with the best of some columns of noise."""
    return pruned.theorem(errors[:, columns], row, prior, STDS[columns], samples, DELTA)


def parts(errors, row, prior, columns):
    """The three terms, the price of the mask apart, and where they were found."""
    best = theorem(errors, row, prior, columns)
    there = jnp.full_like(columns, jnp.argmin(jnp.abs(STDS - best.std)))
    free = theorem(errors, row._replace(price=0 * row.price), prior, there).bound.task
    heights = best.bound._asdict() | {"task": free, "mask": best.bound.task - free}
    return {name: float(height) for name, height in heights.items()}, best


panels = {}
for name, (prior, columns) in READINGS.items():
    panels[name] = {kind: [] for kind, _ in found}
    print(name)
    print("  rho   pruner bound  = empirical + environment + task (mask's)   KL, nats  noise")
    for (kind, rho), row in found.items():
        heights, best = parts(errors[kind, rho], row, prior, columns)
        panels[name][kind].append(heights)
        bound = best.bound
        print(
            f"  {rho:<5} {kind:<6} {bound.total:<6.2f} = {bound.empirical:<9.3f} + "
            f"{bound.environment:<11.3f} + {bound.task:<5.2f} ({heights['mask']:.2f})"
            f"{best.kl:15.0f}  {best.std:.2f}"
        )
pictures.terms(panels, RHOS, CHANCE)

# %% [markdown]
# Solid line: 1, above which a bound says nothing. Dotted: chance, above which it says nothing
# about learning. No bar is below either. The least bound is always at the largest noise, where the
# network is at chance: it certifies a broken network. Pruning blindly takes a few hundredths off
# the task term; CP's valid term *grows* with $\rho$, and its mask is most of the bound.
#
# ## Where it is vacuous, and why
#
# Take the mildest case, centred and without pruning, apart. Part of the bound is there even if
# nothing was learned and nothing is wrong: the logarithms of both square roots.

# %%
best = theorem(noisy, whole, "moved", ALL)
zero = theorem(0 * noisy, whole._replace(moved=0 * whole.moved), "moved", ALL)
column = jnp.argmin(jnp.abs(STDS - best.std))
still, harmed = noisy[:, -1].mean(), noisy[:, column].mean()
share = {
    "logarithms, and the Monte-Carlo interval": zero.bound.total,
    "error of the network without noise": still,
    "what noise adds to it": harmed - still,
    f"the divergence ({best.kl:.0f} nats)": best.bound.task - zero.bound.task,
}
for name, value in share.items():
    print(f"{value:6.3f}  {name}")
print(f"{best.bound.total:6.3f}  bound (its empirical term ends at 1)")

left = CHANCE - still - (zero.bound.total - zero.bound.task)
affords = 2 * (SAMPLES - 1) * jnp.square(jnp.maximum(left, 0))
affords -= jnp.log(2 * TASKS * SAMPLES * len(STDS) / (0.9 * DELTA))
print(f"\nfor a bound at chance, if noise did no harm, a task could afford {affords:.0f} nats")
for std in STDS:
    print(f"  with noise {std:.2f} it pays {whole.kl('moved', std).mean():.1f}")

# %% [markdown]
# A negative number: without any divergence at all the bound would be above chance.
#
# ### What would help? More samples per task
#
# The same network and the same errors, had they been measured on more samples. (More samples
# would also move the weights further; that is left out, in favour of the bound.) More *tasks* do
# little: they lower the environment term, which is small already, and raise $\log T$ in the task
# term.

# %%
ms = np.unique(np.logspace(1.3, 6, 80).astype(int))
most = RHOS[-1]
cases = {
    "prior 0, noise 1, whole": (noisy, whole, "norm", UNIT),
    "prior 0, best noise, whole": (noisy, whole, "norm", ALL),
    "centred, best noise, whole": (noisy, whole, "moved", ALL),
    f"centred, best noise, CP {most}": (errors["cp", most], found["cp", most], "moved", ALL),
}


def over_m(errors, row, prior, columns):
    """The bound for every m."""
    total = lambda m: theorem(errors, row, prior, columns, m).bound.total
    return np.asarray(jax.vmap(total)(jnp.asarray(ms, jnp.float32)))


needs = {name: over_m(*case) for name, case in cases.items()}
for name, values in needs.items():
    below = ms[values < CHANCE]
    print(f"{name}: below chance from m = {below[0] if len(below) else '(not up to 1e6)'}")
print(f"m = {SAMPLES}, centred, whole, the noise and the errors taken as given:")
for count in (TASKS, 10_000, 1_000_000):
    total = harmed + bounds.environment_term(0.0, count, DELTA)
    total += bounds.task_term(0.0, whole.kl("moved", best.std), SAMPLES, count, DELTA)
    print(f"  T = {count}: {total:.2f}")
pictures.need(ms, needs, SAMPLES, CHANCE)

# %% [markdown]
# ### And if $\omega$ had seen these tasks?
#
# Then what it learned has to be paid for, in both terms: $D(\mathcal Q \| \mathcal P)$ of a
# Gaussian around $\omega$ from a Gaussian around 0. Amit and Meir's code has standard deviations
# $10^{-3}$ and 100 and counts one dimension for all weights; its formula is no divergence, and a
# bound with it can fail. The exact value counts every weight. (Task term: prior at 0, unit noise,
# $\rho = 0$.)

# %%
hyper = {
    "0: fixed before the tasks": divergences.no_hyper_kl(omega.net, 1.0, 1.0),
    "exact, both standard deviations 1": divergences.gaussian_hyper_kl(omega.net, 1.0, 1.0),
    "exact, 1e-3 and 100": divergences.gaussian_hyper_kl(omega.net, 1e-3, 100.0),
    "Amit and Meir's formula (diagnostic)": divergences.released_hyper_kl(omega.net, 1e-3, 100.0),
}
print("D(Q || P)                                  nats   environment   task term")
for name, paid in hyper.items():
    environment = bounds.environment_term(paid, TASKS, DELTA)
    task = bounds.task_term(paid, whole.kl("norm", 1.0), SAMPLES, TASKS, DELTA)
    print(f"{name:<37} {paid:9.1f}   {environment:11.3f}   {task:9.2f}")

# %% [markdown]
# ## MR-MAML's bound beside it
#
# Yin et al. (2020, Theorem 1) bound the same error for the network as it is used: no noise on
# adapted weights, no pruning. Errors are counted on $K$ points per task that adaptation has *not*
# seen, so that adapted weights cost nothing, and only weights that tasks share are paid for:
#
# $$ \frac1T \sum_t \widehat{er}_t +
#    \Big(\sqrt{\tfrac{1}{2 (K - 1)}} + \sqrt{\tfrac{1}{2 (T - 1)}}\Big)
#    \sqrt{\mathrm{KL} + \log \frac{T (K + 1)}{\delta}} . $$
#
# Here the shared weights were learned on other letters, hence $\mathrm{KL} = 0$.

# %%
held = WAY * QUERIES
mr_maml = bounds.mr_maml_bound(adapted.held, 0.0, held, TASKS, DELTA)
error = adapted.held.mean()
print(f"MR-MAML: {mr_maml:.3f} = {error:.3f} empirical + {mr_maml - error:.3f}; chance {CHANCE:g}")
print(f"Theorem 1, mildest case: {best.bound.total:.3f}")

# %% [markdown]
# Held-out samples are a cheap way to certify a learner, a divergence of all adapted weights is an
# expensive one. Here MR-MAML's bound is below 1 and speaks of the network that works, although it
# is still above chance, for its logarithms on 75 points per task. Theorem 1 asks for more, an
# account of *why* a learner that has seen all samples generalises, and here it cannot give it.
#
# ## A learner for which it says something
#
# 16 weights, hyperplanes that lie near a common one, 5 % of labels flipped, $T = 1000$ tasks of
# $m = 400$ samples. The prior is MAML's initial point, learned on other tasks; divergences are a
# few nats (`python -m experiments.bound --help`). Chance is now 0.5. "Tasks alone" is McAllester's
# bound of learners without a meta-learned prior; it speaks of the tasks at hand, not of new ones.
# Intervals are over seeds.

# %%
few = linear.Problem(dim=3, steps=5, draws=40)
problem, T, M, seeds = (few, 20, 20, 1) if SHORT else (linear.Problem(), 1000, 400, 2)
rates = (0.5,) if SHORT else (0.0, 0.1, 0.5)
shown = {}
for label, pruner in (("PP", "bernoulli"), ("CP", "cp")):
    chosen = problem._replace(pruner=pruner)
    settings = ({"rho": rho, "tasks": T, "samples": M} for rho in rates)
    rows = [linear.measured(chosen, range(seeds), **setting) for setting in settings]
    shown[f"pruning rate rho, {label}"] = ("rho", rows)
    print(f"{label}: rho, bound = empirical + environment + task")
    for row in rows:
        print(
            "  {rho:<4g} {total:.3f} = {empirical:.3f} + {environment:.3f} + {task:.3f}, "
            "KL {kl:.1f}; error {error:.3f}; MR-MAML {mr_maml:.3f}; alone {alone:.3f}".format(**row)
        )
pictures.linear(shown)

# %% [markdown]
# Up to $\rho = 0.1$ the bound lies between the error and chance, so it says something. Even so:
#
# - Pruning never tightens it: at $\rho = 0.5$ blind pruning takes a hundredth off the task term and
#   adds more than a tenth to the empirical one. CP's mask costs $\log \binom{16}{2} \approx 5$ nats
#   at $\rho = 0.1$, more than all the weights, so that its task term rises.
# - What tightens it is samples and tasks (`BUILD_NOTES.md` has the numbers over $T$ and $m$), and
#   few weights that move little.
# - MR-MAML's is as tight for the whole network, and has nothing to say about pruning.
#
# So Theorem 1 is a true statement where masks are blind, and a mild one. It does not explain why
# pruning by memorisation helps a deep meta-learner: there it is above 1 whatever is done, and for
# the pruner that MGAug proposes it lacks the term that grows.

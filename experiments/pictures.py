"""Pictures of the notebook `pac_bayes`: small PNGs that a notebook shows and a script writes."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = "PAC_BAYES_OUT"
"""Environment variable: the folder that pictures are written to as well."""
COLORS = {
    "empirical": "#0072b2",
    "environment": "#56b4e9",
    "task": "#e69f00",
    "mask": "#d55e00",
}
LINES = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"))
"""Told apart by colour-blind readers, and in grey."""


class Picture(NamedTuple):
    """What a notebook shows of a cell's last line."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"a picture of {len(self.png) // 1000} kB"


def picture(name: str, figure) -> Picture:
    """The figure as a PNG of 64 colours, a third of what matplotlib makes of it."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=80, format="png")
    plt.close(figure)
    Image.open(raw).convert("RGB").quantize(64).save(small, "png", optimize=True)
    if folder := os.environ.get(FOLDER):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(small.getvalue())
    return Picture(small.getvalue())


def references(ax, chance: float) -> None:
    """Lines above which a bound says nothing, and nothing about learning."""
    ax.axhline(1, color="black", lw=0.9)
    ax.axhline(chance, color="black", lw=0.9, ls=":")


def slack(nats: np.ndarray, curves: dict[int, np.ndarray]) -> Picture:
    """What a divergence adds to the bound, for several numbers of samples."""
    figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (color, style), (samples, values) in zip(LINES, curves.items(), strict=True):
        ax.semilogx(nats, values, color=color, ls=style, label=f"m = {samples}")
    ax.axhline(1, color="black", lw=0.9)
    ax.set(xlabel="divergence of a task's posterior, nats", ylabel="task term", ylim=(0, 3))
    ax.legend()
    return picture("slack", figure)


def noise(
    stds: np.ndarray, error: np.ndarray, still: float, terms: dict[str, np.ndarray], chance: float
) -> Picture:
    """Empirical error and task terms over the noise, without pruning."""
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    ax.loglog(stds, error, "o-", color=COLORS["empirical"], label="error of the noisy network")
    ax.axhline(still, color=COLORS["empirical"], ls="--", lw=0.9, label="without noise")
    for (label, values), color in zip(terms.items(), ("#e69f00", "#cc79a7"), strict=True):
        ax.loglog(stds, values, "s-", color=color, label=f"task term, {label}")
    references(ax, chance)
    ax.set(xlabel="standard deviation of the noise", ylabel="addend of the bound")
    ax.legend(fontsize=8)
    return picture("noise", figure)


def stacked(ax, at: Sequence[float], parts: dict[str, Sequence[float]]) -> None:
    """Bars over positions 0, 1, ...; `parts` from the bottom up."""
    base = np.zeros(len(at))
    for name, heights in parts.items():
        ax.bar(range(len(at)), heights, 0.7, bottom=base, color=COLORS[name], label=name)
        base += np.asarray(heights)
    ax.set_xticks(range(len(at)), [f"{x:g}" for x in at])


def terms(
    rows: dict[str, dict[str, list[dict[str, float]]]], rhos: Sequence[float], chance: float
) -> Picture:
    """Stacked terms over rho: one row of panels per choice of prior, one column per pruner."""
    height = 2.7 * len(rows)
    kinds = list(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), len(kinds), figsize=(10, height), sharey="row", layout="constrained"
    )
    for line, (prior, by_kind) in zip(axes, rows.items(), strict=True):
        for ax, (kind, bars) in zip(line, by_kind.items(), strict=True):
            stacked(ax, rhos, {name: [bar[name] for bar in bars] for name in COLORS})
            references(ax, chance)
            ax.set_title(f"{kind.upper()}, {prior}", fontsize=9)
        line[0].set_ylabel("bound")
    for ax in axes[-1]:
        ax.set_xlabel("pruning rate rho")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=len(names), loc="outside upper center")
    return picture("terms", figure)


def need(samples: np.ndarray, curves: dict[str, np.ndarray], here: int, chance: float) -> Picture:
    """The bound over m, everything else as measured."""
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for (color, style), (label, values) in zip(LINES, curves.items(), strict=True):
        ax.semilogx(samples, values, color=color, ls=style, label=label)
    references(ax, chance)
    ax.axvline(here, color="#999999", lw=0.9, ls="--")
    ax.set(xlabel="samples per task m (dashed: measured)", ylabel="bound", ylim=(0, 3))
    ax.legend(fontsize=8)
    return picture("need", figure)


def linear(shown: dict[str, tuple[str, list[dict[str, Any]]]]) -> Picture:
    """Stacked terms of the linear learner, one panel for every `label -> (what varies, rows)`, and
    what stands beside the bound.
    """
    figure, axes = plt.subplots(
        1, len(shown), figsize=(10, 3.4), sharey=True, layout="constrained", squeeze=False
    )
    beside = {
        "error": ("o", "#000000", "error on new tasks"),
        "mr_maml": ("^", "#009e73", "MR-MAML's bound"),
        "alone": ("x", "#cc79a7", "tasks alone"),
    }
    for ax, (label, (varied, rows)) in zip(axes[0], shown.items(), strict=True):
        at = range(len(rows))
        column = lambda name, rows=rows: [row[name] for row in rows]
        stacked(ax, column(varied), {n: column(n) for n in ("empirical", "environment", "task")})
        halves = [row["intervals"]["total"] for row in rows]
        ax.errorbar(at, column("total"), halves, fmt="none", color="black", capsize=3)
        for name, (marker, color, text) in beside.items():
            ax.plot(at, column(name), marker, color=color, label=text)
        ax.axhline(0.5, color="black", lw=0.9, ls=":")
        ax.set(xlabel=label, ylim=(0, 1.2))
    axes[0, 0].set_ylabel("0-1 error (dotted: chance)")
    axes[0, -1].legend(fontsize=7, ncols=2)
    return picture("linear", figure)

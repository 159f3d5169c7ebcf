"""Pictures of runs."""

from pathlib import Path
from typing import Any

import numpy as np


def curves(records: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Loss and score over meta-steps, with the test result and what it must beat, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric = results["metric"]
    train = [record for record in records if "loss" in record]
    validation = [record for record in records if f"val_{metric}" in record]
    steps = [record["step"] for record in train]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")

    left.plot(steps, [record["query_loss"] for record in train], color="#0072b2", lw=1)
    left.set(xlabel="meta-step", ylabel="query loss after adaptation (training)")
    left.set_ylim(bottom=0)

    shown = "accuracy" if metric == "accuracy" else "query_loss"
    right.plot(
        steps, [record[shown] for record in train], color="#999999", lw=1, label="training tasks"
    )
    at = [record["step"] for record in validation]
    mean = np.array([record[f"val_{metric}"] for record in validation])
    half = np.array([record["val_half_width"] for record in validation])
    right.errorbar(at, mean, half, color="#d55e00", marker="o", ms=3, capsize=2, label="validation")
    right.plot(
        at,
        [record["val_step0"] for record in validation],
        color="#cc79a7",
        ls=":",
        label="validation, step 0",
    )
    test = results["adapted"]
    right.errorbar(
        [results["best_step"]],
        [test["mean"]],
        [test["half_width"]],
        color="#009e73",
        marker="*",
        ms=11,
        capsize=3,
        ls="none",
        label=f"test {test['mean']:.3f} ± {test['half_width']:.3f}",
    )
    lines = {"untrained": ("untrained", "-."), "pixels": ("raw-pixel nearest mean", "--")}
    for name, (label, style) in lines.items():
        if name in results:
            right.axhline(results[name]["mean"], color="black", ls=style, lw=0.8, label=label)
    if results["chance"]:
        right.axhline(results["chance"], color="black", ls=":", lw=0.8, label="chance")
        right.set_ylim(0, 1)
    right.set(xlabel="meta-step", ylabel="accuracy" if metric == "accuracy" else "squared error")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{results['config']['method']}   {results['task']}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rows(table: dict[str, dict[str, Any]], metric: str, path: Path) -> None:
    """Test score of every row of a grid, seed by seed and their mean, and the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = 1.6 + 0.3 * len(table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height), layout="constrained")
    for y, (text, found) in enumerate(table.items()):
        left.plot(found["adapted"], [y] * len(found["adapted"]), ".", color="#999999")
        left.plot([np.mean(found["adapted"])], [y], "|", ms=12, mew=2, color="#d55e00")
        at = np.linspace(0, 1, len(found["curve"]) + 1)[1:]
        right.plot(at, found["curve"], lw=1, label=text)
    left.set_yticks(range(len(table)), list(table), fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("accuracy" if metric == "accuracy" else "squared error")
    left.set_title("test, one dot per seed", fontsize=9)
    right.set(xlabel="fraction of training", ylabel="query loss (training)")
    if metric != "accuracy":
        right.set_yscale("log")
    right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)

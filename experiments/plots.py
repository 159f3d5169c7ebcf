"""Pictures of runs."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from experiments import store

POINTS = 200


def pyplot() -> Any:
    """matplotlib's, for files; loaded when it is needed, for it takes its time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(records: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Loss and score over meta-steps, with the test result and what it must beat, as a PNG."""
    plt = pyplot()
    metric = results["metric"]
    train = [record for record in records if "loss" in record]
    validation = [record for record in records if record.get(f"val_{metric}") is not None]

    def curve(name: str) -> np.ndarray:
        """Means over neighbouring steps, so many points as can be told apart."""
        values = np.array([record[name] for record in train])
        parts = np.array_split(values, min(POINTS, len(values))) if train else []
        return np.array([part.mean() for part in parts])

    steps = curve("step")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")

    left.plot(steps, curve("query_loss"), color="#0072b2", lw=1)
    left.set(xlabel="meta-step", ylabel="query loss after adaptation (training)")
    left.set_ylim(bottom=0)

    shown = "accuracy" if metric == "accuracy" else "query_loss"
    right.plot(steps, curve(shown), color="#999999", lw=1, label="training tasks")
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
    if validation and "label_memory" in validation[0]:
        memory = [record.get("label_memory", np.nan) for record in validation]
        right.plot(at, memory, color="#e69f00", ls="--", label="label memory")
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
        right.set_ylim(-0.05, 1)
    right.set(xlabel="meta-step", ylabel="accuracy" if metric == "accuracy" else "squared error")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{results['config']['method']}   {results['task']}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rows(table: dict[str, dict[str, Any]], metric: str, path: Path) -> None:
    """Test score of every row of a grid, seed by seed and their mean, and the loss curves."""
    plt = pyplot()
    height = 1.6 + 0.3 * len(table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height), layout="constrained")
    colors = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(table)))
    for y, (color, found) in enumerate(zip(colors, table.values(), strict=True)):
        left.plot(found["adapted"], [y] * len(found["adapted"]), ".", color="#999999")
        left.plot([np.mean(found["adapted"])], [y], "D", ms=5, color=color)
        at = np.linspace(0, 1, len(found["curve"]) + 1)[1:]
        right.plot(at, found["curve"], lw=1, color=color)
    left.set_yticks(range(len(table)), list(table), fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("accuracy" if metric == "accuracy" else "squared error")
    left.set_title("test: one dot per seed, their mean in the colour of the curve", fontsize=9)
    right.set(xlabel="fraction of training", ylabel="query loss (training)")
    if metric != "accuracy":
        right.set_yscale("log")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mechanism(
    rows: dict[str, dict[str, Any]], line: np.ndarray, similarity: dict[str, list], path: Path
) -> None:
    """Loss along the lines, diversity and confidence against sigma, similarity against gain."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colors = plt.colormaps["viridis"](np.linspace(0, 0.9, len(rows)))
    for color, (std, found) in zip(colors, rows.items(), strict=True):
        axes[0].plot(line, found["line"], color=color, label=f"std {std}")
    axes[0].set(xlabel="plain (0) to noisy (1) solution", ylabel="training loss, unperturbed")
    axes[0].legend(fontsize=7)
    stds = list(rows)
    for name, color in (("spread", "#0072b2"), ("entropy", "#d55e00"), ("cosine", "#009e73")):
        values = [np.mean(found[name]) for found in rows.values()]
        if np.isfinite(values).all():
            axes[1].plot(stds, values, "o-", color=color, label=name)
    axes[1].set(xlabel="std", title="at each solution, under its inner noise")
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].legend(fontsize=7)
    axes[2].plot(similarity["similarity"], similarity["gain"], ".", ms=2, color="#999999")
    axes[2].axhline(0, color="black", lw=0.6)
    axes[2].axvline(0, color="black", lw=0.6)
    axes[2].set(xlabel="cosine to the stored test gradient", ylabel="gain on that test task")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bound(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Terms of a bound, stacked, over each number that is varied, and what stands beside it."""
    plt = pyplot()
    titles = {"rho": "pruning rate rho", "tasks": "tasks T", "samples": "samples per task m"}
    terms = {"empirical": "#0072b2", "environment": "#56b4e9", "task": "#e69f00"}
    beside = {
        "error": ("o", "#000000", "error on new tasks"),
        "all_tasks": ("s", "#cc79a7", "bound, all tasks"),
        "mr_maml": ("^", "#009e73", "MR-MAML's bound"),
        "alone": ("x", "#d55e00", "tasks alone"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for ax, (name, found) in zip(axes, rows.items(), strict=True):
        at = np.arange(len(found))
        base = np.zeros(len(found))
        for term, color in terms.items():
            height = np.array([row[term] for row in found])
            ax.bar(at, height, 0.7, bottom=base, color=color, label=f"{term} term")
            base += height
        for key, (marker, color, label) in beside.items():
            ax.plot(at, [row[key] for row in found], marker, color=color, label=label)
        ax.axhline(0.5, color="#666666", lw=0.8, ls="--", label="chance")
        ax.set_xticks(at, [f"{row[name]:g}" for row in found])
        ax.set(xlabel=titles[name], ylim=(0, 1.2))
    axes[0].set_ylabel("0-1 error; above 1 says nothing")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def scaling(rows: list[dict[str, Any]], labels: dict[str, str], path: Path) -> None:
    """Time (left; throughput, that of one after another being 1, over configurations that are
    trained at once) and memory (right) of a meta-step over each size of its problem.
    """
    plt = pyplot()
    columns = min(4, len(labels))
    shape = -(-len(labels) // columns), columns
    size = (2.9 * columns, 2.6 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(labels) :]:
        axis.remove()
    for axis, (name, label) in zip(axes.flat, labels.items(), strict=False):
        of = [row for row in rows if row["axis"] == name]
        at = [row["value"] for row in of]
        gains = [row["gain"] for row in of]
        swept = None not in gains
        time = gains if swept else [row["seconds"] for row in of]
        axis.plot(at, time, "o-", color="#0072b2")
        axis.set(xlabel=label, ylim=(0, 1.1 * max(time)))
        axis.set_ylabel("relative throughput" if swept else "seconds", color="#0072b2")
        axis.tick_params(axis="y", colors="#0072b2")
        memory = axis.twinx()
        megabytes = [(row["temporary"] or 0) / 1e6 for row in of]
        memory.plot(at, megabytes, "s--", color="#d55e00")
        memory.set_ylim(0, 1.1 * max(megabytes) or 1)
        memory.set_ylabel("temporary memory, MB", color="#d55e00")
        memory.tick_params(axis="y", colors="#d55e00")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def contact(splits: dict[str, list[tuple[str, np.ndarray]]], path: Path) -> None:
    """Rows of images `uint8 [n, h, w, c]` with the names of their classes, split by split."""
    plt = pyplot()
    ratios = [len(rows) for rows in splits.values()]
    figure, axes = plt.subplots(
        len(splits),
        figsize=(10, 0.6 * sum(ratios) + 0.4 * len(splits)),
        height_ratios=ratios,
        layout="constrained",
        squeeze=False,
    )
    for axis, (split, rows) in zip(axes[:, 0], splits.items(), strict=True):
        n, h, w, c = max((images.shape for _, images in rows), key=lambda shape: shape[0])
        sheet = np.full((len(rows), n, h, w, c), 255, np.uint8)
        for row, (_, images) in zip(sheet, rows, strict=True):
            row[: len(images)] = images
        mosaic = sheet.transpose(0, 2, 1, 3, 4).reshape(len(rows) * h, n * w, c)
        axis.imshow(mosaic if c == 3 else mosaic[..., 0], cmap="gray", vmin=0, vmax=255)
        names = [name for name, _ in rows]
        # A dollar sign in a name is no formula.
        axis.set_yticks((np.arange(len(rows)) + 0.5) * h, names, fontsize=7, parse_math=False)
        axis.set_xticks([])
        axis.set_title(split, fontsize=9, loc="left")
    with warnings.catch_warnings():  # a script that the face lacks is shown as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        with store.replaced(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def sweep(rows: list[dict[str, Any]], axes: list[Any], metric: str, path: Path) -> None:
    """Validation score over each number that is varied: a dot per member, a line through the best
    mean over seeds at each of its values.
    """
    plt = pyplot()
    better = np.max if metric == "accuracy" else np.min
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"]
    size = (1 + 3.2 * len(axes), 3.4 + 0.2 * len(methods))
    figure, panels = plt.subplots(
        1, len(axes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    finite = [row for row in rows if row["stopped"] is None]
    for axis, panel in zip(axes, panels[0], strict=True):
        others = [other.name for other in axes if other.name != axis.name]
        for number, method in enumerate(methods):
            own = [row for row in finite if row["method"] == method]
            color = colors[number % len(colors)]
            values = [row[axis.name] for row in own]
            panel.plot(values, [row["validation"] for row in own], ".", color=color, alpha=0.4)
            line = {}
            for value in sorted(set(values)):
                settings: dict[tuple, list[float]] = {}
                for row in own:
                    if row[axis.name] == value:
                        point = tuple(row[name] for name in others)
                        settings.setdefault(point, []).append(row["validation"])
                line[value] = better([np.mean(scores) for scores in settings.values()])
            panel.plot(list(line), list(line.values()), "-", color=color, lw=1.2, label=method)
        if axis.log:
            panel.set_xscale("log")
        panel.set_xlabel(axis.name)
    shown = "validation accuracy" if metric == "accuracy" else "validation squared error"
    panels[0, 0].set_ylabel(shown)
    scores = [row["validation"] for row in finite] or [1.0]
    if metric != "accuracy" and max(scores) > 10 * min(scores):
        panels[0, 0].set_yscale("log")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside upper center")
    figure.savefig(path, dpi=130)
    plt.close(figure)

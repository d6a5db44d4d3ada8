"""Curves and bars: training runs, seeds with bands, variances, bias against λ."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from rlhf_lessons.plots.style import COLORS, Numbers, as_array, axes_for, concept_style, plain_log_axis, styles_for

# A metric's name in metrics.jsonl -> its axis label with units, and the concept whose colour it has.
METRICS = {
    "score": ("proxy reward", "reward"),
    "gold": ("gold reward", "gold"),
    "reward": ("shaped reward per response", "reward"),
    "eval_score": ("proxy reward, evaluation prompts", "reward"),
    "eval_gold": ("gold reward, evaluation prompts", "gold"),
    "kl": ("KL (nats per response)", "kl"),
    "eval_kl": ("KL, evaluation prompts (nats)", "kl"),
    "entropy": ("entropy (nats per token)", "policy"),
    "clip_fraction": ("clipped share of tokens", "policy"),
    "explained_variance": ("explained variance (share)", "value"),
    "response_length": ("response length (tokens)", "neutral"),
    "eval_response_length": ("length, evaluation prompts (tokens)", "neutral"),
    "ended": ("responses that ended (share)", "neutral"),
    "eval_ended": ("ended, evaluation prompts (share)", "neutral"),
    "equal_scores": ("groups of equal scores (share)", "reward"),
    "chosen_log_prob": ("better answers' log-probability (nats)", "policy"),
    "rejected_log_prob": ("worse answers' log-probability (nats)", "policy"),
    "pairs_right": ("pairs told apart (share)", "policy"),
    "loss": ("loss", "policy"),
    "policy_loss": ("policy loss", "policy"),
    "approx_kl": ("KL of one update (nats per token)", "kl"),
    "value_loss": ("value loss (reward²)", "value"),
    "grad_norm": ("gradient norm", "neutral"),
    "kl_coef": ("β (reward per nat)", "kl"),
    "learning_rate": ("learning rate", "neutral"),
    "optimizer_steps": ("optimiser steps", "neutral"),
    "first_ratio_error": ("ratio − 1 before the first step", "policy"),
}
# Rows of one run, a list of seeds, or a dict of either by label.
Runs = list[dict] | list[list[dict]] | dict[str, list]
# An interval's line is outlined in white: it has to be seen on a bar of any colour.
ERROR = {"elinewidth": 2, "path_effects": [withStroke(linewidth=5, foreground="white")]}
TRAINING_PANELS = (
    ("score", "gold"), ("kl",), ("entropy",), ("clip_fraction",), ("explained_variance",), ("eval_score", "eval_gold"),
)  # fmt: skip


def draw_line(ax: Axes, x: np.ndarray, y: np.ndarray, style: dict, label: str | None = None) -> None:
    """One curve with about eight of its markers, so that they tell curves apart without hiding them."""
    ax.plot(x, y, markevery=max(1, len(x) // 8), label=label, **style)


def draw_band(ax: Axes, x: np.ndarray, seeds: np.ndarray, style: dict, label: str | None, band: str) -> None:
    """The mean over seeds (K, N) and, for more than one seed, from minimum to maximum or ± one standard deviation."""
    mean, sd = seeds.mean(axis=0), seeds.std(axis=0)
    bounds = {"minmax": (seeds.min(axis=0), seeds.max(axis=0)), "sd": (mean - sd, mean + sd)}
    if band not in bounds:
        raise ValueError(f'band must be "minmax" or "sd"; got {band!r}')
    draw_line(ax, x, mean, style, label)
    if len(seeds) > 1:
        ax.fill_between(x, *bounds[band], color=style["color"], alpha=0.2, linewidth=0)


def curve(
    x: Numbers,
    ys: dict[str, Numbers],
    *,
    xlabel: str,
    ylabel: str,
    concepts: dict[str, str] | None = None,
    xscale: str = "linear",
    yscale: str = "linear",
    ax: Axes | None = None,
) -> Figure:
    """Curves ys[label] (N,) over x (N,). A label that names a concept has its colour; `concepts` maps others to one."""
    x = as_array("x", x, ndim=1)
    if not ys:
        raise ValueError("ys must hold at least one curve; got none")
    figure, ax = axes_for(ax)
    styles = styles_for(list(ys), concepts)
    for label, y in ys.items():
        draw_line(ax, x, as_array(f"ys[{label!r}]", y, ndim=1, length=len(x)), styles[label], label)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    for axis, scale in ((ax.xaxis, xscale), (ax.yaxis, yscale)):
        if scale == "log":
            plain_log_axis(axis)
    if len(ys) > 1:
        ax.legend()
    return figure


def learning_curves(
    curves: dict[str, Numbers],
    *,
    x: Numbers | None = None,
    xlabel: str = "iteration",
    ylabel: str = "return",
    band: str = "minmax",
    of: str = "seeds",
    concepts: dict[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Mean over seeds with a band: curves[label] (seeds, N); band "minmax" or "sd" (one standard deviation).

    of: what the legend counts, where the rows are no seeds.
    """
    if not curves:
        raise ValueError("curves must hold at least one; got none")
    figure, ax = axes_for(ax)
    styles = styles_for(list(curves), concepts)
    for label, seeds in curves.items():
        seeds = as_array(f"curves[{label!r}]", seeds, ndim=2)
        steps = np.arange(1, seeds.shape[1] + 1) if x is None else as_array("x", x, ndim=1, length=seeds.shape[1])
        draw_band(ax, steps, seeds, styles[label], f"{label} ({len(seeds)} {of})", band)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return figure


def runs_by_label(runs: Runs) -> dict[str, list[list[dict]]]:
    """Rows of one run, a list of seeds, or a dict of either by label -> label -> seeds, each a list of metric dicts."""
    runs = runs if isinstance(runs, dict) else {"": runs}
    seeds = {str(label): [run] if run and isinstance(run[0], dict) else list(run) for label, run in runs.items()}
    for label, group in seeds.items():
        if not group or not all(rows and all(isinstance(row, dict) for row in rows) for rows in group):
            raise ValueError(f"runs must be lists of metric dicts, none empty; got something else in run {label!r}")
    if not seeds:
        raise ValueError("runs must hold at least one run; got none")
    return seeds


def metric_series(seeds: list[list[dict]], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A metric over iterations: x (N,) and values (seeds, N) where every seed has it; None where none has any.

    Rows are numbered by their "iteration" or, without one, from 1. Rows without the metric (or with None) are skipped.
    """
    tables = [
        {row.get("iteration", i): row[name] for i, row in enumerate(rows, start=1) if row.get(name) is not None}
        for rows in seeds
    ]
    shared = sorted(set.intersection(*map(set, tables)))
    if not shared:
        return None
    return np.array(shared), np.array([[table[i] for i in shared] for table in tables], dtype=np.float64)


def training_curves(runs: Runs, *, metrics: Sequence[str] | None = None, band: str = "minmax") -> Figure:
    """A grid of a run's metrics over its iterations: proxy and gold reward, KL, entropy, clip fraction, critic.

    runs: the rows of `metrics.jsonl`; or a list of such lists, one per seed, drawn as mean and band; or a dict of
    either by label. metrics: other ones, a panel each. One run is drawn in its metrics' colours, several in a colour
    each. Panels without data are left out. Raises ValueError when none is left, or a run is empty.
    """
    runs = runs_by_label(runs)
    panels = TRAINING_PANELS if metrics is None else [(name,) for name in metrics]
    if len(runs) > 1:
        panels = [(name,) for panel in panels for name in panel]
    series = {
        (label, name): metric_series(seeds, name) for label, seeds in runs.items() for panel in panels for name in panel
    }
    panels = [panel for panel in panels if any(series[label, name] for label in runs for name in panel)]
    if not panels:
        raise ValueError("metrics must name at least one that a run has; got none")
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    figure, grid = panel_grid(len(panels), columns)
    styles = styles_for(list(runs)) if len(runs) > 1 else {}
    for ax, panel in zip(grid, panels, strict=True):
        for label, name in ((label, name) for label in runs for name in panel if series[label, name]):
            axis_label, concept = METRICS.get(name, (name.replace("_", " "), "neutral"))
            style = styles.get(label) or concept_style(concept)
            draw_band(ax, *series[label, name], style, label or axis_label, band)
        ax.set(xlabel="iteration", ylabel="reward" if len(panel) > 1 else axis_label)
        if len(panel) > 1:
            ax.legend()
    if len(runs) > 1:
        grid[0].legend()
    return figure


def panel_grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """`count` axes in rows of `columns`; what is left over of the last row stays empty."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.7 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[count:]:
        figure.delaxes(ax)
    return figure, list(axes.flat[:count])


def proxy_and_gold(runs: Runs, *, band: str = "minmax") -> Figure:
    """Proxy and gold reward over the iterations, in their colours: a panel per run, named above it.

    Each panel has a scale of its own, for a collapse would press every other curve flat. runs: as in `training_curves`,
    with `score` and `gold`. Raises ValueError for a run without one of them.
    """
    runs = runs_by_label(runs)
    size = (0.8 + 4.0 * len(runs), 3.7)
    figure, axes = plt.subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    for ax, (label, seeds) in zip(axes.flat, runs.items(), strict=True):
        for name in ("score", "gold"):
            measured = metric_series(seeds, name)
            if measured is None:
                raise ValueError(f"runs must have rows with {name!r}; got none in run {label!r}")
            axis_label, concept = METRICS[name]
            draw_band(ax, *measured, concept_style(concept), axis_label, band)
        ax.set(xlabel="iteration", title=label)
    axes[0, 0].set_ylabel("reward")
    axes[0, 0].legend()
    return figure


def draw_cloud(ax: Axes, x: np.ndarray, y: np.ndarray, style: dict, label: str) -> None:
    """A small point per iteration and seed, x and y (N, seeds), and a large one where each seed ends."""
    look = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
    ax.plot(x, y, markersize=3, alpha=0.35, **look)
    ax.plot(x[-1], y[-1], markersize=9, markeredgecolor="white", label=label, zorder=5, **look)


def overoptimisation(
    runs: Runs, *, x: str = "sqrt_kl", band: str = "minmax", rewards: Sequence[str] = ("score", "gold")
) -> Figure:
    """Proxy against gold reward, as the policy moves away from the reference.

    runs: as in `training_curves`, with `score`, `gold` and `kl`, labelled by β. x: "sqrt_kl" or "iteration". Over √KL
    several seeds are a cloud, a small point per iteration and a large one where each ends. One run: both rewards on one
    pair of axes. Several: proxy left, gold right, each on its own scale, or the one of them that `rewards` names.
    Raises ValueError for another x or a missing metric.
    Source: Gao et al. 2023, "Scaling laws for reward model overoptimization", Fig. 1.
    """
    if x not in ("sqrt_kl", "iteration"):
        raise ValueError(f'x must be "sqrt_kl" or "iteration"; got {x!r}')
    runs = runs_by_label(runs)
    several = len(runs) > 1
    columns = len(rewards) if several else 1
    size = (9.0, 3.9) if columns > 1 else (5.6, 3.8)
    figure, axes = plt.subplots(1, columns, figsize=size, sharex=True, layout="constrained", squeeze=False)
    panels = dict(zip(rewards, axes.flat if several else [axes[0, 0]] * len(rewards), strict=True))
    styles = styles_for(list(runs)) if several else {}
    for label, seeds in runs.items():
        for name, ax in panels.items():
            measured = metric_series([[row for row in rows if row.get("kl") is not None] for rows in seeds], name)
            if measured is None:
                raise ValueError(f"runs must have rows with {name!r} and 'kl'; got none in run {label!r}")
            axis, concept = METRICS[name]
            steps, values = measured
            style, name_shown = styles.get(label) or concept_style(concept), label if several else axis
            if x == "sqrt_kl":
                kl = dict(zip(*[a.T.tolist() for a in metric_series(seeds, "kl")], strict=True))
                steps = np.sqrt(np.clip([kl[i] for i in steps], 0, None))  # (N, seeds)
            if x == "sqrt_kl" and len(seeds) > 1:
                draw_cloud(ax, steps, values.T, style, name_shown)
            else:
                draw_band(ax, steps.reshape(len(steps)), values, style, name_shown, band)
            ax.set_ylabel(axis if several else "reward")
    for ax in axes.flat:
        ax.set_xlabel("√KL to reference (√nats)" if x == "sqrt_kl" else "iteration")
    axes[0, 0].legend()
    return figure


def bars(
    values: dict,
    *,
    xlabel: str,
    xscale: str = "linear",
    concepts: dict[str, str] | None = None,
    errors: dict | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Horizontal bars with their numbers: values[label] a number, or a dict of numbers (a group of bars, with legend).

    errors: half-widths of intervals by label, for bars that are not grouped.
    """
    if not values:
        raise ValueError("values must hold at least one bar; got none")
    grouped = [isinstance(value, dict) for value in values.values()]
    if any(grouped) and not all(grouped):
        raise ValueError("values must be numbers or dicts of numbers; got both")
    groups = values if all(grouped) else {label: {"": value} for label, value in values.items()}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    styles = styles_for(names if all(grouped) else list(values), concepts)
    figure, ax = axes_for(ax, figsize=(6.4, 0.9 + 0.42 * len(groups) * max(1.0, 0.7 * len(names))))
    for i, name in enumerate(names):
        labels = [label for label, group in groups.items() if name in group]
        numbers = as_array("values", [groups[label][name] for label in labels])
        if xscale == "log" and not (numbers > 0).all():
            raise ValueError(f"values must be positive on a log axis; got {numbers.min():g}")
        height = 0.74 / len(names)
        places = [list(groups).index(label) + (i - (len(names) - 1) / 2) * height for label in labels]
        color = styles[name]["color"] if all(grouped) else bar_colors(labels, concepts)
        error = None if errors is None else [errors.get(label, 0.0) for label in labels]
        hatch = ("", "///", "...", "xx")[i % 4]
        drawn = ax.barh(
            places, numbers, height, color=color, xerr=error, label=name, hatch=hatch, edgecolor="white", error_kw=ERROR
        )
        ax.bar_label(drawn, fmt="{:.3g}", padding=4, fontsize=9)
    ax.set(xlabel=xlabel, xscale=xscale, yticks=range(len(groups)), yticklabels=list(groups))
    ax.margins(x=0.14)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if xscale == "log":
        plain_log_axis(ax.xaxis)
    if all(grouped):
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names))
    return figure


def bar_colors(labels: list[str], concepts: dict[str, str] | None) -> list[str]:
    """Single bars are named at their side: a concept's has its colour, any other is neutral."""
    named = {label: label for label in labels if label in COLORS} | (concepts or {})
    return [concept_style(named.get(label, "neutral"))["color"] for label in labels]


def variance_ranking(
    variances: dict[str, float],
    *,
    xlabel: str = "variance of the gradient estimate (log scale)",
    ax: Axes | None = None,
) -> Figure:
    """Estimators ranked by variance, the smallest on top: a dot each with its number.

    On the log axis equal distances are equal factors; it has no zero, from which a bar could start.
    """
    numbers = as_array("variances", list(variances.values()))
    if not (numbers > 0).all():
        raise ValueError(f"variances must be positive on a log axis; got {numbers.min():g}")
    order = np.argsort(numbers, kind="stable")
    figure, ax = axes_for(ax, figsize=(6.4, 0.9 + 0.42 * len(order)))
    ax.plot(numbers[order], range(len(order)), "o", markersize=9, color=COLORS["neutral"])
    for place, i in enumerate(order):
        number = f"{numbers[i]:.3g}"
        ax.annotate(number, (numbers[i], place), (9, 0), textcoords="offset points", va="center", fontsize=9)
    names = [list(variances)[i] for i in order]
    ax.set(xlabel=xlabel, xscale="log", yticks=range(len(order)), yticklabels=names, ylim=(len(order) - 0.5, -0.5))
    ax.margins(x=0.14)
    plain_log_axis(ax.xaxis)
    return figure


def bias_variance(
    lam: Numbers,
    squared_bias: Numbers,
    variance: Numbers,
    *,
    ylabel: str = "squared error of the advantage",
    ax: Axes | None = None,
) -> Figure:
    """Squared bias, variance and their sum, the mean squared error, over λ; its minimum is marked. All (N,)."""
    lam = as_array("lam", lam, ndim=1)
    squared_bias = as_array("squared_bias", squared_bias, ndim=1, length=len(lam))
    variance = as_array("variance", variance, ndim=1, length=len(lam))
    error = squared_bias + variance
    concepts = {"squared bias": "value", "variance": "neutral", "mean squared error": "advantage"}
    ys = dict(zip(concepts, (squared_bias, variance, error), strict=True))
    figure = curve(lam, ys, xlabel="λ", ylabel=ylabel, concepts=concepts, ax=ax)
    ax = ax or figure.axes[0]
    best = int(error.argmin())
    ax.plot(lam[best], error[best], "*", markersize=14, color=COLORS["advantage"], zorder=5)
    ax.plot([], [], "*", markersize=11, color=COLORS["advantage"], label=f"smallest at λ = {lam[best]:.2g}")
    ax.set_ylim(bottom=0)
    ax.legend()
    return figure


def ess_against_kl(
    kl: Numbers,
    ess: Numbers | dict[str, Numbers],
    *,
    num_samples: int,
    concepts: dict[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Share of the samples that is left, N_eff / N, over the KL between both policies: ess (K,), or a dict of them."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    curves = ess if isinstance(ess, dict) else {"policy": ess}
    shares = {label: as_array("ess", values) / num_samples for label, values in curves.items()}
    figure = curve(
        kl,
        shares,
        xlabel="KL between sampling and trained policy (nats)",
        ylabel="effective share of the samples",
        concepts=concepts,
        ax=ax,
    )
    (ax or figure.axes[0]).set_ylim(0, 1.05)
    return figure

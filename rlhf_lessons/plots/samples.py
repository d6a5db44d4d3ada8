"""Many samples in one picture: importance weights, scores against gold, calibration, ratings beside comparisons.

Imported from `plots`, whose rules hold: plain input, a Figure back, labelled axes, one colour per concept.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_lessons.importance import effective_sample_size
from rlhf_lessons.plots.style import COLORS, Numbers, as_array, axes_for, concept_style, plain_log_axis, styles_for
from rlhf_lessons.preferences import preference_probability


def weight_histogram(weights: Numbers | dict[str, Numbers], *, bins: int = 40, ax: Axes | None = None) -> Figure:
    """Importance weights (N,), or a dict of them, on a log axis: shares, and how many equal samples they are worth.

    Weights of 0 are counted in the label. Raises ValueError for negative ones, or when none is positive.
    """
    groups = {
        label: as_array("weights", w).ravel()
        for label, w in (weights if isinstance(weights, dict) else {"": weights}).items()
    }
    together = np.concatenate(list(groups.values())) if groups else np.zeros(1)
    if not np.isfinite(together).all() or (together < 0).any() or not all((w > 0).any() for w in groups.values()):
        raise ValueError(f"weights must be finite, not negative and not all 0; got {together.tolist()!s:.80}")
    low, high = together[together > 0].min() / 1.01, together.max() * 1.01
    edges = np.geomspace(low, high, bins + 1)
    figure, ax = axes_for(ax)
    styles = styles_for(list(groups), {"": "policy"} if "" in groups else None)
    for label, w in groups.items():
        text = f"{label}: " if label else ""
        text += f"worth {effective_sample_size(torch.from_numpy(w)):.0f} of {len(w)}"
        text += f", {(w == 0).sum()} are 0" if (w == 0).any() else ""
        style = {"color": styles[label]["color"], "linestyle": styles[label]["linestyle"]}
        share = np.full(len(w), 1 / len(w))
        ax.hist(w, edges, weights=share, histtype="stepfilled", alpha=0.15, color=style["color"])
        ax.hist(w, edges, weights=share, histtype="step", linewidth=2, label=text, **style)
    ax.axvline(1, color=COLORS["neutral"], linestyle=":")
    ax.set(xscale="log", xlabel="importance weight π / π_old (log scale)", ylabel="share of the samples")
    plain_log_axis(ax.xaxis)
    ax.legend()
    return figure


def scatter(
    x: Numbers,
    y: Numbers,
    *,
    xlabel: str,
    ylabel: str,
    concept: str = "neutral",
    diagonal: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Points x (N,), y (N,), with their correlation in the legend; `diagonal` adds the line y = x."""
    x = as_array("x", x, ndim=1)
    y = as_array("y", y, ndim=1, length=len(x))
    style = concept_style(concept)
    figure, ax = axes_for(ax, figsize=(4.8, 4.2))
    varied = x.std() > 0 and y.std() > 0
    label = f"correlation {np.corrcoef(x, y)[0, 1]:.2f}, N = {len(x)}" if varied else f"N = {len(x)}"
    ax.scatter(x, y, s=16, alpha=0.5, color=style["color"], marker=style["marker"], linewidths=0, label=label)
    if diagonal:
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        ax.plot(ends, ends, color=COLORS["neutral"], linestyle=":", label="y = x")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return figure


def reward_against_gold(reward: Numbers, gold: Numbers, *, ax: Axes | None = None) -> Figure:
    """What the reward model says against the gold reward, a point per response. reward, gold (N,)."""
    return scatter(
        as_array("gold", gold, ndim=1),
        as_array("reward", reward, ndim=1),
        xlabel="gold reward",
        ylabel="reward model's score",
        concept="reward",
        ax=ax,
    )


def draw_shares(ax: Axes, x: np.ndarray, hits: np.ndarray, edges: np.ndarray, style: dict, label: str) -> None:
    """Share of hits (N,) among the points x (N,) of each bin, ± one binomial standard error, at the bin's mean x."""
    bin_of = np.clip(np.digitize(x, edges) - 1, 0, len(edges) - 2)
    filled = np.unique(bin_of)
    count = np.array([(bin_of == i).sum() for i in filled])
    share = np.array([hits[bin_of == i].mean() for i in filled])
    centre = np.array([x[bin_of == i].mean() for i in filled])
    error = np.sqrt(share * (1 - share) / count)
    ax.errorbar(centre, share, yerr=error, capsize=3, label=label, **{**style, "linestyle": "none"})


def calibration(predicted: Numbers, outcomes: Numbers, *, bins: int = 10, ax: Axes | None = None) -> Figure:
    """How often the preferred answer won, among the pairs for which the model gave that probability.

    predicted (N,) in [0, 1], outcomes (N,) 0 or 1. Bins of equal width; bars are ± one standard error of the share.
    """
    predicted = as_array("predicted", predicted, ndim=1)
    outcomes = as_array("outcomes", outcomes, ndim=1, length=len(predicted))
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError(f"predicted must be probabilities; got {predicted.min():g} to {predicted.max():g}")
    if not np.isin(outcomes, (0, 1)).all():
        raise ValueError(f"outcomes must be 0 or 1; got {outcomes.tolist()!s:.80}")
    figure, ax = axes_for(ax, figsize=(4.8, 4.2))
    ax.plot([0, 1], [0, 1], color=COLORS["neutral"], linestyle=":", label="perfectly calibrated")
    label = f"reward model, {len(predicted)} pairs"
    draw_shares(ax, predicted, outcomes, np.linspace(0, 1, bins + 1), concept_style("reward"), label)
    ax.set(xlabel="predicted P(a ≻ b)", ylabel="observed share of a chosen", xlim=(0, 1), ylim=(-0.02, 1.02))
    ax.legend()
    return figure


def ratings_and_comparisons(
    gold: Numbers,
    ratings: Numbers,
    margins: Numbers,
    a_chosen: Numbers,
    *,
    temperature: float | None = None,
    bins: int = 12,
) -> Figure:
    """Left: each annotator's ratings on a private scale. Right: the same annotators' comparisons, on one common curve.

    gold (B,) and ratings (A, B); margins (N,), gold of a minus gold of b, and a_chosen (N,) 0 or 1. With `temperature`
    the curve σ(margin / temperature) is drawn, which Bradley–Terry annotators follow.
    """
    gold = as_array("gold", gold, ndim=1)
    ratings = as_array("ratings", ratings, ndim=2)
    as_array("each row of ratings", ratings[0], length=len(gold))
    margins = as_array("margins", margins, ndim=1)
    chosen = as_array("a_chosen", a_chosen, ndim=1, length=len(margins))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.9), layout="constrained")
    labels = [f"annotator {i}" for i in range(1, len(ratings) + 1)]
    for label, style, row in zip(labels, styles_for(labels).values(), ratings, strict=True):
        left.plot(gold, row, label=label, alpha=0.75, **{**style, "linestyle": "none", "markersize": 4})
    left.set(xlabel="gold reward", ylabel="rating (points, private scale)")
    left.legend(markerscale=1.6)
    edges = np.linspace(margins.min(), margins.max() + 1e-9, bins + 1)
    if temperature is not None:
        line = np.linspace(margins.min(), margins.max(), 200)
        label = f"σ(margin / {temperature:g})"
        chance = preference_probability(torch.from_numpy(line / temperature), torch.zeros(200, dtype=torch.float64))
        right.plot(line, chance, color=COLORS["neutral"], linestyle=":", label=label)
    draw_shares(right, margins, chosen, edges, concept_style("gold"), f"{len(margins)} comparisons")
    right.set(xlabel="gold reward of a minus that of b", ylabel="share of a chosen", ylim=(-0.03, 1.03))
    right.legend(loc="upper left")
    return figure

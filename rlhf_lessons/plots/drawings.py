"""Pictures that are not curves: tokens, a tree of continuations, PPO's clip, the four models.

Imported from `plots`, whose rules hold: plain input, a Figure back, labelled axes, one colour per concept.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from rlhf_lessons.display import visible
from rlhf_lessons.plots.style import COLORS, as_array, axes_for, cell_color, cell_text, ink, signed_scale
from rlhf_lessons.ppo import check_clip, policy_terms

CENTERS = {"ratio": 1.0}  # the value that is white; 0 for all other quantities


# ---- tokens ----------------------------------------------------------------------------


def token_view(
    tokens: list[str],
    quantities: dict[str, list],
    *,
    centers: dict[str, float] | None = None,
    per_line: int = 12,
    digits: int = 2,
) -> Figure:
    """A text token by token, with a row of coloured numbers beneath it for each quantity.

    quantities[name] (T,), a number per token; NaN leaves a cell empty. Red is below the centre, blue above; the centre
    is 0, for "ratio" 1, or as in `centers`. Each quantity has its own scale. Long texts go on in further lines.
    """
    if not tokens or not quantities:
        raise ValueError(f"tokens and quantities must hold at least one; got {len(tokens)} and {len(quantities)}")
    if per_line < 1:
        raise ValueError(f"per_line must be at least 1; got {per_line}")
    rows = {name: as_array(name, values, ndim=1, length=len(tokens)) for name, values in quantities.items()}
    lines = -(-len(tokens) // per_line)
    width = min(len(tokens), per_line)
    cell = min(1.1, max(0.78, 0.09 * max(len(token) for token in tokens)))  # inches
    size = (1.4 + cell * width, lines * (0.62 + 0.36 * len(rows)) + 0.3)
    figure, axes = plt.subplots(lines, 1, figsize=size, layout="constrained", squeeze=False)
    for line, ax in enumerate(axes.flat):
        part = slice(line * per_line, (line + 1) * per_line)
        for i, (name, values) in enumerate(rows.items()):
            scale = signed_scale(values, {**CENTERS, **(centers or {})}.get(name, 0.0))
            draw_cells(ax, values[part], row=i, scale=scale, digits=digits)
        label_tokens(ax, tokens[part], list(rows), width, first=part.start)
    axes.flat[-1].set_xlabel("position t in the text", loc="left")
    return figure


def draw_cells(ax: Axes, values: np.ndarray, *, row: int, scale: Normalize, digits: int) -> None:
    for j, value in enumerate(values):
        color = cell_color(value, scale)
        ax.add_patch(Rectangle((j, row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
        if np.isfinite(value):
            text = cell_text(value, digits)
            ax.text(j + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=ink(color))


def label_tokens(ax: Axes, tokens: list[str], names: list[str], width: int, first: int) -> None:
    """Tokens on top, their positions beneath, quantities at the side."""
    ax.set(xlim=(0, width), ylim=(len(names), 0), yticks=np.arange(len(names)) + 0.5, yticklabels=names)
    ax.set_xticks(np.arange(len(tokens)) + 0.5, [str(first + j) for j in range(len(tokens))], fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for j, token in enumerate(map(visible, tokens)):
        size = 10 if len(token) <= 10 else max(7.0, 115 / len(token))
        ax.text(j + 0.5, -0.12, token, ha="center", va="bottom", fontsize=size, fontweight="bold", parse_math=False)


# ---- a prompt's tree of continuations --------------------------------------------------


def decision_tree(
    table: dict[tuple[str, ...], dict[str, float]],
    *,
    prompt: str = "prompt",
    chosen: tuple[str, ...] = (),
    ax: Axes | None = None,
) -> Figure:
    """States, actions and probabilities: each prefix of the response branches into its next tokens.

    table: prefix (a tuple of tokens, () for the prompt alone) -> next token -> probability. Where they sum to less
    than 1, the rest is drawn as one grey branch "others". `chosen` is a path to mark. Raises ValueError for a
    probability out of range, a sum above 1, or a prefix that no branch leads to.
    """
    if () not in table:
        raise ValueError(f"table must have the prefix () for the prompt; got {list(table)}")
    reachable = {()} | {prefix + (token,) for prefix, branches in table.items() for token in branches}
    for prefix, branches in table.items():
        if prefix not in reachable:
            raise ValueError(f"table must have a branch to every prefix; got none to {prefix!r}")
        if min(branches.values(), default=-1) < 0 or sum(branches.values()) > 1 + 1e-4:
            raise ValueError(f"table[{prefix!r}] must be probabilities that sum to at most 1; got {branches!r}")
    if chosen and chosen not in reachable:
        raise ValueError(f"chosen must be a path of the table; got {chosen!r}")
    edges, places, leaves = [], {}, []
    place_subtree((), table, edges, places, leaves)
    depth = 1 + max(len(path) for path in places)
    figure, ax = axes_for(ax, figsize=(max(5.0, 2.1 * depth), 0.9 + 0.42 * len(leaves)))
    for path, probability in edges:
        draw_branch(ax, places[path[:-1]], places[path], probability, is_chosen=path == chosen[: len(path)])
    for path, (x, y) in places.items():
        draw_state(ax, x, y, path[-1] if path else prompt, is_chosen=path == chosen[: len(path)] and bool(chosen))
    ax.set(xlim=(-0.45, depth - 0.6), ylim=(len(leaves) - 0.3, -0.7), yticks=[])
    ax.set_xticks(range(depth), ["prompt", *[f"token {i}" for i in range(1, depth)]])
    ax.set_xlabel("time step (on the branches: probability of the token)")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return figure


OTHERS = None  # stands in a path for all tokens that the table does not list


def place_subtree(path: tuple, table: dict, edges: list, places: dict, leaves: list) -> float:
    """Give every state its place (depth, height): leaves one below the other, a parent amid its children."""
    branches = dict(table.get(path, {}))
    rest = 1 - sum(branches.values())
    if branches and rest > 5e-3:
        branches[OTHERS] = rest
    if not branches:
        leaves.append(path)
        height = len(leaves) - 1.0
    else:
        edges += [(path + (token,), probability) for token, probability in branches.items()]
        heights = [place_subtree(path + (token,), table, edges, places, leaves) for token in branches]
        height = (heights[0] + heights[-1]) / 2
    places[path] = (len(path), height)
    return height


def draw_branch(ax: Axes, start: tuple, end: tuple, probability: float, *, is_chosen: bool) -> None:
    """An edge, thicker for a likelier token, with its probability."""
    color = COLORS["policy"] if is_chosen else COLORS["neutral"]
    style = {"color": color, "linewidth": 0.8 + 5 * probability, "alpha": 1.0 if is_chosen else 0.5}
    ax.plot(*zip(start, end, strict=True), solid_capstyle="butt", zorder=1, **style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    at = 0.6  # nearer to the child, where branches lie apart
    place = (start[0] + at * (end[0] - start[0]), start[1] + at * (end[1] - start[1]))
    ax.text(*place, f"{probability:.2f}", ha="center", va="center", fontsize=9, color=color, bbox=box, zorder=2)


def draw_state(ax: Axes, x: float, y: float, token: str | None, *, is_chosen: bool) -> None:
    is_others = token is OTHERS
    edge = COLORS["policy"] if is_chosen else "none" if is_others else "#BDBDBD"
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": edge, "linewidth": 2 if is_chosen else 1}
    look = {"color": COLORS["neutral"], "style": "italic"} if is_others else {"color": "black"}
    text = "others" if is_others else visible(token)
    ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box, zorder=3, parse_math=False, **look)


# ---- PPO's clip ------------------------------------------------------------------------


def clip_regions(clip_eps: float = 0.2) -> Figure:
    """One token's clipped objective and its derivative over the ratio: A > 0 left, A < 0 right, six regions in all.

    Computed by `ppo.policy_terms` and autograd. Raises ValueError for clip_eps outside (0, 1).
    Source: Schulman et al. 2017, "Proximal policy optimization algorithms", Fig. 1.
    """
    check_clip(clip_eps)
    if clip_eps >= 1:
        raise ValueError(f"clip_eps must be below 1; got {clip_eps}")
    low, high = 1 - clip_eps, 1 + clip_eps
    edges = (max(1 - 3 * clip_eps, low / 4), low, high, 1 + 3 * clip_eps)
    figure, axes = plt.subplots(2, 2, figsize=(9.4, 5.6), sharex=True, sharey="row", layout="constrained")
    for column, advantage in enumerate((1.0, -1.0)):
        top, bottom = axes[:, column]
        for i in range(3):
            ratio, objective, slope = clipped_objective(edges[i], edges[i + 1], advantage, clip_eps)
            top.plot(ratio, objective, color=COLORS["policy"], linewidth=2.5, label="clipped objective" * (i == 0))
            top.plot(ratio, ratio * advantage, color=COLORS["neutral"], linestyle=":", label="ρ·A" * (i == 0))
            bottom.plot(ratio, slope, color=COLORS["policy"], linewidth=2.5)
            is_flat = not slope.any()
            middle = (edges[i] + edges[i + 1]) / 2
            text = f"{1 + i + 3 * column}" + ("\nno gradient" if is_flat else "")
            style = {"ha": "center", "va": "top", "fontsize": 10, "fontweight": "bold" if is_flat else "normal"}
            for ax in (top, bottom):
                ax.text(middle, 0.97, text, transform=ax.get_xaxis_transform(), **style)
                if is_flat:
                    ax.axvspan(edges[i], edges[i + 1], facecolor="#EDEDED", hatch="//", edgecolor="white", zorder=0)
        for ax in (top, bottom):
            for bound in (low, high):
                ax.axvline(bound, color=COLORS["neutral"], linewidth=1, linestyle="--")
        top.set_title("A > 0: the token was better than expected" if advantage > 0 else "A < 0: worse than expected")
        bottom.set_xlabel("ratio ρ = π / π_old")
        bottom.set_xticks([edges[0], low, 1, high, edges[3]], [f"{edges[0]:.2g}", "1−ε", "1", "1+ε", f"{edges[3]:.2g}"])
    axes[0, 0].set(ylabel="objective min(ρA, clip(ρ)A)\n(|A| = 1)", ylim=(-edges[3] - 0.4, edges[3] + 0.8))
    axes[0, 0].legend(loc="lower left")
    axes[1, 0].set(ylabel="its derivative by ρ\n(|A| = 1)", ylim=(-1.5, 1.9))
    return figure


def clipped_objective(start: float, end: float, advantage: float, clip_eps: float) -> tuple[np.ndarray, ...]:
    """Ratio, objective and its derivative inside one region, whose ends (where there is a kink) are left out."""
    ratio = torch.linspace(start, end, 102, dtype=torch.float64)[1:-1].requires_grad_()
    terms = policy_terms(ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, advantage), clip_eps)
    objective = -torch.max(*terms)
    (slope,) = torch.autograd.grad(objective.sum(), ratio)
    return ratio.detach().numpy(), objective.detach().numpy(), slope.numpy()


# ---- the four models -------------------------------------------------------------------

MODELS = {  # concept -> title, what it computes, who trains it, its lower left corner
    "policy": ("policy (actor)", "tokens → logits (B, T, V)", "trained by the policy loss", (17, 23)),
    "value": ("critic", "tokens → values (B, T)", "trained by the value loss", (63, 42)),
    "reference": ("reference", "tokens → log π_ref (B, T)", "frozen, only scores", (63, 23)),
    "reward": ("reward model", "tokens → scores (B,)", "frozen, only scores", (63, 4)),
}
BATCH = (  # what flows between the models: text, lower left corner, width, height
    ("prompts\n(B, P)", (0, 25), 12, 9),
    ("tokens\n(B, P+T)\nlog π (B, T)", (46, 24), 13, 11),
    ("rewards (B, T)\n−β(log π − log π_ref)\n+ score at the end", (94, 13), 20, 13),
    ("advantages,\nreturns (B, T)", (94, 43.5), 20, 10),
)
ARROWS = (  # corners of each arrow's way
    ((12.5, 29.5), (16.5, 29.5)),
    ((42.5, 29.5), (45.5, 29.5)),
    ((59.5, 29.5), (62.5, 29.5)),
    ((52.5, 35.5), (52.5, 48.5), (62.5, 48.5)),
    ((52.5, 23.5), (52.5, 10.5), (62.5, 10.5)),
    ((88.5, 29.5), (91, 29.5), (91, 21.5), (93.5, 21.5)),
    ((88.5, 10.5), (91, 10.5), (91, 17.5), (93.5, 17.5)),
    ((88.5, 48.5), (93.5, 48.5)),
    ((104, 26.5), (104, 43)),
    ((104, 54), (104, 62), (29.5, 62), (29.5, 36.5)),
    ((75.5, 62), (75.5, 55.5)),
)
NOTES = (("GAE", (105, 34)), ("policy loss: advantages", (30.5, 59.6)), ("value loss: returns", (76.5, 59.6)))


def four_models(details: dict[str, str] | None = None) -> Figure:
    """The four models of RLHF and one batch's way through them; frozen ones have a dashed frame.

    details: a further line for "policy", "value" (the critic), "reference" or "reward", such as a parameter count.
    B responses to prompts of P tokens, T tokens each, V words. Raises ValueError for another name.
    """
    unknown = set(details or {}) - set(MODELS)
    if unknown:
        raise ValueError(f"details must name only {', '.join(MODELS)}; got {', '.join(sorted(unknown))}")
    figure, ax = plt.subplots(figsize=(11.4, 6.6), layout="constrained")
    ax.set(xlim=(-1, 115), ylim=(2, 65), aspect="equal")
    ax.axis("off")
    for name in MODELS:
        model_box(ax, name, (details or {}).get(name))
    for text, (x, y), width, height in BATCH:
        ax.add_patch(Rectangle((x, y), width, height, facecolor="#F4F4F4", edgecolor=COLORS["neutral"]))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, linespacing=1.3)
    for corners in ARROWS:
        arrow = FancyArrowPatch(path=Path(corners), arrowstyle="-|>", mutation_scale=14, linewidth=1.4)
        arrow.set(color="black", capstyle="butt", joinstyle="miter")
        ax.add_patch(arrow)
    for text, place in NOTES:
        ax.text(*place, text, ha="left", va="center", fontsize=10, style="italic")
    return figure


def model_box(ax: Axes, name: str, detail: str | None) -> None:
    """A model: its shapes and whether it learns, in its concept's colour."""
    title, shapes, role, (x, y) = MODELS[name]
    frame = FancyBboxPatch((x, y), 25, 13, boxstyle="round,pad=0,rounding_size=1.4", linewidth=2.5)
    frame.set(facecolor=COLORS[name] + "1A", edgecolor=COLORS[name])
    frame.set_linestyle((0, (4, 2)) if role.startswith("frozen") else "-")
    ax.add_patch(frame)
    ax.text(x + 12.5, y + 10.8, title, ha="center", va="center", fontsize=11.5, fontweight="bold")
    lines = "\n".join([shapes, role, *([detail] if detail else [])])
    ax.text(x + 12.5, y + 4.9, lines, ha="center", va="center", fontsize=10, linespacing=1.35)

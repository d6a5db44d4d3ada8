"""A `GridWorld` drawn: its values, action values, policy and a walk through it, on the map.

Imported from `plots`, whose rules hold: plain input, a Figure back, labelled axes, one colour per concept.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.plots.style import (
    COLORS,
    SIGNED,
    Numbers,
    as_array,
    axes_for,
    cell_color,
    cell_text,
    ink,
    signed_scale,
)


def grid_axes(world: GridWorld, ax: Axes | None) -> tuple[Figure, Axes]:
    """The empty map: walls dark, goal and pit framed and named, the start marked S, row 0 on top."""
    rows, columns = world.walls.shape
    figure, ax = axes_for(ax, figsize=(1.7 + 1.1 * columns, (0.9 if rows > 2 else 1.8) + 1.1 * rows))
    for row, column in world.walls.nonzero().tolist():
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor="#4D4D4D", edgecolor="white"))
    for row, column in world.coordinates.tolist():
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor="#9E9E9E", zorder=3))
        name = {"G": "goal", "P": "pit", "S": "start"}.get(world.text.splitlines()[row][column])
        if name in ("goal", "pit"):
            frame = Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, linewidth=2.5, zorder=4)
            frame.set_edgecolor(COLORS["gold"] if name == "goal" else COLORS["reward"])
            ax.add_patch(frame)
        if name is not None:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
            text = "S" if name == "start" else name  # short, since start cells are full of numbers
            ax.text(column + 0.08, row + 0.08, text, ha="left", va="top", fontsize=8, bbox=box, zorder=5)
    ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row", aspect="equal")
    ax.set_xticks(np.arange(columns) + 0.5, range(columns))
    ax.set_yticks(np.arange(rows) + 0.5, range(rows))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return figure, ax


def color_bar(figure: Figure, ax: Axes, scale: Normalize, label: str) -> None:
    """The scale at the side, or beneath a map that is too low for its label."""
    side = "right" if ax.get_ylim()[0] > 2 else "bottom"
    figure.colorbar(ScalarMappable(scale, SIGNED), ax=ax, label=label, shrink=0.85, location=side)


def grid_values(
    world: GridWorld,
    values: Numbers,
    *,
    label: str = "V(s), expected discounted return",
    digits: int = 2,
    ax: Axes | None = None,
) -> Figure:
    """A number per state on the map: world a `GridWorld`, values (S,). Red is below 0, blue above."""
    values = as_array("values", values, ndim=1, length=world.num_states)
    figure, ax = grid_axes(world, ax)
    scale = signed_scale(values)
    for (row, column), value in zip(world.coordinates.tolist(), values, strict=True):
        color = cell_color(value, scale)
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=color, zorder=1))
        text = cell_text(value, digits)
        ax.text(column + 0.5, row + 0.55, text, ha="center", va="center", fontsize=11, color=ink(color), zorder=5)
    color_bar(figure, ax, scale, label)
    return figure


def grid_action_values(
    world: GridWorld,
    values: Numbers,
    *,
    label: str = "Q(s, a), expected discounted return",
    digits: int = 2,
    ax: Axes | None = None,
) -> Figure:
    """A number per state and action, on the side of the cell where the action leads; a state's largest is bold.

    world a `GridWorld`, values (S, A): Q, or A with its own label. Terminal states, where nothing is done, stay empty.
    """
    values = as_array("values", values, ndim=2, length=world.num_states)
    if values.shape[1] != world.num_actions:
        raise ValueError(f"values must have shape ({world.num_states}, {world.num_actions}); got {values.shape}")
    figure, ax = grid_axes(world, ax)
    scale = signed_scale(values[~world.terminal.numpy()])
    for s, (row, column) in enumerate(world.coordinates.tolist()):
        if world.terminal[s]:
            continue
        centre = np.array([column + 0.5, row + 0.5])
        for a, (down, right) in enumerate(world.moves.tolist()):
            towards, across = 0.5 * np.array([right, down]), 0.5 * np.array([down, right])
            color = cell_color(values[s, a], scale)
            corners = [centre, centre + towards + across, centre + towards - across]
            ax.add_patch(Polygon(corners, facecolor=color, edgecolor="white", linewidth=0.8, zorder=1))
            weight = "bold" if np.isclose(values[s, a], values[s].max()) else "normal"
            text = cell_text(values[s, a], digits)
            place = centre + towards * (0.57 if right else 0.72)
            ax.text(*place, text, ha="center", va="center", fontsize=7.5, fontweight=weight, color=ink(color), zorder=6)
    color_bar(figure, ax, scale, label)
    return figure


def grid_policy(world: GridWorld, policy: Numbers, *, ax: Axes | None = None) -> Figure:
    """A policy as arrows, each as long as its action is likely: world a `GridWorld`, policy (S, A) probabilities."""
    policy = as_array("policy", policy, ndim=2, length=world.num_states)
    if policy.shape[1] != world.num_actions or not np.allclose(policy.sum(axis=1), 1) or (policy < 0).any():
        raise ValueError(f"policy must be a row of probabilities for every state; got {policy.tolist()!s:.80}")
    figure, ax = grid_axes(world, ax)
    for s, (row, column) in enumerate(world.coordinates.tolist()):
        if world.terminal[s]:
            continue
        ax.plot(column + 0.5, row + 0.5, "o", color=COLORS["policy"], markersize=3)
        for probability, (down, right) in zip(policy[s], world.moves.tolist(), strict=True):
            if probability >= 0.02:
                tip = (column + 0.5 + 0.44 * probability * right, row + 0.5 + 0.44 * probability * down)
                arrow = FancyArrowPatch((column + 0.5, row + 0.5), tip, arrowstyle="-|>", shrinkA=0, shrinkB=0)
                arrow.set(color=COLORS["policy"], linewidth=1.8, mutation_scale=4 + 8 * probability, zorder=5)
                ax.add_patch(arrow)
    ax.set_xlabel("column (arrow length: probability of the action)")
    return figure


def grid_path(world: GridWorld, states: Numbers, *, ax: Axes | None = None) -> Figure:
    """One walk on the map: states (T+1,) in order. Each cell lists the time steps at which the walk was there."""
    states = as_array("states", states, ndim=1).astype(int)
    if states.min() < 0 or states.max() >= world.num_states:
        raise ValueError(f"states must be numbers from 0 to {world.num_states - 1}; got {states.tolist()}")
    figure, ax = grid_axes(world, ax)
    places = world.coordinates.flip(1).numpy() + 0.5
    for start, end in zip(states[:-1], states[1:], strict=True):
        if start != end:
            style = {"arrowstyle": "-|>", "shrinkA": 5, "shrinkB": 7, "mutation_scale": 14, "linewidth": 1.8}
            bend = "arc3,rad=0.15"  # so that there and back are two lines
            arrow = FancyArrowPatch(
                places[start], places[end], connectionstyle=bend, color=COLORS["policy"], zorder=4, **style
            )
            ax.add_patch(arrow)
    for s in np.unique(states):
        times = ",".join(map(str, np.flatnonzero(states == s)))
        ax.plot(*places[s], "o", color=COLORS["policy"], markersize=5)
        ax.text(*(places[s] + (0.45, -0.42)), f"t = {times}", ha="right", va="top", fontsize=8, zorder=5)
    ax.set_xlabel("column (t: time steps at which the walk is in this cell)")
    return figure

"""The one figure style of the course: a colour, a line and a marker per concept, and how figures are made and saved.

The colours are those of Okabe and Ito ("Color universal design", 2008), which differ for every common kind of colour
vision. Lines and markers differ too, so that a figure can be read in grey print. What is not a concept (runs, seeds,
settings) gets shades of cividis, which rise in lightness.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rlhf_lessons.display import number

Numbers = Sequence | np.ndarray | torch.Tensor  # what `as_array` takes

COLORS = {
    "policy": "#0072B2",  # what is trained
    "reference": "#56B4E9",  # its frozen copy
    "value": "#009E73",  # the critic, V and returns
    "reward": "#D55E00",  # the proxy: what the policy is paid by
    "gold": "#E69F00",  # what is really wanted; nobody trains on it
    "kl": "#CC79A7",
    "advantage": "#000000",
    "neutral": "#6E6E6E",  # guides, bounds, and whatever is no concept
}
LINES = {
    "policy": "-",
    "reference": (0, (6, 2)),
    "value": "-.",
    "reward": "--",
    "gold": "-",
    "kl": (0, (4, 1, 1, 1, 1, 1)),
    "advantage": (0, (5, 1)),
    "neutral": ":",
}
MARKERS = dict(zip(COLORS, "osvXDP^.", strict=True))
SIGNED = "RdBu"  # for signed quantities: red below the centre, white at it, blue above
DPI = 150  # of saved files

RUN_LINES = ("-", "--", "-.", ":")
RUN_MARKERS = "osv^DPX<"


def use_style() -> None:
    """Switch matplotlib to the course's style: call it once, in a notebook's first cell."""
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
            "font.size": 11,
            "axes.labelsize": 11,
            "axes.titlesize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.0,
            "lines.markersize": 5.5,
            "figure.figsize": (6.0, 3.8),
            "figure.dpi": 100,
            "savefig.dpi": DPI,
            "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
        }
    )


def concept_style(concept: str) -> dict:
    """Colour, line and marker of a concept, as arguments of `Axes.plot`. Raises ValueError for an unknown one."""
    if concept not in COLORS:
        raise ValueError(f"concept must be one of {', '.join(COLORS)}; got {concept!r}")
    return {"color": COLORS[concept], "linestyle": LINES[concept], "marker": MARKERS[concept]}


def run_styles(count: int) -> list[dict]:
    """Styles for `count` runs or settings, dark to light, as arguments of `Axes.plot`."""
    shades = plt.get_cmap("cividis")(np.linspace(0.0, 0.8, count))
    return [
        {
            "color": tuple(shade),
            "linestyle": RUN_LINES[i % len(RUN_LINES)],
            "marker": RUN_MARKERS[i % len(RUN_MARKERS)],
        }
        for i, shade in enumerate(shades)
    ]


def styles_for(labels: list[str], concepts: dict[str, str] | None = None) -> dict[str, dict]:
    """A style per label: the concept's where `concepts` names one or the label is one, a run's otherwise."""
    named = {label: label for label in labels if label in COLORS} | (concepts or {})
    others = [label for label in labels if label not in named]
    styles = dict(zip(others, run_styles(len(others)), strict=True))
    return {label: styles.get(label) or concept_style(named[label]) for label in labels}


def axes_for(ax: Axes | None, *, figsize: tuple[float, float] | None = None) -> tuple[Figure, Axes]:
    """The axes that were given, with their figure, or new ones that fit their labels."""
    if ax is not None:
        return ax.figure, ax
    return plt.subplots(figsize=figsize, layout="constrained")


def as_array(name: str, values: Numbers, *, ndim: int | None = None, length: int | None = None) -> np.ndarray:
    """A tensor, list or array as float64 numbers; ValueError, naming it, for anything else, or for another shape."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
        elif isinstance(values, list | tuple):
            values = [v.detach().cpu() if isinstance(v, torch.Tensor) else v for v in values]
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers in a regular shape; got {type(values).__name__}") from error
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s); got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one number; got none")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} must have length {length}; got {len(array)}")
    return array


def signed_scale(values: np.ndarray, center: float = 0.0) -> Normalize:
    """A colour scale that reaches equally far to both sides of its centre."""
    finite = values[np.isfinite(values)]
    reach = max(np.abs(finite - center).max(), 1e-12) if finite.size else 1.0
    return Normalize(center - reach, center + reach)


def cell_color(value: float, scale: Normalize) -> tuple:
    """The colour of a signed value; NaN, which stands for nothing, is light grey."""
    return plt.get_cmap(SIGNED)(scale(value)) if np.isfinite(value) else (0.93, 0.93, 0.93, 1.0)


def ink(color: tuple) -> str:
    """Black or white, whichever is read more easily on this colour."""
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def plain_log_axis(axis: Axis) -> None:
    """A log axis with plain numbers at 1, 2 and 5 of a short range, at powers of ten of a long one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def cell_text(value: float, digits: int) -> str:
    """A number as `display.number` writes it, with a minus sign in place of the hyphen."""
    return number(value, digits).replace("-", "−")


def show(alt: str) -> None:
    """Show the open figures, each with `alt`: a sentence for who cannot see them, such as "Gold falls as proxy climbs".

    A notebook keeps it beside the picture, where a web page and a screen reader find it. Raises ValueError for an `alt`
    without a word.
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt must be a sentence that says what the figure shows; got {alt!r}")
    if "ipykernel" not in sys.modules:  # not a notebook
        plt.show()
        return
    from IPython.display import display

    for figure in map(plt.figure, plt.get_fignums()):
        display(figure, metadata={"image/png": {"alt": alt}})
    plt.close("all")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, at one resolution and without date or version: the same figure gives the same bytes.

    The file appears whole or not at all. The figure stays open (`plt.close` frees it). Folders are made. Raises
    ValueError unless the name ends in .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path must have a name that ends in .png; got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path

"""Figures: what is drawn is the data that came in, in the concept's colour, on labelled axes; bad input is refused."""

import math
import os
import struct
import sys
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from nbclient import NotebookClient

from notebooks import KernelOnFiles
from rlhf_lessons import plots
from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.plots.style import (
    COLORS,
    LINES,
    MARKERS,
    as_array,
    concept_style,
    ink,
    run_styles,
    signed_scale,
    styles_for,
)

GRID = GridWorld.named("four_by_three")
V, Q, A = GRID.policy_evaluation(GRID.uniform_policy())
TREE = {(): {"was": 0.6, "felt": 0.4}, ("was",): {"superb": 0.5, "dull": 0.2}}


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context():
        yield
    plt.close("all")


def run(seed: int = 0, steps: int = 6, **constants) -> list[dict]:
    """Rows as in metrics.jsonl; the gold reward is measured in every second iteration only."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for i in range(1, steps + 1):
        row = {"iteration": i, "score": i + noise[i - 1], "kl": float(i * i), "entropy": 2.0 / i}
        row |= {"clip_fraction": 0.1, "explained_variance": 0.5, "gold": -float(i) if i % 2 == 0 else None}
        rows.append(row | constants)
    return rows


FIGURES = {
    "training_curves": lambda: plots.training_curves(run()),
    "training_curves of seeds": lambda: plots.training_curves([run(0), run(1)]),
    "training_curves of runs": lambda: plots.training_curves({"a": run(0), "b": [run(1), run(2)]}, band="sd"),
    "overoptimisation": lambda: plots.overoptimisation(run()),
    "overoptimisation of runs": lambda: plots.overoptimisation({0: run(), 0.1: run(1)}, x="iteration"),
    "proxy_and_gold": lambda: plots.proxy_and_gold({"a": run(), "b": [run(1), run(2)]}),
    "token_view": lambda: plots.token_view(["a", "$b$", "c\nd"], {"KL": [0.1, -0.2, 0], "ratio": [1, 1.1, 0.9]}),
    "decision_tree": lambda: plots.decision_tree(TREE, chosen=("was", "dull")),
    "grid_values": lambda: plots.grid_values(GRID, V),
    "grid_action_values": lambda: plots.grid_action_values(GRID, Q),
    "grid_policy": lambda: plots.grid_policy(GRID, GRID.uniform_policy()),
    "grid_path": lambda: plots.grid_path(GRID, [7, 4, 4, 0]),
    "variance_ranking": lambda: plots.variance_ranking({"a": 3.0, "b": 0.1}),
    "bars": lambda: plots.bars({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, xlabel="time (s)"),
    "bias_variance": lambda: plots.bias_variance([0, 0.5, 1], [1, 0.2, 0], [0, 0.1, 0.9]),
    "ess_against_kl": lambda: plots.ess_against_kl([0, 1], [10, 5], num_samples=10),
    "learning_curves": lambda: plots.learning_curves({"PPO": torch.ones(3, 4)}),
    "calibration": lambda: plots.calibration([0.1, 0.9, 0.8], [0, 1, 1]),
    "scatter": lambda: plots.scatter([1, 2, 3], [1, 2, 4], xlabel="x", ylabel="y", diagonal=True),
    "reward_against_gold": lambda: plots.reward_against_gold([1, 2, 3], [1, 2, 4]),
    "ratings_and_comparisons": lambda: plots.ratings_and_comparisons(
        [0, 1], [[3, 4], [5, 7]], [-1, 1], [0, 1], temperature=0.5
    ),
    "weight_histogram": lambda: plots.weight_histogram({"a": [0, 0.5, 2], "b": [1, 1]}),
    "clip_regions": lambda: plots.clip_regions(0.2),
    "curve": lambda: plots.curve([1, 2], {"k1": [0, 1], "k2": [1, 0]}, xlabel="x", ylabel="y", yscale="log"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axes_is_labelled_and_every_text_is_inside_the_figure(name):
    plots.use_style()
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    renderer, frame = figure.canvas.get_renderer(), figure.bbox.padded(1)
    for ax in figure.axes:
        box = ax.get_tightbbox(renderer)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, name
        if ax.get_label() == "<colorbar>":
            assert ax.get_xlabel() or ax.get_ylabel()
            continue
        place = ax.get_subplotspec()  # inner panels of a grid share their labels
        assert ax.get_xlabel() or not place.is_last_row()
        assert ax.get_ylabel() or not place.is_first_col() or name in NAMED_ROWS


NAMED_ROWS = ("token_view", "decision_tree", "variance_ranking", "bars")  # ticks with names instead of a y label


def lines(ax) -> dict:
    return {line.get_label(): line for line in ax.get_lines()}


# ---- style -----------------------------------------------------------------------------


def test_concepts_differ_in_colour_line_and_marker():
    assert set(COLORS) >= {"policy", "reference", "value", "reward", "gold", "kl", "advantage", "neutral"}
    assert set(LINES) == set(MARKERS) == set(COLORS)
    assert len(set(COLORS.values())) == len(COLORS) == len(set(MARKERS.values()))
    assert len({(str(LINES[c]), MARKERS[c]) for c in COLORS}) == len(COLORS)
    assert LINES["reward"] != LINES["gold"] and LINES["policy"] != LINES["reference"]


# Viénot, Brettel & Mollon 1999, "Digital video colourmaps for checking the legibility of displays by dichromats".
DICHROMATS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("vision", DICHROMATS)
@pytest.mark.parametrize(
    "pair", [("policy", "reference"), ("reward", "gold"), ("value", "policy"), ("value", "reward")]
)
def test_concepts_that_meet_in_a_figure_differ_for_dichromats(vision, pair):
    linear = np.array([to_rgb(COLORS[c]) for c in pair]) ** 2.2
    seen = np.clip(linear @ np.array(DICHROMATS[vision]).T, 0, 1) ** (1 / 2.2)
    assert np.abs(seen[0] - seen[1]).max() > 0.12


def test_runs_rise_in_lightness_so_that_grey_print_tells_them_apart():
    lightness = [np.dot(style["color"][:3], [0.299, 0.587, 0.114]) for style in run_styles(5)]
    assert all(b - a > 0.08 for a, b in zip(lightness, lightness[1:], strict=False))
    assert len({(s["linestyle"], s["marker"]) for s in run_styles(4)}) == 4


def test_labels_that_are_concepts_get_their_style_and_others_by_request():
    styles = styles_for(["policy", "score of the model", "seed 1"], {"score of the model": "reward"})
    assert styles["policy"] == concept_style("policy")
    assert styles["score of the model"]["color"] == COLORS["reward"]
    assert styles["seed 1"]["color"] not in COLORS.values()
    with pytest.raises(ValueError, match="concept must be one of policy"):
        concept_style("actor")


def test_use_style_sets_fonts_that_can_be_read():
    plots.use_style()
    assert plt.rcParams["font.family"] == ["DejaVu Sans"]
    assert min(plt.rcParams["font.size"], plt.rcParams["xtick.labelsize"], plt.rcParams["legend.fontsize"]) >= 10


def test_signed_scale_is_white_at_its_centre_and_ink_can_be_read():
    scale = signed_scale(np.array([0.5, 1.2, math.nan]), center=1.0)
    assert scale(1.0) == pytest.approx(0.5) and scale(0.5) == pytest.approx(0) and scale(1.5) == pytest.approx(1)
    assert ink((1, 1, 1, 1)) == "black" and ink((0, 0, 0.4, 1)) == "white"


def test_arrays_are_taken_from_tensors_with_gradients_and_refused_by_name():
    assert as_array("x", [torch.ones((), requires_grad=True), 2]).tolist() == [1, 2]
    for bad, message in (
        ([[1], [1, 2]], "be numbers in a regular shape"),
        (["a"], "be numbers"),
        ([], "hold at least one number"),
        ([[1.0]], "have 1 dim"),
    ):
        with pytest.raises(ValueError, match=f"loss must {message}"):
            as_array("loss", bad, ndim=1)


# ---- saving ----------------------------------------------------------------------------


def chunks(png: bytes) -> list[bytes]:
    """The types of a PNG file's chunks."""
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append(png[at + 4 : at + 8])
        at += 12 + length
    return found


def test_saving_twice_gives_the_same_bytes_without_date_or_version(tmp_path):
    plots.use_style()
    first = plots.save(FIGURES["curve"](), tmp_path / "figures" / "a.png").read_bytes()
    second = plots.save(FIGURES["curve"](), tmp_path / "b.png").read_bytes()
    assert first == second
    assert not {b"tEXt", b"iTXt", b"zTXt", b"tIME"} & set(chunks(first))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.png", "figures"]


def test_saving_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = plots.save(FIGURES["curve"](), tmp_path / "a.png")
    before = path.read_bytes()

    def broken(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        plots.save(FIGURES["curve"](), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saving_under_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must have a name that ends in .png; got 'a.pdf'"):
        plots.save(FIGURES["curve"](), tmp_path / "a.pdf")


# ---- curves ----------------------------------------------------------------------------


def test_training_curves_show_the_metrics_in_their_concepts_colours():
    rows = run()
    figure = plots.training_curves(rows)
    reward, kl, *_ = figure.axes
    drawn = lines(reward)
    assert drawn["proxy reward"].get_ydata().tolist() == [row["score"] for row in rows]
    assert drawn["gold reward"].get_xdata().tolist() == [2, 4, 6]  # only where it was measured
    assert drawn["gold reward"].get_ydata().tolist() == [-2, -4, -6]
    assert same_color(drawn["proxy reward"].get_color(), COLORS["reward"])
    assert same_color(drawn["gold reward"].get_color(), COLORS["gold"])
    assert same_color(kl.get_lines()[0].get_color(), COLORS["kl"])
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "reward",
        "KL (nats per response)",
        "entropy (nats per token)",
        "clipped share of tokens",
        "explained variance (share)",
    ]


def test_rows_without_a_number_are_counted_from_one():
    rows = [{"score": 1.0}, {"score": 2.0}]
    (ax,) = plots.training_curves(rows).axes
    assert ax.get_lines()[0].get_xdata().tolist() == [1, 2]


@pytest.mark.parametrize("band", ["minmax", "sd"])
def test_bands_over_seeds_hold_mean_and_spread(band):
    values = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 6.0], [4.0, 4.0, 7.0]])
    (ax,) = plots.learning_curves({"PPO": values}, band=band).axes
    (line,), (fill,) = ax.get_lines(), ax.collections
    np.testing.assert_allclose(line.get_ydata(), [2, 2, 6])
    vertices = fill.get_paths()[0].vertices
    at_first = vertices[vertices[:, 0] == 1][:, 1]
    sd = math.sqrt(8 / 3)  # of 0, 2, 4
    expected = (0, 4) if band == "minmax" else (2 - sd, 2 + sd)
    assert (at_first.min(), at_first.max()) == pytest.approx(expected)
    assert line.get_label() == "PPO (3 seeds)"
    (ax,) = plots.learning_curves({"PPO": values}, of="critics").axes
    assert ax.get_lines()[0].get_label() == "PPO (3 critics)"


def test_seeds_of_a_run_are_averaged_over_the_iterations_they_share():
    short, long = run(0, steps=3, entropy=1.0), run(0, steps=5, entropy=3.0)
    entropy = plots.training_curves([short, long], metrics=["entropy"]).axes[0].get_lines()[0]
    assert entropy.get_xdata().tolist() == [1, 2, 3] and entropy.get_ydata().tolist() == [2, 2, 2]


def test_several_runs_have_a_panel_per_metric_and_one_style_each():
    figure = plots.training_curves({"β = 0": run(0), "β = 0.1": run(1)})
    assert len(figure.axes) == 6
    for ax in figure.axes:
        assert list(lines(ax)) == ["β = 0", "β = 0.1"]
        assert len({str(line.get_color()) for line in ax.get_lines()}) == 2
        assert len({line.get_linestyle() for line in ax.get_lines()}) == 2


def test_overoptimisation_puts_rewards_over_the_root_of_the_kl():
    (ax,) = plots.overoptimisation(run()).axes
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["proxy reward"].get_xdata(), [1, 2, 3, 4, 5, 6])  # kl = i²
    np.testing.assert_allclose(drawn["gold reward"].get_xdata(), [2, 4, 6])
    assert ax.get_xlabel() == "√KL to reference (√nats)"
    assert same_color(drawn["gold reward"].get_color(), COLORS["gold"])
    left, right = plots.overoptimisation({"β = 0": run(), "β = 1": [run(1), run(2)]}, x="iteration").axes
    assert left.get_ylim() != right.get_ylim()
    assert (left.get_ylabel(), right.get_ylabel()) == ("proxy reward", "gold reward")
    np.testing.assert_allclose(right.get_lines()[1].get_ydata(), [-2, -4, -6])


def test_proxy_and_gold_have_a_panel_per_run_each_on_a_scale_of_its_own():
    left, right = plots.proxy_and_gold({"β = 0": run(), "β = 1": run(gold=20.0)}).axes
    assert (left.get_title(), right.get_title()) == ("β = 0", "β = 1") and left.get_ylim()[1] < 10 < right.get_ylim()[1]
    assert lines(left)["gold reward"].get_ydata().tolist() == [-2, -4, -6]
    assert lines(right)["gold reward"].get_ydata().tolist() == [20] * 6
    assert same_color(lines(right)["gold reward"].get_color(), COLORS["gold"])
    assert same_color(lines(right)["proxy reward"].get_color(), COLORS["reward"])


def test_a_negative_kl_counts_as_zero_under_the_root():
    (ax,) = plots.overoptimisation(run(kl=-0.5)).axes
    assert (lines(ax)["proxy reward"].get_xdata() == 0).all()


def test_figures_are_drawn_on_the_axes_that_are_given():
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.curve([0, 1], {"policy": [1, 2]}, xlabel="x", ylabel="y", ax=left) is figure
    assert plots.bias_variance([0, 1], [1, 0], [0, 2], ax=right) is figure
    assert same_color(left.get_lines()[0].get_color(), COLORS["policy"])
    assert [line.get_label() for line in right.get_lines()][:3] == ["squared bias", "variance", "mean squared error"]


def test_bias_and_variance_add_up_and_the_minimum_is_marked():
    (ax,) = plots.bias_variance([0, 0.5, 1], [1, 0.2, 0], [0, 0.1, 0.9]).axes
    np.testing.assert_allclose(lines(ax)["mean squared error"].get_ydata(), [1, 0.3, 0.9])
    star = next(line for line in ax.get_lines() if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.5, pytest.approx(0.3))
    assert "smallest at λ = 0.5" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_variances_are_ranked_on_a_log_axis():
    (ax,) = plots.variance_ranking({"full return": 3.0, "optimal": torch.tensor(0.1), "constant": 1.0}).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["optimal", "constant", "full return"]
    (dots,) = ax.get_lines()
    assert list(dots.get_xdata()) == pytest.approx([0.1, 1, 3]) and list(dots.get_ydata()) == [0, 1, 2]
    assert [text.get_text() for text in ax.texts] == ["0.1", "1", "3"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()
    assert not ax.patches  # a bar's length means nothing where there is no zero


def test_bars_of_concepts_are_coloured_and_groups_have_a_legend():
    (ax,) = plots.bars({"policy": 1, "the critic": 2, "other": 3}, xlabel="s", concepts={"the critic": "value"}).axes
    for bar, concept in zip(ax.patches, ("policy", "value", "neutral"), strict=True):
        assert same_color(bar.get_facecolor(), COLORS[concept])
    (ax,) = plots.bars({"a": {"predicted": 1, "measured": 2}, "b": {"measured": 3}}, xlabel="s").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["predicted", "measured"]
    assert sorted(bar.get_width() for bar in ax.patches) == [1, 2, 3]


def test_an_interval_can_be_seen_on_a_bar_of_its_own_colour():
    (ax,) = plots.bars({"advantage": 2.0}, xlabel="x", errors={"advantage": 1.0}).axes
    (interval,) = ax.collections
    assert same_color(interval.get_color()[0], COLORS["advantage"])
    ax.figure.canvas.draw()
    drawn = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3]
    x, y = map(round, ax.transData.transform((1.5, 0)))  # on the bar, where the interval lies
    column = drawn[drawn.shape[0] - y - 8 : drawn.shape[0] - y + 9, x]
    assert column.min() == 0 and column.max() == 255


def test_effective_sample_size_is_drawn_as_a_share():
    (ax,) = plots.ess_against_kl([0, 1], {"a": [100, 50], "b": [100, 10]}, num_samples=100).axes
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[1, 0.5], [1, 0.1]]


# ---- samples ---------------------------------------------------------------------------


def test_calibration_points_are_the_shares_of_each_bin():
    predicted = [0.05, 0.05, 0.05, 0.05, 0.95, 0.95]
    (ax,) = plots.calibration(predicted, [0, 0, 0, 1, 1, 1]).axes
    points = ax.containers[0].lines[0]
    np.testing.assert_allclose(points.get_xdata(), [0.05, 0.95])
    np.testing.assert_allclose(points.get_ydata(), [0.25, 1.0])
    low = ax.containers[0].lines[2][0].get_segments()[0][0][1]
    assert low == pytest.approx(0.25 - math.sqrt(0.25 * 0.75 / 4))


def test_a_probability_of_one_falls_into_the_last_bin():
    (ax,) = plots.calibration([1.0, 0.97], [1, 0], bins=10).axes
    assert ax.containers[0].lines[0].get_ydata().tolist() == [0.5]


def test_reward_against_gold_has_gold_across_and_names_the_correlation():
    (ax,) = plots.reward_against_gold([0.0, 1, 2, 5], [0.0, 1, 2, 3]).axes
    assert ax.collections[0].get_offsets()[3].tolist() == [3, 5]
    assert same_color(ax.collections[0].get_facecolor()[0, :3], COLORS["reward"])
    expected = np.corrcoef([0, 1, 2, 5], [0, 1, 2, 3])[0, 1]
    assert f"correlation {expected:.2f}, N = 4" in ax.get_legend().get_texts()[0].get_text()


def test_weights_are_shares_and_their_worth_is_named():
    weights = torch.tensor([0.0, 1.0, 1.0, 2.0])
    (ax,) = plots.weight_histogram(weights).axes
    text = ax.get_legend().get_texts()[0].get_text()
    assert text == "worth 3 of 4, 1 are 0"  # 4² / 6 = 2.67
    steps = ax.patches[-1].get_path().vertices
    assert steps[:, 1].max() == pytest.approx(0.5)  # two of the four weights are 1
    assert ax.get_xscale() == "log"


def test_ratings_keep_their_annotators_apart_and_comparisons_follow_the_curve():
    figure = plots.ratings_and_comparisons(
        [0.0, 1.0], [[3.0, 4.0], [5.0, 7.0]], [-2.0, -2.0, 2.0], [0, 1, 1], temperature=0.5, bins=2
    )
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.get_lines()] == [[3, 4], [5, 7]]
    np.testing.assert_allclose(right.containers[0].lines[0].get_ydata(), [0.5, 1])
    sigmoid = lines(right)["σ(margin / 0.5)"]
    assert sigmoid.get_ydata()[-1] == pytest.approx(1 / (1 + math.exp(-4)))


# ---- tokens, tree, grid ----------------------------------------------------------------


def cell_texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_tokens_and_numbers_stand_in_their_cells():
    figure = plots.token_view(["a", "b", "c"], {"KL": [0.5, -0.5, math.nan], "ratio": [1, 2, 0.5]}, per_line=2)
    first, second = figure.axes
    assert cell_texts(first) == ["0.50", "−0.50", "1.00", "2.00", "a", "b"]
    assert cell_texts(second) == ["0.50", "c"]  # the NaN leaves its cell empty
    colors = [to_rgb(patch.get_facecolor()) for patch in first.patches]
    assert colors[0][2] > colors[0][0] and colors[1][0] > colors[1][2]  # blue above 0, red below
    assert min(colors[2]) > 0.95  # a ratio of 1 is white
    assert [text.get_text() for text in second.get_xticklabels()] == ["2"]


def test_tokens_are_never_read_as_formulas():
    row = plots.token_view(["$a$", "b\nc"], {"KL": [1, 2]}).axes[0].texts[2:]
    tree = plots.decision_tree({(): {"$a$": 1.0}}).axes[0].texts
    assert [text.get_text() for text in row] == ["$a$", "b↵c"]
    assert not any(text.get_parse_math() for text in row)
    assert [text.get_parse_math() for text in tree if text.get_text() == "$a$"] == [False]


def test_a_centre_can_be_chosen():
    figure = plots.token_view(["a", "b"], {"reward": [3, 4]}, centers={"reward": 3})
    assert min(to_rgb(figure.axes[0].patches[0].get_facecolor())) > 0.95


def test_the_tree_shows_every_branch_and_what_is_left_over():
    (ax,) = plots.decision_tree(TREE, prompt="the plot", chosen=("was", "dull")).axes
    texts = cell_texts(ax)
    for expected in ("the plot", "was", "felt", "superb", "dull", "others", "0.60", "0.40", "0.50", "0.20", "0.30"):
        assert texts.count(expected) == 1, expected
    marked = [line for line in ax.get_lines() if same_color(line.get_color(), COLORS["policy"])]
    likelier, rarer = sorted(marked, key=lambda line: line.get_xydata()[0][0])
    assert likelier.get_linewidth() > rarer.get_linewidth()  # 0.6 and 0.2
    places = [line.get_xydata() for line in ax.get_lines()]
    assert all(end[0] == start[0] + 1 for start, end in places)


def test_leaves_of_the_tree_do_not_share_a_place():
    (ax,) = plots.decision_tree(TREE).axes
    ends = [tuple(line.get_xydata()[1]) for line in ax.get_lines()]
    assert len(set(ends)) == len(ends) == 5


def number_at(ax, x: float, y: float) -> str:
    """The number nearest to a place on the map."""
    numbers = [t for t in ax.texts if t.get_text().lstrip("−").replace(".", "").isdigit()]
    return min(numbers, key=lambda t: math.dist(t.get_position(), (x, y))).get_text()


def as_text(value) -> str:
    return f"{float(value):.2f}".replace("-", "−")


def test_state_values_stand_at_their_coordinates():
    ax = plots.grid_values(GRID, V).axes[0]
    for s, (row, column) in enumerate(GRID.coordinates.tolist()):
        assert number_at(ax, column + 0.5, row + 0.5) == as_text(V[s])
    assert ax.get_ylim() == (3, 0) and ax.get_xlim() == (0, 4)


def test_action_values_stand_on_the_side_where_the_action_leads():
    ax = plots.grid_action_values(GRID, Q).axes[0]
    for s, (row, column) in enumerate(GRID.coordinates.tolist()):
        if GRID.terminal[s]:
            continue
        for a, side in enumerate(((0, -0.35), (0.3, 0), (0, 0.35), (-0.3, 0))):  # up, right, down, left
            assert number_at(ax, column + 0.5 + side[0], row + 0.5 + side[1]) == as_text(Q[s, a])
    bold = [text.get_text() for text in ax.texts if text.get_fontweight() == "bold"]
    best = Q[~GRID.terminal].amax(dim=1)
    assert sorted(bold) == sorted(map(as_text, best))


def test_policy_arrows_are_as_long_as_their_probability():
    policy = torch.zeros(GRID.num_states, 4, dtype=torch.float64)
    policy[:, 1], policy[:, 2] = 0.75, 0.25  # right and down
    ax = plots.grid_policy(GRID, policy).axes[0]
    arrows = [patch for patch in ax.patches if type(patch).__name__ == "FancyArrowPatch"]
    assert len(arrows) == 2 * int((~GRID.terminal).sum())
    (x0, y0), (x1, y1) = arrows[0]._posA_posB
    (_, down0), (_, down1) = arrows[1]._posA_posB
    assert x1 - x0 == pytest.approx(3 * (down1 - down0)) and y1 == y0 and down1 > down0


def test_the_path_names_the_time_of_each_visit():
    ax = plots.grid_path(GRID, [7, 7, 5]).axes[0]
    times = {text.get_text(): text.get_position() for text in ax.texts if text.get_text().startswith("t")}
    assert set(times) == {"t = 0,1", "t = 2"}
    row, column = GRID.coordinates[7].tolist()
    x, y = times["t = 0,1"]
    assert column < x < column + 1 and row < y < row + 1
    assert sum(type(patch).__name__ == "FancyArrowPatch" for patch in ax.patches) == 1  # a bump is no move


# ---- the clip and the four models ------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.5])
def test_the_six_regions_are_the_loss_and_its_gradient(eps):
    objective_up, objective_down, slope_up, slope_down = plots.clip_regions(eps).axes
    for advantage, top, bottom in ((1.0, objective_up, slope_up), (-1.0, objective_down, slope_down)):
        drawn = [line for line in top.get_lines() if same_color(line.get_color(), COLORS["policy"])]
        slopes = [line for line in bottom.get_lines() if same_color(line.get_color(), COLORS["policy"])]
        for line, slope in zip(drawn, slopes, strict=True):
            ratio = line.get_xdata()
            expected = np.minimum(ratio * advantage, np.clip(ratio, 1 - eps, 1 + eps) * advantage)
            np.testing.assert_allclose(line.get_ydata(), expected)
            dead = ratio[50] > 1 + eps if advantage > 0 else ratio[50] < 1 - eps
            np.testing.assert_allclose(slope.get_ydata(), 0 if dead else advantage)
        flat = [text.get_text() for text in top.texts if "no gradient" in text.get_text()]
        assert flat == ["3\nno gradient" if advantage > 0 else "4\nno gradient"]


def test_the_four_models_say_who_is_trained_and_carry_details():
    figure = plots.four_models({"policy": "236 k parameters"})
    texts = "\n".join(cell_texts(figure.axes[0]))
    for expected in ("policy (actor)", "critic", "reference", "reward model", "236 k parameters", "(B, T, V)"):
        assert expected in texts
    frames = {
        name: next(p for p in figure.axes[0].patches if same_color(p.get_edgecolor(), COLORS[name]))
        for name in ("policy", "value", "reference", "reward")
    }
    assert {n: f.get_linestyle() == "-" for n, f in frames.items()} == {
        "policy": True,
        "value": True,
        "reference": False,
        "reward": False,
    }


# ---- bad input -------------------------------------------------------------------------

BAD = {
    "ys must hold at least one curve; got none": lambda: plots.curve([1], {}, xlabel="x", ylabel="y"),
    r"ys\['a'\] must have length 2; got 1": lambda: plots.curve([1, 2], {"a": [1]}, xlabel="x", ylabel="y"),
    "runs must be lists of metric dicts, none empty; got something else in run ''": lambda: plots.training_curves([]),
    "runs must be lists of metric dicts, none empty; got something else in run 'b'": lambda: plots.training_curves(
        {"a": run(), "b": [[]]}
    ),
    "runs must hold at least one run; got none": lambda: plots.training_curves({}),
    "metrics must name at least one that a run has; got none": lambda: plots.training_curves([{"loss": 1.0}]),
    'band must be "minmax" or "sd"; got \'ci\'': lambda: plots.learning_curves({"a": [[1, 2]]}, band="ci"),
    "curves.* must have 2 dimension": lambda: plots.learning_curves({"a": [1, 2]}),
    'x must be "sqrt_kl" or "iteration"; got \'kl\'': lambda: plots.overoptimisation(run(), x="kl"),
    "runs must have rows with 'gold' and 'kl'; got none in run ''": lambda: plots.overoptimisation(run(gold=None)),
    "values must be positive on a log axis; got 0": lambda: plots.bars({"a": 0.0}, xlabel="x", xscale="log"),
    "variances must be positive on a log axis; got 0": lambda: plots.variance_ranking({"a": 0.0}),
    "values must be numbers or dicts of numbers; got both": lambda: plots.bars({"a": 1, "b": {"c": 2}}, xlabel="x"),
    "values must hold at least one bar; got none": lambda: plots.bars({}, xlabel="x"),
    "squared_bias must have length 2": lambda: plots.bias_variance([0, 1], [1], [1, 2]),
    "num_samples must be at least 1; got 0": lambda: plots.ess_against_kl([0], [1], num_samples=0),
    r"weights must be finite, not negative and not all 0; got \[-1.0, 2.0\]": lambda: plots.weight_histogram(
        [-1.0, 2.0]
    ),
    r"weights must be .*not all 0; got \[0.0, 0.0\]": lambda: plots.weight_histogram([0.0, 0.0]),
    "predicted must be probabilities; got 1.2 to 1.2": lambda: plots.calibration([1.2], [1]),
    r"outcomes must be 0 or 1; got \[0.5\]": lambda: plots.calibration([0.2], [0.5]),
    "y must have length 2; got 3": lambda: plots.scatter([1, 2], [1, 2, 3], xlabel="x", ylabel="y"),
    "each row of ratings must have length 1": lambda: plots.ratings_and_comparisons([0], [[1, 2]], [1], [1]),
    "runs must have rows with 'gold'; got none in run 'b'": lambda: plots.proxy_and_gold(
        {"a": run(), "b": run(gold=None)}
    ),
    "tokens and quantities must hold at least one; got 0 and 1": lambda: plots.token_view([], {"KL": []}),
    "KL must have length 2": lambda: plots.token_view(["a", "b"], {"KL": [1]}),
    "per_line must be at least 1; got 0": lambda: plots.token_view(["a"], {"KL": [1]}, per_line=0),
    r"table must have the prefix \(\) for the prompt; got \[\('a',\)\]": lambda: plots.decision_tree(
        {("a",): {"b": 1.0}}
    ),
    r"table must have a branch to every prefix; got none to \('b',\)": lambda: plots.decision_tree(
        {(): {"a": 1.0}, ("b",): {"c": 1.0}}
    ),
    r"table\[\(\)\] must be probabilities that sum to at most 1; got ": lambda: plots.decision_tree(
        {(): {"a": 0.7, "b": 0.4}}
    ),
    "chosen must be a path of the table; got ": lambda: plots.decision_tree({(): {"a": 1.0}}, chosen=("b",)),
    "values must have length 11; got 2": lambda: plots.grid_values(GRID, [1.0, 2.0]),
    r"values must have shape \(11, 4\); got \(11, 2\)": lambda: plots.grid_action_values(GRID, torch.zeros(11, 2)),
    "policy must be a row of probabilities for every state; got ": lambda: plots.grid_policy(GRID, torch.ones(11, 4)),
    "states must be numbers from 0 to 10; got ": lambda: plots.grid_path(GRID, [0, 11]),
    "clip_eps must be below 1; got 1.5": lambda: plots.clip_regions(1.5),
    "details must name only policy": lambda: plots.four_models({"actor": "x"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_notebook_keeps_what_a_figure_shows_beside_it():
    cell = nbformat.v4.new_code_cell(
        "import matplotlib.pyplot as plt\nfrom rlhf_lessons import plots\nplt.plot([1, 2])\n"
        "plots.show('a line that rises')"
    )
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with warnings.catch_warnings(action="ignore"):
        notebook = nbformat.v4.new_notebook(cells=[cell])
        NotebookClient(notebook, kernel_manager_class=KernelOnFiles).execute(env=environment)
    (output,) = cell.outputs  # one picture, not two
    assert "image/png" in output.data
    assert output.metadata["image/png"]["alt"] == "a line that rises"


def test_a_script_shows_its_figures_in_a_window(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    plots.show("a line")
    assert shown


@pytest.mark.parametrize("alt", ["", " ", None])
def test_a_figure_is_not_shown_without_words(alt):
    with pytest.raises(ValueError, match="alt must be a sentence"):
        plots.show(alt)

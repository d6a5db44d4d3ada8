"""The figures of lessons and reports: `use_style()` once, then a function per picture.

Every function takes plain tensors, lists or dicts, draws on new axes or on `ax`, labels them with units and returns the
Figure. What a figure means is said in the text beneath it. All of them are imported from here; they stand in `curves`,
`drawings` (tokens, trees, the clip, the four models), `grids` and `samples`, colours and saving in `style`.
"""

from rlhf_lessons.plots.curves import (
    bars,
    bias_variance,
    curve,
    ess_against_kl,
    learning_curves,
    overoptimisation,
    proxy_and_gold,
    training_curves,
    variance_ranking,
)
from rlhf_lessons.plots.drawings import clip_regions, decision_tree, four_models, token_view
from rlhf_lessons.plots.grids import grid_action_values, grid_path, grid_policy, grid_values
from rlhf_lessons.plots.samples import (
    calibration,
    ratings_and_comparisons,
    reward_against_gold,
    scatter,
    weight_histogram,
)
from rlhf_lessons.plots.style import COLORS, save, show, use_style

__all__ = [
    "COLORS",
    "bars",
    "bias_variance",
    "calibration",
    "clip_regions",
    "curve",
    "decision_tree",
    "ess_against_kl",
    "four_models",
    "grid_action_values",
    "grid_path",
    "grid_policy",
    "grid_values",
    "learning_curves",
    "overoptimisation",
    "proxy_and_gold",
    "ratings_and_comparisons",
    "reward_against_gold",
    "save",
    "scatter",
    "show",
    "token_view",
    "training_curves",
    "use_style",
    "variance_ranking",
    "weight_histogram",
]

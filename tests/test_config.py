"""Settings: checked when made, and presets that fit together. The trainer's own are tested with the trainer."""

import pytest

from rlhf_lessons.config import PRESETS, PretrainConfig, RewardConfig


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (PretrainConfig, dict(layers=0), "layers must be a whole number >= 1; got 0"),
        (PretrainConfig, dict(lm_epochs=-1.0), "lm_epochs must be a number > 0; got -1.0"),
        (PretrainConfig, dict(heads=5), "width must be a multiple of heads = 5; got 192"),
        (RewardConfig, dict(num_preferences=2.5), "num_preferences must be a whole number >= 1; got 2.5"),
    ],
)
def test_sizes_are_checked_when_made(config, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_a_response_room_for_its_prompt(preset):
    settings = PRESETS[preset]
    assert settings.pretrain.context > settings.ppo.max_new_tokens + 8

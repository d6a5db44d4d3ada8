"""Settings: checked when made, and presets that fit together. The trainer's own are tested with the trainer."""

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

from rlhf_lessons.config import (
    METHODS,
    PRESETS,
    BestOfNConfig,
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    RLOOConfig,
    Settings,
    TrainerConfig,
    make_settings,
)

METHOD_CONFIGS = (TrainerConfig, PPOConfig, RLOOConfig, GRPOConfig, DPOConfig, BestOfNConfig)
CONFIGS = (*METHOD_CONFIGS, PretrainConfig, RewardConfig, ModelConfig)
FIELDS = [(config, item) for config in CONFIGS for item in fields(config)]
WRONG = {  # type of a default -> what a file or a careless caller may put in its place
    int: ["8", "1e3", 8.0, True, None, [8], math.nan, math.inf, np.float32(8), torch.tensor([8]), 1j],
    float: ["1e-5", "0.1", True, False, None, [0.1], math.nan, -math.inf, np.array([0.1]), torch.tensor(math.nan), 1j],
    bool: ["false", "no", 0, 1, None, np.int64(1)],
    str: [False, None, 0, ["cpu"], b"no", np.array(["no", "linear"]), "other"],
}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (PretrainConfig, dict(layers=0), "layers must be a whole number >= 1; got 0"),
        (PretrainConfig, dict(lm_epochs=-1.0), "lm_epochs must be a number > 0; got -1.0"),
        (PretrainConfig, dict(heads=5), "width must be a multiple of heads = 5; got 192"),
        (PretrainConfig, dict(context=1), "context must be a whole number >= 2; got 1"),
        (PretrainConfig, dict(vocab_size=258), "vocab_size must be a whole number >= 259; got 258"),
        (ModelConfig, dict(lora_rank=-1), "lora_rank must be a whole number >= 0; got -1"),
        (ModelConfig, dict(lora_alpha=4.0), "lora_alpha must be None without lora_rank; got 4.0"),
        (RewardConfig, dict(num_preferences=2.5), "num_preferences must be a whole number >= 1; got 2.5"),
    ],
)
def test_sizes_are_checked_when_made(config, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_a_response_room_for_its_prompt(preset, method):
    settings = make_settings(method, PRESETS[preset])
    assert settings.pretrain.context > settings.method.max_new_tokens + 8
    assert type(settings.method) is METHODS[method]


def test_what_is_given_reaches_every_section_that_has_it_and_no_other():
    settings = make_settings("grpo", {"batch_size": 64, "width": 96, "gamma": 0.5, "reward_epochs": 2.0})
    assert (settings.method.batch_size, settings.pretrain.width, settings.reward.reward_epochs) == (64, 96, 2.0)
    assert not hasattr(settings.method, "gamma"), "the critic's, of which GRPO has none"
    assert make_settings() == Settings()


def test_names_of_settings_are_different_so_that_an_option_means_one():
    for kind in METHODS.values():
        names = [item.name for section in (PretrainConfig, RewardConfig, kind) for item in fields(section)]
        assert len(names) == len({*names})


@pytest.mark.parametrize(("config", "item"), FIELDS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", None)))
def test_a_setting_of_another_type_is_refused_by_its_name(config, item):
    """YAML reads 1e-5 as text and no as False; a truth value counts as 1 wherever nobody looks."""
    optional = item.default is None
    for wrong in WRONG[float if optional else type(item.default)]:
        if not (optional and wrong is None):
            with pytest.raises(ValueError, match=f"^{item.name} must be "):
                config(**{item.name: wrong})


@pytest.mark.parametrize(("config", "item"), FIELDS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", None)))
def test_a_scalar_of_another_library_is_the_number_that_it_holds(config, item):
    """And is kept as Python's, so that it can be written to config.json."""
    default = 0.5 if item.default is None else item.default
    kinds = [np.asarray] if isinstance(default, str) else [np.asarray, np.asarray(default).dtype.type, torch.tensor]
    needed = {"lora_rank": 1} if item.name == "lora_alpha" else {}
    for kind in kinds:
        made = config(**needed | {item.name: kind(default)})
        assert getattr(made, item.name) == pytest.approx(default) and type(getattr(made, item.name)) is type(default)
        json.dumps(asdict(made))


@pytest.mark.parametrize("section", ["pretrain", "reward", "model", "method"])
def test_a_run_s_settings_are_of_their_kinds(section):
    kind = {"method": "SamplingConfig"}.get(section, type(getattr(Settings(), section)).__name__)
    for wrong in (None, {}, Settings()):
        with pytest.raises(ValueError, match=f"^{section} must be a {kind}; got "):
            Settings(**{section: wrong})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        # β falls by a fifth of batch_size / horizon at most: it must stay positive
        (PPOConfig, dict(adaptive_kl_horizon=25), "adaptive_kl_horizon must be more than a fifth of batch_size = 128"),
        (PPOConfig, dict(batch_size=40, minibatch_size=8, adaptive_kl_horizon=8), "adaptive_kl_horizon must be more"),
        (GRPOConfig, dict(adaptive_kl_horizon=1), "adaptive_kl_horizon must be more than a fifth of batch_size = 128"),
        # before an iteration's only step there is no KL to pass
        (PPOConfig, dict(target_kl=0.1, ppo_epochs=1, minibatch_size=128), "target_kl must be None where an iteration"),
        (PPOConfig, dict(batch_size=4, minibatch_size=4, whiten_advantages=False, normalize_scores=True),
         "batch_size must be at least 8 to scale scores; got 4"),
        (GRPOConfig, dict(samples_per_prompt=1), "samples_per_prompt must be a whole number >= 2; got 1"),
        (TrainerConfig, dict(seed=2**63), r"seed must be a whole number >= 0 and below 2\*\*63; got 922"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_together_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(adaptive_kl_target=6.0, **settings)


def test_their_neighbours_that_can_are_not():
    PPOConfig(adaptive_kl_target=6.0, adaptive_kl_horizon=26)
    PPOConfig(adaptive_kl_horizon=1)
    PPOConfig(target_kl=0.1, ppo_epochs=1, minibatch_size=64)
    PPOConfig(target_kl=0.1, ppo_epochs=2, minibatch_size=128)
    PPOConfig(batch_size=8, minibatch_size=8, normalize_scores=True)
    TrainerConfig(seed=2**63 - 1)

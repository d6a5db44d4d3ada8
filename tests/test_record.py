"""What is shipped and committed: the tiny world's models, the recorded runs, and the table of them."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from rlhf_lessons import tiny_sums
from rlhf_lessons.app.options import build_parser, settings_from
from rlhf_lessons.app.run_folder import read_metrics, summary_table
from rlhf_lessons.config import PPOConfig
from rlhf_lessons.models import ASSETS, load_causal_lm

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "figures" / "runs"
BETA = PPOConfig().kl_coef


def load(path):
    """A script as a module; it stands beside what it makes, in no package."""
    spec = spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


record = load(ROOT / "figures" / "record.py")


def summary(kl_coef, seed):
    return json.loads((RUNS / record.run_name(kl_coef, seed) / "summary.json").read_text(encoding="utf-8"))


def test_shipped_models_behave_as_they_are_said_to():
    measured = record.measure_assets(ASSETS)
    assert measured["perplexity"] == pytest.approx(5.63, abs=record.TOLERANCES["perplexity"])
    assert measured["accuracy"] == pytest.approx(0.722, abs=record.TOLERANCES["accuracy"])
    assert measured["gold"] == pytest.approx(1.75, abs=record.TOLERANCES["gold"])
    assert measured["pass@1"] == pytest.approx(0.19, abs=record.TOLERANCES["pass@1"])


@pytest.mark.parametrize("seed", record.SEEDS)
def test_with_the_penalty_gold_rises_by_one_and_a_half_within_twelve_nats(seed):
    run = summary(BETA, seed)
    assert run["after"]["gold"] - run["before"]["gold"] >= 1.5
    assert run["after"]["kl"] <= 12


@pytest.mark.parametrize("seed", record.SEEDS)
def test_without_it_the_proxy_is_above_and_gold_far_below(seed):
    without, with_kl = summary(0.0, seed)["after"], summary(BETA, seed)["after"]
    assert without["score"] > with_kl["score"]
    assert without["gold"] <= with_kl["gold"] - 1.5


def settings_of(words):
    """The settings of a command as it is typed today, by name."""
    sections = asdict(settings_from(build_parser().parse_args(words)))
    return {name: value for section in sections.values() for name, value in section.items()}


RECORDED = {record.run_name(b, seed): record.run_words(b, seed) for b in record.KL_COEFS for seed in record.SEEDS} | {
    record.method_name(m, seed): record.method_words(m, seed) for m in record.OTHERS for seed in record.SEEDS
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_were_made_with_the_settings_of_today(name):
    folder, today = RUNS / name, settings_of(RECORDED[name])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sections = [section for name, section in config.items() if isinstance(section, dict) and name != "made_by"]
    recorded = {name: value for section in sections for name, value in section.items()}
    assert recorded == recorded | today and config["threads"] == 1
    assert len(read_metrics(folder)) == (
        today["num_iterations"] if "num_iterations" in today else 1 + math.log2(today["n"])
    )


def test_the_page_of_figures_says_what_was_recorded():
    shown = [record.run_name(b, seed) for b in (BETA, 0.0) for seed in record.SEEDS]
    shown += [record.method_name(method, seed) for method in record.OTHERS for seed in record.SEEDS]
    rows = summary_table([RUNS / name for name in shown]).splitlines()
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8").replace("−", "-")
    for row in rows[2:]:
        assert row.split("|", 2)[2].strip() in page, row
    assert record.gold_table(RUNS).replace("−", "-") in page


def test_gold_at_a_kl_lies_on_the_line_between_two_iterations():
    rows = [{"kl": kl, "gold": gold} for kl, gold in ((0.0, 0.0), (1.0, 0.4), (3.0, 1.0), (2.0, 9.0), (5.0, 2.0))]
    assert [record.gold_at(rows, nats) for nats in (0.5, 2.0, 4.0, 6.0)] == [
        pytest.approx(0.2), pytest.approx(0.7), pytest.approx(9.0 - 7 * 2 / 3), None,
    ]  # fmt: skip


def test_the_pictures_are_drawn_from_the_recorded_runs(tmp_path):
    record.draw_figures(tmp_path, RUNS)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "figures").glob("*.png")}


@pytest.mark.slow
def test_a_run_is_recorded_by_the_command_that_it_names(monkeypatch, tmp_path):
    short = "--num-iterations 1 --batch-size 8 --minibatch-size 8 --num-preferences 16 --device cpu".split()
    type_in = record.type_in
    monkeypatch.setattr(record, "type_in", lambda folder, *words: type_in(folder, *words, *short))
    record.record_runs(tmp_path, kl_coefs=(0.5,), seeds=(9,), methods=())
    made = tmp_path / "kl0.5-seed9"
    assert {path.name for path in made.iterdir()} == set(record.RECORDED_FILES)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    typed = ["python", "-m", "rlhf_lessons", *record.run_words(0.5, 9), "--out", "kl0.5-seed9", *short]
    assert config["made_by"]["command"] == typed and (config["ppo"]["kl_coef"], config["ppo"]["seed"]) == (0.5, 9)
    with pytest.raises(ValueError, match="^python -m rlhf_lessons run .* failed with exit code 2$"):
        record.type_in(tmp_path, "run", "--model", "./none")


def test_the_shipped_models_come_from_the_commands_that_are_typed(monkeypatch, tmp_path):
    typed = []

    def type_in(folder, *words):
        typed.append(list(words))
        for name, made in record.MADE.items():
            (folder / made).mkdir(parents=True, exist_ok=True)
            (folder / made / "from").write_text(name)

    monkeypatch.setattr(record, "type_in", type_in)
    monkeypatch.setattr(
        record, "build_sums_model", lambda folder: (folder.mkdir(), (folder / "from").write_text("sums"))
    )
    record.build_assets(tmp_path)
    names = [*record.MADE, "sums"]
    assert {path.name: (path / "from").read_text() for path in tmp_path.iterdir()} == {n: n for n in names}
    (pretrain, run), config = typed, load_causal_lm(ASSETS / "base").config
    sizes = dict(layers=config.n_layer, width=config.n_embd, heads=config.n_head, context=config.n_positions)
    assert settings_of(pretrain) == settings_of(["pretrain"]) | sizes | dict(
        lm_epochs=1.0, lm_batch_size=64, lm_learning_rate=4e-3, seed=1
    )
    assert settings_of(run) == settings_of(["run"])


def test_the_model_of_sums_is_trained_on_what_the_recorder_says(monkeypatch, tmp_path):
    small = ({"texts": 64, "right": 1.0, "learning_rate": 1e-3}, {"texts": 64, "right": 0.25, "learning_rate": 1e-3})
    fits, fit = [], record.fit_language_model
    monkeypatch.setattr(record, "SUMS_FITS", small)
    monkeypatch.setattr(record, "fit_language_model", lambda *a, **kw: fits.append((a[1], kw)) or fit(*a, **kw))
    record.build_sums_model(tmp_path)
    shares = [sum(text.split("= ")[1] == tiny_sums.answer(text.split("=")[0] + "=") for text in texts) / 64
              for texts, _ in fits]  # fmt: skip
    assert shares[0] == 1 and 0.05 < shares[1] < 0.5 and {kw["seed"] for _, kw in fits} == {2}
    made, shipped = (json.loads((at / "config.json").read_text()) for at in (tmp_path, ASSETS / "sums"))
    assert made | {"transformers_version": ""} == shipped | {"transformers_version": ""}


SUMS = json.loads((ROOT / "figures" / "tiny_sums" / "sums.json").read_text(encoding="utf-8"))


def test_the_recorded_runs_on_sums_were_made_with_the_settings_of_today():
    assert SUMS["settings"] == record.SUMS_SETTINGS
    assert SUMS["before"] == record.pass_at(load_causal_lm(ASSETS / "sums"))


@pytest.mark.parametrize("seed", record.SEEDS)
def test_the_recorded_runs_on_sums_solve_most_of_what_they_were_not_trained_on(seed):
    run = SUMS["runs"][seed]
    assert run["seed"] == seed and run["seconds"] < 60
    for split in tiny_sums.SPLITS:
        curve = run["pass@1"][split]
        assert len(curve) == 61 and curve[0] == SUMS["before"][split]["1"] < 0.3
        assert curve[-1] == run["after"][split]["1"] > 0.85
        assert min(SUMS["before"][split]["64"], run["after"][split]["64"]) > 0.95


def test_a_run_on_sums_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "SUMS_SETTINGS", record.SUMS_SETTINGS | {"num_iterations": 1})
    record.sums(tmp_path, seeds=(0,))
    made = json.loads((tmp_path / "sums.json").read_text(encoding="utf-8"))
    assert made["before"] == SUMS["before"] and made["runs"][0].keys() == SUMS["runs"][0].keys()
    assert (
        made["runs"][0]["pass@1"]["train"][0] == SUMS["before"]["train"]["1"] < made["runs"][0]["after"]["train"]["1"]
    )


def test_finished_runs_are_left_as_they_are(tmp_path):
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "kl0.5-seed9").mkdir(exist_ok=True)
        (tmp_path / "kl0.5-seed9" / name).write_text("kept")
    record.record_runs(tmp_path, kl_coefs=(0.5,), seeds=(9,), methods=())
    assert (tmp_path / "kl0.5-seed9" / "summary.json").read_text() == "kept"


def test_what_is_asked_for_is_made_where_it_is_asked_for(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(record, "figures", lambda folder: made.append(("figures", folder)))
    monkeypatch.setattr(record, "rebuild_assets", lambda folder: made.append(("assets", folder)))
    monkeypatch.setattr(record, "sums", lambda folder: made.append(("sums", folder)))
    assert [record.main([what]) for what in ("figures", "assets", "sums")] == [0, 0, 0]
    assert record.main(["assets", "--out", str(tmp_path)]) == 0
    default = [("figures", ROOT / "figures"), ("assets", Path("runs/assets")), ("sums", ROOT / "figures" / "tiny_sums")]
    assert made == [*default, ("assets", tmp_path)]


def test_rebuilt_models_that_differ_are_an_error(monkeypatch, tmp_path, capsys):
    shipped = {"perplexity": 5.0, "accuracy": 0.7, "gold": 1.7, "pass@1": 0.2}
    measured = iter([shipped, shipped | {"accuracy": 0.75}])
    monkeypatch.setattr(record, "build_assets", lambda folder: None)
    monkeypatch.setattr(record, "measure_assets", lambda folder: next(measured))
    assert record.main(["assets", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "| accuracy | 0.700 | 0.750 | 0.04 |" in printed.out.splitlines()
    assert printed.err == f"error: the models rebuilt in {tmp_path} do not behave as the shipped ones\n"


@pytest.mark.parametrize("arguments", [["pictures"], [], ["figures", "--in", "here"]])
def test_what_is_not_understood_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        record.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1


def test_it_is_run_from_the_repository():
    run = [sys.executable, "figures/record.py", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: python figures/record.py "), done.stderr


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(record, "type_in")
    (tmp_path / "file").touch()
    assert record.main(["assets", "--out", str(tmp_path / "file" / "below")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_rebuilt_models_behave_as_the_shipped_ones(tmp_path):
    record.rebuild_assets(tmp_path)  # raises where they differ

"""Experiment trackers: each is told what metrics.jsonl holds, and none can end a run that is under way."""

import json
import sqlite3

import pytest

from rlhf_lessons.app import trackers
from rlhf_lessons.app.align import optimise
from rlhf_lessons.app.run_folder import RunFolder, read_metrics
from rlhf_lessons.app.trackers import hyperparameters, tracked

SETTINGS = {"sources": {"model": None}, "ppo": {"kl_coef": 0.1, "whiten": True, "seed": 7}, "list": [1, "a"], "n": "x"}


@pytest.fixture
def folder(tmp_path):
    """A run's folder as it is when the trackers are asked to follow."""
    folder = RunFolder(tmp_path / "first")
    folder.write_json("config.json", SETTINGS)
    return folder


def test_settings_are_told_as_numbers_and_texts():
    assert hyperparameters(SETTINGS) == {
        "sources/model": "None", "ppo/kl_coef": 0.1, "ppo/whiten": True, "ppo/seed": 7, "list": "[1, 'a']", "n": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbee", "log_with must be one of aim, tensorboard, wandb, .*; got 'wandbee'"),
        ("comet_ml", "log_with must be installed: pip install comet-ml; got 'comet_ml'"),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_said(name, message, folder, monkeypatch):
    known = trackers.known_trackers() | {"comet_ml": False}
    assert {"tensorboard", "wandb", "trackio", "mlflow"} <= known.keys() and "all" not in known
    monkeypatch.setattr(trackers, "known_trackers", lambda: known)
    with pytest.raises(ValueError, match=message), tracked([name], folder.path, device="cpu"):
        raise AssertionError("the run has begun")


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder):
    """Every scalar in a folder's event files, read back by TensorBoard itself: name -> [(step, value), …]."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def trained(folder, make_trainer, *names, **settings):
    """A short run that these trackers follow."""
    with tracked(names, folder.path, device="cpu") as folder.follow:
        optimise(make_trainer(**settings), folder, gold=False)
    return read_metrics(folder.path)


def test_tensorboard_holds_what_metrics_jsonl_does(folder, make_trainer):
    """Each number at its iteration, to float32 and the six digits of the file; what is measured at times too."""
    rows = trained(folder, make_trainer, "tensorboard", eval_prompts=["film", "good"], eval_every=3)
    found = events(folder.path / "tensorboard")
    assert found.keys() == {name for row in rows for name in row} - {"iteration"} and "eval_score" in found
    for name, seen in found.items():
        wanted = [(row["iteration"], row[name]) for row in rows if name in row]
        assert [step for step, _ in seen] == [step for step, _ in wanted]
        assert [value for _, value in seen] == pytest.approx([value for _, value in wanted], rel=1e-6, abs=6e-7)
    assert [step for step, _ in found["eval_score"]] == [3, 4]
    (told,) = (folder.path / "tensorboard").glob("*/hparams.yml")
    assert "ppo/kl_coef: 0.1\n" in told.read_text() and "sources/model: None\n" in told.read_text()


def test_a_run_that_goes_on_is_logged_from_its_iteration(folder, make_trainer):
    for first in (1, 3):
        with tracked(["tensorboard"], folder.path, device="cpu") as follow:
            for iteration in (first, first + 1):
                follow(iteration, {"kl": iteration / 4})
    assert events(folder.path / "tensorboard") == {"kl": [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]}


# --- Trackers that fail -----------------------------------------------------------------------------------------------


class Recorder:
    """In an accelerator's place: notes what it is told, and raises what it was given at a call of that name."""

    def __init__(self, name, fails=None):
        self.name, self.fails, self.told = name, fails, []

    def __getattr__(self, call):
        def note(*arguments, **options):
            self.told.append((call, *arguments, *options.values()))
            if call == self.fails:
                raise OSError(28, "No space left on device")

        return note


@pytest.fixture
def recorders(monkeypatch):
    """recorders(wandb=None, trackio="log"): two trackers, the second of which fails at `log`."""

    def use(**fails):
        made = {name: Recorder(name, fails=call) for name, call in fails.items()}
        monkeypatch.setattr(trackers, "known_trackers", lambda: dict.fromkeys(made, True))
        monkeypatch.setattr(trackers, "make_accelerator", lambda device, log_with, project_dir: made[log_with])
        return made

    return use


def test_a_tracker_that_fails_is_said_once_and_left_out(folder, make_trainer, recorders, capsys):
    made = recorders(wandb="log", trackio=None)
    rows = trained(folder, make_trainer, *made, num_iterations=3)
    assert len(rows) == 3 and (folder.path / "summary.json").exists()
    assert [call for call, *_ in made["wandb"].told] == ["init_trackers", "log"]
    assert [call for call, *_ in made["trackio"].told] == ["init_trackers", "log", "log", "log", "end_training"]
    said = [line for line in capsys.readouterr().err.splitlines() if "nothing more is logged" in line]
    assert said == ["wandb: nothing more is logged: OSError: [Errno 28] No space left on device"]
    (_, project, settings, own), *logged, _ = made["trackio"].told
    assert project == "rlhf_lessons" and settings == hyperparameters(SETTINGS) and own["trackio"] == {"name": "first"}
    assert [step for *_, step in logged] == [1, 2, 3] and logged[0][1]["kl"] == pytest.approx(rows[0]["kl"], abs=1e-6)


def test_a_tracker_that_cannot_begin_is_said_before_anything_long(folder, recorders):
    recorders(wandb="init_trackers")
    with pytest.raises(ValueError, match="log_with must name trackers that can begin; got wandb: .*No space left"):
        with tracked(["wandb"], folder.path, device="cpu"):
            raise AssertionError("the run has begun")


@pytest.mark.parametrize("fails", [None, "end_training"])
def test_trackers_end_with_a_run_that_fails_and_do_not_hide_why(fails, folder, recorders):
    made = recorders(wandb=fails)
    with pytest.raises(KeyboardInterrupt), tracked(["wandb"], folder.path, device="cpu"):
        raise KeyboardInterrupt
    assert made["wandb"].told[-1] == ("end_training",)


def test_a_disk_that_fills_up_under_tensorboard_ends_no_run(folder, make_trainer, monkeypatch, capsys):
    """The event file is written by a thread of its own, whose error comes out at a later call."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    written, write = [], RecordWriter.write

    def fill_up(self, data):
        written.append(len(data))
        if sum(written) > 5000:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill_up)
    monkeypatch.setattr("threading.excepthook", lambda failed: None)
    assert len(trained(folder, make_trainer, "tensorboard", num_iterations=9)) == 9
    assert capsys.readouterr().err.count("tensorboard: nothing more is logged: OSError") == 1


# --- Those that may not be installed ----------------------------------------------------------------------------------


def test_wandb_without_a_network(folder, make_trainer, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, step: logged.append((step, data)) or log(run, data, step))
    rows = trained(folder, make_trainer, "wandb", num_iterations=2)
    assert [(step, data["kl"]) for step, data in logged] == [
        (row["iteration"], pytest.approx(row["kl"], abs=1e-6)) for row in rows
    ]
    assert list(folder.path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_in_a_folder_of_its_own(folder, make_trainer, monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    rows = trained(folder, make_trainer, "trackio", num_iterations=2)
    (database,) = (tmp_path / "trackio").glob("rlhf_lessons*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in found] == [("first", 1), ("first", 2)]
    for row, (*_, metrics) in zip(rows, found, strict=True):
        assert json.loads(metrics)["score"] == pytest.approx(row["score"], abs=1e-6)

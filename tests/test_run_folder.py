"""A run's folder: what is written is whole or not there; and the run's pictures and tables."""

import contextlib
import json
import math
import resource

import pytest

from rlhf_lessons.app.run_folder import RunFolder, draw_run, mean_of_last, read_metrics, samples_table, summary_table


@contextlib.contextmanager
def disk_of(size):
    """No file can grow beyond `size` bytes: the system's own short writes and errors, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Saved:
    """Something with save_pretrained that writes one file, and raises what it is told to half-way."""

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text("half")
        if self.error is not None:
            raise self.error
        (folder / self.name).write_text("whole")


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_anything_is_refused(tmp_path):
    RunFolder(tmp_path / "runs" / "new").write_json("config.json", {})
    folder = RunFolder(tmp_path / "runs" / "new")  # nothing but settings: that run made nothing
    folder.write_text("metrics.jsonl", "")
    with pytest.raises(ValueError, match="--out must be a new or an empty folder; .*new already holds metrics.jsonl"):
        RunFolder(tmp_path / "runs" / "new")


def test_of_two_runs_begun_at_once_the_later_one_leaves_the_folder_as_it_was(tmp_path):
    """Both were begun while it was empty; the one has ended, or has stopped after its first checkpoint."""
    first, second, third = (RunFolder(tmp_path) for _ in range(3))
    with first.in_use():
        first.write_json("config.json", {"seed": 0})
        with pytest.raises(ValueError, match="another process is at work in this folder"), second.in_use():
            pass
        first.write_text("metrics.jsonl", "")
    before = names(tmp_path)
    assert before == ["config.json", "metrics.jsonl"]
    with pytest.raises(ValueError, match="another process has been at work in this folder"), second.in_use():
        pass
    assert names(tmp_path) == before
    first.state.parent.mkdir()
    first.state.write_text("kept")
    with pytest.raises(ValueError, match="another process has been at work in this folder"), third.in_use():
        pass
    assert first.state.read_text() == "kept"
    with RunFolder(tmp_path, new=False).in_use():
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_what_could_not_be_written_whole_is_not_there(error, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_text("note.txt", "old")
    with pytest.raises(type(error)), folder.whole("note.txt") as partial:
        partial.write_text("ne")
        raise error
    with pytest.raises(type(error)), folder.whole("figures") as partial:
        partial.mkdir()
        (partial / "a.png").write_text("half")
        raise error
    assert names(tmp_path) == ["note.txt"] and (tmp_path / "note.txt").read_text() == "old"


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    folder = RunFolder(tmp_path)
    with disk_of(10), pytest.raises(OSError) as raised:
        folder.write_json("config.json", {"a": "long enough"})
    assert raised.value.filename == str(tmp_path / "config.json") and names(tmp_path) == []


@pytest.mark.parametrize("size", range(30, 110, 7))
def test_metrics_keep_whole_lines_on_a_full_disk(size, tmp_path):
    """A disk that fills up within a line keeps the part that fits, unless it is taken back."""
    folder = RunFolder(tmp_path)
    with disk_of(size), pytest.raises(OSError) as raised:
        for iteration in range(1, 10):
            folder.append_metrics(iteration, {"kl": 1.25})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = len('{"iteration": 1, "kl": 1.25}\n')
    assert len(text) == size // line * line
    assert [json.loads(row)["iteration"] for row in text.splitlines()] == list(range(1, size // line + 1))
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
    folder.append_metrics(99, {"kl": 2.0})
    assert read_metrics(tmp_path)[-1] == {"iteration": 99, "kl": 2.0}


def test_who_follows_a_run_is_told_of_a_line_once_it_is_written(tmp_path):
    folder, told = RunFolder(tmp_path), []
    folder.follow = lambda iteration, metrics: told.append((iteration, metrics, read_metrics(tmp_path)[-1]["kl"]))
    folder.append_metrics(1, {"kl": 1.23456789})
    with disk_of(30), pytest.raises(OSError):
        folder.append_metrics(2, {"kl": 2.0})
    assert told == [(1, {"kl": 1.23456789}, 1.234568)]


def test_models_of_one_folder_are_saved_together(tmp_path):
    path = RunFolder(tmp_path).save_models("policy", Saved("model"), Saved("tokenizer"))
    assert path == tmp_path / "policy" and names(tmp_path) == ["policy", "policy/model", "policy/tokenizer"]
    assert (path / "model").read_text() == "whole"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left on device"), OSError, "No space left on device: '.*policy'"),
        (Exception("No space left on device (os error 28)"), ValueError, "cannot write .*policy: No space left"),
    ],
)
def test_models_are_saved_whole_or_not_at_all(error, expected, message, tmp_path):
    """tokenizers reports a full disk by a plain Exception, safetensors by one of its own."""
    with pytest.raises(expected, match=message):
        RunFolder(tmp_path).save_models("policy", Saved("model"), Saved("tokenizer", error))
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [100, 5000])  # too little for a configuration, for weights
def test_real_checkpoints_on_a_full_disk(size, make_lm, tokenizer, tmp_path):
    with disk_of(size), pytest.raises((OSError, ValueError), match="File too large"):
        RunFolder(tmp_path).save_models("policy", make_lm(), tokenizer)
    with disk_of(size // 4), pytest.raises((OSError, ValueError), match="File too large"):
        RunFolder(tmp_path).save_models("policy", tokenizer)
    assert names(tmp_path) == []


def strictly(text):
    """The text read by a program that knows no numbers but JSON's."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_finite_number_is_written_as_null(tmp_path):
    folder, inf = RunFolder(tmp_path), math.inf
    folder.append_metrics(1, {"kl": math.nan, "score": -inf, "loss": 0.25})
    folder.write_json("summary.json", {"before": {"score_std": math.nan}, "list": [1, (inf, "NaN")], "name": "é"})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert strictly(line) == {"iteration": 1, "kl": None, "score": None, "loss": 0.25}
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert strictly(text) == {"before": {"score_std": None}, "list": [1, [None, "NaN"]], "name": "é"} and "é" in text
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["kl"]) and math.isnan(row["score"]) and row["loss"] == 0.25


def test_an_argument_that_is_no_text_can_be_written(tmp_path):
    """A shell may pass on bytes that are no UTF-8; Python stands for each by half of a surrogate pair."""
    RunFolder(tmp_path).write_json("config.json", {"command": ["caf\udce9"]})
    assert strictly((tmp_path / "config.json").read_text(encoding="utf-8")) == {"command": ["caf\udce9"]}


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_metrics_are_read_up_to_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for cut in ('{"iterat', "1", ""):
        path.write_text('{"iteration": 1, "kl": 0.5}\n{"iteration": 2, "kl": 0.75}\n' + cut)
        rows = [{"iteration": 1, "kl": 0.5}, {"iteration": 2, "kl": 0.75}]
        assert read_metrics(path) == read_metrics(tmp_path) == rows


def test_mean_is_of_the_last_rows_or_of_all_there_are():
    rows = [{"kl": float(value)} for value in (100, 1, 2, 3, 4, 5)]
    assert mean_of_last(rows, "kl") == 3.0 and mean_of_last(rows, "kl", last=2) == 4.5
    assert mean_of_last(rows[:2], "kl") == 50.5
    with pytest.raises(ValueError, match="rows must hold at least one iteration; got none"):
        mean_of_last([], "kl")


# --- Samples, pictures, tables ----------------------------------------------------------------------------------------


def sample(prompt, before, after):
    return {"prompt": prompt, "before": before, "after": after}


def test_samples_stand_side_by_side():
    samples = [
        sample(
            "the plot was", {"text": "bad .", "score": -1, "gold": 0.5}, {"text": "a|b\n\r c", "score": 2, "gold": 0}
        ),
        sample("", {"text": "", "score": 0, "gold": 0}, {"text": "x", "score": 1.006, "gold": 0}),
    ]
    table = samples_table(samples)
    assert "**the plot was** …" in table and "**(begin token alone)** …" in table
    rows = [line for line in table.splitlines() if line.startswith(("| before", "| after"))]
    assert rows[:2] == ["| before | -1.00 | 0.50 | bad . |", "| after | 2.00 | 0.00 | a\\|b c |"]
    assert rows[3] == "| after | 1.01 | 0.00 | x |"
    lines = samples_table([sample("def f(x):\n    ", samples[0]["before"], samples[0]["after"])]).splitlines()
    assert "**def f(x):** …" in lines
    assert "gold" not in samples_table([sample("a", {"text": "b", "score": 1}, {"text": "c", "score": 2})])


ROWS = [
    {
        "iteration": i,
        "score": i,
        "gold": 1 / i,
        "kl": i / 2,
        "entropy": 2.0,
        "clip_fraction": 0.1,
        "explained_variance": 0,
    }
    for i in (1, 2, 3)
]
PER_TOKEN = {"reward": [0.0, 1.0], "kl": [0.1, 0.2], "value": [0.5, 0.6], "advantage": [-1.0, 1.0]}
PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_are_drawn_together(tmp_path):
    draw_run(RunFolder(tmp_path), ROWS, ["good", "$a^$<b>|"], PER_TOKEN)
    assert names(tmp_path) == ["figures", "figures/tokens.png", "figures/training.png"]
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def test_curves_show_what_is_asked_of_a_run():
    from rlhf_lessons import plots

    labels = ""
    for ax in plots.training_curves(ROWS).axes:
        labels += " ".join([ax.get_ylabel(), *ax.get_legend_handles_labels()[1], ""])
    for asked in ("proxy", "gold", "KL", "entropy", "clip", "explained variance"):
        assert asked in labels


def test_pictures_are_drawn_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path)
    with disk_of(3000), pytest.raises(OSError):
        draw_run(folder, ROWS, ["good", "."], PER_TOKEN)
    assert names(tmp_path) == []


def write_run(folder, *, finished, gold=True, done=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"ppo": {"kl_coef": 0.05, "seed": 3, "num_iterations": 9}}))
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n' * done)
    numbers = {"score": 1.0, "kl": 4.0} | ({"gold": -0.5} if gold else {})
    if finished:
        (folder / "summary.json").write_text(json.dumps({"before": numbers, "after": numbers}))
    return folder


def test_summary_has_a_row_per_run_and_tells_which_were_stopped(tmp_path):
    folders = [
        write_run(tmp_path / "a", finished=True),
        write_run(tmp_path / "b", finished=True, gold=False),
        write_run(tmp_path / "c", finished=False),
    ]
    assert summary_table(folders).splitlines()[2:] == [
        "| a | ppo | 0.05 | 3 | 1.00 → 1.00 | -0.50 → -0.50 | 4.0 |",
        "| b | ppo | 0.05 | 3 | 1.00 → 1.00 | – | 4.0 |",
        "| c | ppo | 0.05 | 3 | stopped after 2 of 9 iterations | – | – |",
    ]


def test_a_summary_tells_methods_apart(tmp_path):
    folder = write_run(tmp_path / "a", finished=True)
    for method, settings, beta in (("grpo", {"kl_coef": 0.2, "seed": 1}, "0.2"), ("best-of-n", {"seed": 1}, "–")):
        (folder / "config.json").write_text(json.dumps({"method": method, method: settings}))
        expected = f"| a | {method} | {beta} | 1 | 1.00 → 1.00 | -0.50 → -0.50 | 4.0 |"
        assert summary_table([folder]).splitlines()[2] == expected


def test_a_summary_may_hold_what_is_no_number(tmp_path):
    folder = write_run(tmp_path / "a", finished=True)
    numbers = {"score": None, "kl": None}
    (folder / "summary.json").write_text(json.dumps({"before": numbers, "after": numbers}))
    assert summary_table([folder]).splitlines()[2] == "| a | ppo | 0.05 | 3 | nan → nan | – | nan |"


def test_summary_refuses_a_summary_of_another_kind(tmp_path):
    folder = write_run(tmp_path / "a", finished=True)
    for text in ("[]", "{}", '{"before": 3, "after": 3}', '{"before": {}, "after": {}}', "{"):
        (folder / "summary.json").write_text(text)
        with pytest.raises(ValueError, match="a: holds no run"):
            summary_table([folder])


@pytest.mark.parametrize("config", [None, "{", "{}", "[]", '{"ppo": {}}'])
def test_summary_refuses_what_is_no_run(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no run"):
        summary_table([tmp_path])

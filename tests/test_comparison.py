"""`compare`: the settings in which runs differ, what came of each, and one picture of all."""

import json

from rlhf_lessons.__main__ import main
from rlhf_lessons.app.comparison import compare


def write_run(path, method="ppo", *, rows=3, finished=True, **settings):
    path.mkdir(parents=True)
    config = {"method": method, method: {"seed": 0, "num_iterations": 9} | settings, "critic": "shared"}
    config |= {
        "sources": {"prompts": "a|b.txt"},
        "inputs": {"prompts": f"{len(settings)}" * 64},
        "made_by": {"gpu": path.name},
    }
    (path / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"iteration": i, "score": i / 2, "kl": None if i == 2 else 1.0}) for i in range(1, rows + 1)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if finished:
        numbers = {"before": {"score": -1.0}, "after": {"score": rows / 2, "kl": 1.25}}
        (path / "summary.json").write_text(json.dumps(numbers))
    return path


def test_a_table_has_what_differs_and_what_came_of_it(tmp_path, capsys):
    """Runs of other methods and lengths, and one that was stopped."""
    runs = [
        write_run(tmp_path / "a", kl_coef=0.1),
        write_run(tmp_path / "b", kl_coef=0.25, rows=5),
        write_run(tmp_path / "c", "best-of-n", finished=False, rows=1),
    ]
    out = tmp_path / "all.png"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    table, _, said = capsys.readouterr().out.rstrip("\n").rpartition("\n\n")
    assert table.splitlines() == [
        "|  | a | b | c |",
        "| --- | --- | --- | --- |",
        "| method | ppo | ppo | best-of-n |",
        "| kl_coef | 0.1 | 0.25 | – |",
        "| prompts (SHA-256) | 111111111111 | 111111111111 | 000000000000 |",
        "| proxy reward | -1.00 → 1.50 | -1.00 → 2.50 | stopped after 1 of 9 iterations |",
        "| gold reward | – | – | – |",
        "| KL (nats) | 1.2 | 1.2 | – |",
    ]
    assert said == f"written to {out}" and out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path):
    runs = [write_run(tmp_path / where / "run", seed=seed) for seed, where in enumerate("xy")]
    head, _, seeds, *_ = compare(runs, tmp_path / "out.png").splitlines()
    assert head == f"|  | {runs[0]} | {runs[1]} |" and seeds == "| seed | 0 | 1 |"


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    """In one line; nothing that is there is written over, and no picture is left behind."""
    a, b, empty = write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "empty", rows=0)
    kept, new = tmp_path / "kept.png", tmp_path / "new.png"
    kept.write_text("mine")
    (tmp_path / "none").mkdir()
    for arguments, said in (
        ([a], "FOLDER must name two runs or more, each once; got a"),
        ([a, a], "FOLDER must name two runs or more, each once; got "),
        ([a, tmp_path / "none"], f"{tmp_path / 'none'}: holds no run (No such file or directory)"),
        ([a, empty], f"{empty}: holds no run (ValueError: rows must hold at least one iteration; got none)"),
        ([a, b, "--out", kept], f"--out must be a new file that ends in .png; got {kept}"),
        ([a, b, "--out", tmp_path / "x.jpg"], "--out must be a new file that ends in .png; got "),
    ):
        words = [*map(str, arguments)] + ([] if "--out" in arguments else ["--out", str(new)])
        assert main(["compare", *words]) == 2
        assert capsys.readouterr().err.startswith(f"\nerror: {said}")
    assert kept.read_text() == "mine" and not new.exists() and not (tmp_path / "x.jpg").exists()

"""Where models run: a device is one that the machine has, and the process is tuned by a command's start alone."""

from pathlib import Path

import pytest
import torch

import rlhf_lessons
from rlhf_lessons import device
from rlhf_lessons.__main__ import main
from rlhf_lessons.device import autocast, end_processes, make_accelerator
from rlhf_lessons.fitting import fit_language_model


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, mps; got 'tpu'"):
        make_accelerator("tpu")
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device must be one that this machine has; got '{absent}'"):
        make_accelerator(absent)


def test_memory_is_kept_by_a_command_alone(monkeypatch, make_trainer, make_lm, tokenizer, tmp_path):
    """It changes the whole process, which a library that somebody imports has no business to."""
    calls = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: calls.append("kept"))
    make_trainer().step()
    fit_language_model(make_lm(), ["film"], tokenizer, epochs=1, device="cpu")
    assert main(["summary", str(tmp_path)]) == 2 and calls == []
    assert main(["pretrain", "--corpus", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 2
    assert calls == ["kept"]
    package = Path(rlhf_lessons.__file__).parent
    named_in = {path.name for path in package.rglob("*.py") if "keep_freed_memory" in path.read_text(encoding="utf-8")}
    assert named_in == {"device.py", "__main__.py"}


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ("run", [1]),
        ("pretrain", [1]),
        ("run --threads 3", [3]),
        ("run --corpus none.txt", []),
        ("ppo --model none --score math:prod", []),
        ("ppo --model none --score math:prod --threads 2", [2]),
        ("sample --count 0", [1]),
    ],
)
def test_the_tiny_world_takes_one_thread_unless_told_otherwise(options, threads, monkeypatch, tmp_path):
    """What comes after the start fails at once: the folder to write to is taken, or no response is to be shown."""
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    (tmp_path / "taken").write_text("")
    command, *others = options.split()
    out = [] if command == "sample" else ["--out", str(tmp_path)]
    assert main([command, *others, *out]) == 2
    assert calls == threads


def test_no_thread_at_all_is_refused(capsys):
    assert main(["run", "--threads", "0"]) == 2
    assert "threads must be a whole number >= 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp16", "BF16", None, False, "float32"])
def test_a_precision_that_nobody_knows_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision must be no, or bf16 where cpu has it; got {precision!r}"):
        autocast(torch.device("cpu"), precision)


def test_bf16_is_refused_where_the_device_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"precision must be no, or bf16 where {name} has it; got 'bf16'"):
            autocast(torch.device(name), "bf16")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")


def test_a_group_of_one_process_is_left_to_the_engine_that_made_it(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        end_processes()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()

"""The Makefile: `make` alone lists what there is to make, and each target sets up what it needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = ROOT / "Makefile"
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.M)[1].split()


def make(*arguments):
    """What it prints, as when it is not started by another make."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_every_target_with_a_word_on_it():
    listed = re.findall(r"^  make ([\w-]+) +(\S.*)$", printed := make(), re.M)
    assert sorted(name for name, _ in listed) == sorted(TARGETS)
    assert make("help") == printed


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"help", "clean"}))
def test_a_target_sets_up_its_environment(target):
    assert re.search(rf"^{target}: \$\(READY\)", MAKEFILE.read_text(encoding="utf-8"), re.M)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_gpu_s_parts_run_with_another_python_where_nothing_can_be_installed():
    given = ["PY=other", "READY=", "CORPUS=a.txt", "PREFERENCES=b.jsonl", "GPU=out"]
    planned = make("--dry-run", "gpu", *given)
    assert "venv" not in planned and "other -m pytest tests/test_static.py" in planned
    assert "other -u -m rlhf_lessons run --preset small --corpus a.txt --preferences b.jsonl" in planned
    assert "other tests/bench --gpu --out out" in planned


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("stands", "set_up_anew"),
    [("here", False), ("elsewhere", True), ("nothing", True), (None, True)],
    ids=["in its place", "moved", "of an older kind", "new"],
)
def test_a_folder_that_was_moved_is_set_up_anew(stands, set_up_anew, tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ready = tmp_path / ".venv" / ".ready"
    if stands is not None:
        ready.parent.mkdir()
        ready.write_text({"here": f"{tmp_path}\n", "elsewhere": f"{tmp_path}x\n", "nothing": ""}[stands])
        later = 60 + max(path.stat().st_mtime for path in tmp_path.iterdir())
        os.utime(ready, (later, later))
    planned = make("--dry-run", "lint", "-C", str(tmp_path))
    assert ("-m venv" in planned) == set_up_anew
    assert ("--clear" in planned) == (set_up_anew and stands is not None)
    assert f'echo "{tmp_path}" > .venv/.ready' in planned or not set_up_anew

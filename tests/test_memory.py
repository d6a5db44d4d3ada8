"""Long runs do not grow: what a process holds, measured while the command's own run goes on."""

import os
from pathlib import Path

import pytest

from rlhf_lessons import __main__ as commands
from rlhf_lessons.app import align
from rlhf_lessons.models import ASSETS

STATM = Path("/proc/self/statm")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads what a process holds from /proc")
def test_the_second_half_of_500_iterations_takes_no_more_memory(tmp_path, monkeypatch):
    held, add = [], align.History.add

    def measured(*arguments):
        add(*arguments)
        held.append(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(align.History, "add", measured)
    options = ["--num-iterations", "500", "--reward-model", str(ASSETS / "reward_model")]
    assert commands.main(["run", *options, "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    half = held[250:]
    print(f"{held[0] / 2**20:.0f} MiB at first, {half[0] / 2**20:.1f} to {half[-1] / 2**20:.1f} in the second half")
    assert len(held) == 500 and max(half) <= 1.01 * min(half)

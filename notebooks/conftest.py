"""How the notebooks run under nbval: offline, stopping at a notebook's first failing cell.

nbval alone runs the cells after a failure too, whose errors bury the first one, and notices a dead
kernel only at the cell's timeout.
"""

import os
from queue import Empty
from time import monotonic

import nbval.plugin
import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

FAILED_CELL = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        item.parent.stash.setdefault(FAILED_CELL, item.name)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if FAILED_CELL in item.parent.stash:
        pytest.skip(f"{item.parent.stash[FAILED_CELL]} of this notebook failed")


class WatchedKernel(nbval.plugin.RunningKernel):
    """A kernel that is asked, after each second of silence, whether it is still alive."""

    def get_message(self, stream, timeout=None):
        deadline = monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return super().get_message(stream, timeout=max(0, min(1, deadline - monotonic())))
            except Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died while this cell ran") from None
                if monotonic() >= deadline:
                    raise


nbval.plugin.RunningKernel = WatchedKernel

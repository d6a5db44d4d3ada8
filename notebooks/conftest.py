"""How the notebooks run under nbval: offline, each kernel reached through files, stopping at the first failing cell.

nbval alone draws TCP ports, which another process may have taken when the kernel binds them; it runs the cells after
a failure too, whose errors bury the first one; and it notices a dead kernel only at the cell's timeout. Nothing
outlasts the cell for which it is changed, and no test elsewhere sees it.
"""

import os
from math import ceil
from queue import Empty
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from jupyter_client import KernelManager

FAILED_CELL = pytest.StashKey[str]()
KERNELS = TemporaryDirectory()  # gone with the process


def kernel_on_files(**options):
    return KernelManager(transport="ipc", ip=f"{KERNELS.name}/{uuid4().hex}", **options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if FAILED_CELL in item.parent.stash:
        pytest.skip(f"{item.parent.stash[FAILED_CELL]} of this notebook failed")
    with pytest.MonkeyPatch.context() as patch:  # the notebook's kernel starts here, and inherits this
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_OFFLINE", "1")
        if os.name == "posix":
            patch.setattr("nbval.kernel.KernelManager", kernel_on_files)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    kernel = item.parent.kernel
    wait = kernel.get_message

    def wait_while_alive(stream, timeout):
        for _ in range(ceil(timeout)):
            try:
                return wait(stream, timeout=1)
            except Empty:
                if not kernel.is_alive():
                    raise RuntimeError("the kernel died while this cell ran") from None
        raise Empty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "get_message", wait_while_alive)
        try:
            return (yield)
        except Exception:
            item.parent.stash[FAILED_CELL] = item.name
            raise

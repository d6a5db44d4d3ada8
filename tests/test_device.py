"""Where models run: a device is one that the machine has."""

import pytest
import torch

from rlhf_lessons.device import make_accelerator


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, mps; got 'tpu'"):
        make_accelerator("tpu")
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device must be one that this machine has; got '{absent}'"):
        make_accelerator(absent)

"""The clock of a measured process, and its pipes to the process that asks: for each line a round, answered with one."""

import itertools
import json
import os
import resource
import sys
import time

import torch

SHORTEST_ROUND = 1.0  # seconds: what is shorter is repeated, for a single short call is mostly noise


class Channel:
    """The clock, and the two pipes to the process that asks."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to standard error

    def wait(self) -> bool:
        """Wait to be asked; False when there is nothing more to do."""
        asked = sys.stdin.readline().strip() == "run"
        self.started, self.cpu_started = self.clock(), time.process_time()
        return asked

    def report(self, calls: int = 1, **measured) -> None:
        """Answer with the time a call took since then, the process's peak memory so far, and what else was measured."""
        times = {"seconds": self.clock() - self.started, "cpu_seconds": time.process_time() - self.cpu_started}
        times = {name: seconds / calls for name, seconds in times.items()}
        print(json.dumps(times | {"peak_mb": self.peak_mb()} | measured), file=self.answers, flush=True)

    def clock(self) -> float:
        """Seconds, when the device has done all it was told to."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_mb(self) -> float:
        """Peak resident memory, or the peak allocated on the GPU, in MB (10⁶ bytes)."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    def serve(self, run) -> None:
        """A round for each time it is asked: as many runs as filled the first, which warms up. Answers for one run."""
        calls = None
        while self.wait():
            for done in itertools.count(1):
                measured = run()
                if done == calls or (calls is None and self.clock() - self.started >= SHORTEST_ROUND):
                    break
            calls = done
            self.report(calls, **(measured if isinstance(measured, dict) else {}))

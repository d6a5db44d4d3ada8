"""One measured subject in a process of its own: for each line on its input it runs once and answers with one line.

Run by `rlhf_lessons.bench`, as `python -m rlhf_lessons.bench.worker '{"subject": ..., ...}'`.
"""

import json
import os
import resource
import sys
import time

import torch

from rlhf_lessons.bench.workload import SHAPES, Shape, Work


class Channel:
    """The clock, and the two pipes to the process that asks."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to standard error

    def wait(self) -> bool:
        """Wait to be asked; False when there is nothing more to do."""
        asked = sys.stdin.readline().strip() == "run"
        self.synchronize()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        return asked

    def report(self, **measured) -> None:
        """Answer with the time since then, the process's peak memory so far, and whatever else was measured."""
        self.synchronize()
        times = {"seconds": time.perf_counter() - self.started, "cpu_seconds": time.process_time() - self.cpu_started}
        print(json.dumps(times | {"peak_mb": self.peak_mb()} | measured), file=self.answers, flush=True)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_mb(self) -> float:
        """Peak resident memory, or the peak allocated on the GPU, in MB (10⁶ bytes)."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    def serve(self, run) -> None:
        """Run once for each time it is asked."""
        while self.wait():
            self.report(**(run() or {}))


def main(request: str) -> None:
    """Serve the subject that the request names; answer {"missing": ...} where what it needs is not installed."""
    from rlhf_lessons.bench import subjects

    asked = json.loads(request)
    work = Work(**asked.get("work", {}))
    shape: Shape | None = SHAPES.get(asked.get("shape"))
    channel = Channel(work.device)
    try:
        subjects.SUBJECTS[asked["subject"]](channel, shape, work)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=channel.answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

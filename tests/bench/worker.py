"""One measured subject in a process of its own.

Started by `bench.command`, as `python -m bench.worker '{"subject": ..., "shape": ..., "work": {...}}'`.
"""

import json
import sys

from bench.channel import Channel
from bench.subjects import SUBJECTS
from bench.workload import SHAPES, Shape, Work


def main(request: str) -> None:
    """Serve the subject that the request names; answer {"missing": ...} where what it needs is not installed."""
    asked = json.loads(request)
    work = Work(**asked["work"])
    shape: Shape | None = SHAPES.get(asked["shape"])
    channel = Channel(work.device)
    try:
        SUBJECTS[asked["subject"]](channel, shape, work)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=channel.answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

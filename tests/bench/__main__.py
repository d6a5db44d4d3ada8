"""`python tests/bench [options]`, from the repository's root."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In this folder's place: the one in which `bench` is a package, and the one of the package that is measured.
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
    from bench.command import main

    sys.exit(main())

"""``python -m offramp`` is the command line, as is the script ``offramp``: a process of its own."""

import atexit
import gc
import sys

from offramp.cli import main


def start() -> None:
    """Run the command line, and leave with its exit status.

    Millions of objects live in a process that has torch, nearly all of them to its end. They are looked through less
    often than by default, and not at all at the end.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    sys.exit(main())


if __name__ == "__main__":
    start()

"""`python -m itune`, and what `accelerate launch -m itune` starts."""

import os
import sys

# `-m` has Python look first where one stands: a ./json.py there is no part of this program.
if not getattr(sys.flags, "safe_path", False) and sys.path[:1] in ([""], [os.getcwd()]):  # noqa: PTH109
    del sys.path[0]

from itune import signals

signals.early()

from itune.cli import main  # noqa: E402


def run() -> None:
    """The program: its exit code is that of its work, whatever signal comes while it ends."""
    try:
        main()
    finally:
        signals.deafen()


if __name__ == "__main__":
    run()

"""`python -m itune`, and what `accelerate launch -m itune` starts."""

import os
import sys

# `-m` has Python look first where one stands: a ./json.py there is no part of this program.
if not getattr(sys.flags, "safe_path", False) and sys.path[:1] in ([""], [os.getcwd()]):  # noqa: PTH109
    del sys.path[0]

from itune.cli import main

if __name__ == "__main__":
    main()

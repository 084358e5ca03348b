"""`python -m posmlp.train ...` is `posmlp train ...`, for launchers such as torchrun."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m openelm` is the `openelm` command."""

import sys

from openelm.cli import main

if __name__ == "__main__":
    sys.exit(main())

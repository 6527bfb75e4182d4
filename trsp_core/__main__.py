"""`python -m trsp_core COMMAND`: see `cli.main`."""

import sys

from trsp_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

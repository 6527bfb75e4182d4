"""`python -m trsp_core COMMAND`: see `cli.main`."""

import sys

if __name__ == "__main__":
    try:
        from trsp_core.cli.main import main

        sys.exit(main())
    except ModuleNotFoundError as error:
        if (error.name or "trsp_core").startswith("trsp_core"):
            raise
        sys.exit(f"{error.name} is not installed for this Python. Run `make setup`, then `. .venv/bin/activate`.")

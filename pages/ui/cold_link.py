"""The first visit to a fresh server, when it goes straight to a page and not to the root.

Until `st.navigation` has run once, Streamlit takes the scripts in `pages/` for the pages, and tells a visitor of any
other address that there is no such page. So each page has a stub there that hands over to `app.py`, once in a server's
life.
"""

from __future__ import annotations

import runpy
from pathlib import Path


def enter() -> None:
    """Do what the root would have done."""
    runpy.run_path(str(Path(__file__).parent.parent.parent / "app.py"), run_name="__main__")

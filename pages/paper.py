"""Where a cold link lands first; see `pages/ui/cold_link.py`."""

from pages.ui import cold_link

cold_link.enter()

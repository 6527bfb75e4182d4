"""TRSP Explorer: watch whole layers being pruned out of a language model.

    streamlit run app.py

The server, page set-up and navigation, nothing else. The pages are in `pages/views`, what they share in `pages/ui`, and
all they know about pruning in `trsp_core`.
"""

import streamlit as st

from pages.ui.app_state import file_routes, middleware, server
from pages.ui.style import theme
from pages.ui.tour import guide
from trsp_core.runs import limits

PAGES = (  # file in pages/views, title, icon, what it is for
    ("home", "Home", "home", "A recorded run that plays at once, tours, and experiments to try."),
    ("run", "Run", "play_arrow", "Set up a run, see what it will cost, start it, and watch it live."),
    ("layers", "Layers", "layers", "A run's layers before and after; take layers out by hand and see what that costs."),
    ("compare", "Compare", "compare_arrows", "One prompt, up to three models side by side, token by token."),
    ("evidence", "Evidence", "balance", "Methods and controls on the same blocks, with intervals and sentences."),
    ("runs", "Runs", "list", "Every run on this machine: open, stop, resume or delete it."),
    ("paper", "Paper", "article", "The equations with their settings, where we depart from them, and open doubts."),
)

# What `streamlit run` serves: this script, and files beside it.
app = st.App(__file__, routes=file_routes.routes(), middleware=middleware.middleware(), lifespan=server.life)

if __name__ == "__main__":  # run for a tab; the server, which looks for `app`, calls the script by another name
    st.set_page_config(page_title="TRSP Explorer", page_icon="assets/icon.svg", layout="wide")
    st.logo("assets/logo.svg", size="large")

    theme.dress()
    server.plan_queue()  # with the queue; takes over what an earlier server left, whichever page is opened first

    page = st.navigation(
        [
            st.Page(f"pages/views/{file}.py", title=title, icon=f":material/{icon}:", help=text, default=file == "home")
            for file, title, icon, text in PAGES
        ],
        position="top",
    )
    guide.bar(page.url_path or "home")
    if limits_in_words := server.run_queue().limits.in_words():
        st.caption(f":material/public: {limits_in_words} {limits.HOW}")
    page.run()

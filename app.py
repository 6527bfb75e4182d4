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

# What `streamlit run` serves: this script, and files beside it.
app = st.App(__file__, routes=file_routes.routes(), middleware=middleware.middleware(), lifespan=server.life)

if __name__ == "__main__":  # run for a tab; the server, which looks for `app`, calls the script by another name
    st.set_page_config(page_title="TRSP Explorer", page_icon=":material/layers_clear:", layout="wide")
    st.logo("assets/logo.svg", size="large")

    theme.dress()
    server.agenda()  # with the queue; takes over what an earlier server left, whichever page is opened first

    page = st.navigation(
        [
            st.Page("pages/views/home.py", title="Home", icon=":material/home:", default=True),
            st.Page("pages/views/run.py", title="Run", icon=":material/play_arrow:"),
            st.Page("pages/views/layers.py", title="Layers", icon=":material/layers:"),
            st.Page("pages/views/compare.py", title="Compare", icon=":material/compare_arrows:"),
            st.Page("pages/views/evidence.py", title="Evidence", icon=":material/balance:"),
            st.Page("pages/views/runs.py", title="Runs", icon=":material/list:"),
            st.Page("pages/views/paper.py", title="Paper", icon=":material/article:"),
        ],
        position="top",
    )
    guide.bar(page.url_path or "home")
    if told := server.jobs().limits.in_words():
        st.caption(f":material/public: {told} {limits.HOW}")
    page.run()

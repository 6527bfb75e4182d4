"""Paper: the equations, each with its knobs and where it is in a run; where we depart from them; doubts, in numbers."""

import streamlit as st

from pages.ui.app_state import server, url_state
from pages.ui.evidence import faq, published
from pages.ui.paper import departures, equations

newest = next((run.id for run in server.runs() if run.status() == "finished"), None)
evidence = faq.shipped()

url_state.title("The paper")
st.markdown(
    f"*{equations.PAPER}* ([arXiv:2505.18232]({equations.ADDRESS})). What it says, what this app makes of it, and what "
    "came out when it was measured."
)

st.subheader("The method, equation by equation")
equations.symbols()
for equation in equations.EQUATIONS:
    equations.draw(equation, newest)

st.subheader("The gate")
st.markdown(
    "The paper draws the weight on the whole output of a layer. In models of today that output carries all that "
    "earlier layers wrote, so a small weight does not say that the layer does little: it makes everything after it "
    "louder. We put the weight on what the layer adds. See the literal one fail:"
)
st.markdown("\n".join(f"- {sentence}" for sentence in faq.gates(evidence)))
departures.literal_runs()

st.subheader("Where we depart from the paper, and why")
st.table(departures.table())
st.page_link(
    "pages/views/run.py", label="Set the paper's side of each", icon=":material/tune:", query_params={"preset": "paper"}
)

st.subheader("What the public code does not do")
st.markdown("\n".join(f"- {fact}" for fact in departures.PUBLIC_CODE))
st.caption(departures.SOURCE)

st.subheader("Where the other methods differ from their authors' code")
st.markdown("\n".join(f"- {difference}" for difference in departures.of_others()))

st.subheader("What a reviewer would ask, and what was measured")
st.caption("Every sentence is made from the recorded figures that the page Evidence shows, with 95 % intervals.")
columns = st.columns(2, gap="medium")
for n, (question, answer) in enumerate(faq.answers(evidence)):
    with columns[n % 2], st.container(border=True):
        st.markdown(f"**{question}**")
        for sentence in answer:
            st.markdown(sentence)
st.page_link("pages/views/evidence.py", label="All figures, and the published ones", icon=":material/balance:")
with st.expander("Published figures, and what does not fit together", icon=":material/menu_book:"):
    st.caption(published.SOURCE)
    st.caption(published.DOUBTS)

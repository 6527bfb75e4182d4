"""What a step of fading is worth, by the law of lost steps: sentences and a table from the recorded sweeps."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.experiments import lost_steps
from trsp_core.schema.events import DOMAINS


@st.cache_resource(show_spinner=False)
def laws() -> dict[str, dict[str, list[lost_steps.LostSteps]]]:
    """The law on the sweeps that ship, by domain and arm; {} where they cannot be read."""
    try:
        sweep = lost_steps.recorded()
    except TrspError:
        return {}
    return {domain: lost_steps.of_sweep(sweep, domain) for domain in DOMAINS}


def section() -> None:
    """The law, what it gives here, and each figure."""
    for n, sentence in enumerate(lost_steps.sentences(laws())):
        st.markdown(f"#### {words.plain(sentence)}" if n == 0 else words.plain(sentence))
    for column, (domain, arms) in zip(st.columns(2, gap="large"), laws().items(), strict=False):
        with column:
            st.markdown(f"**{words.DOMAINS[domain].capitalize()}**")
            frame = pd.DataFrame(lost_steps.table(arms), columns=["arm", *lost_steps.HEADS[1:]])
            st.dataframe(frame, hide_index=True, alt=f"What a step of fading is worth, {words.DOMAINS[domain]}.")
    st.caption(
        "Training after deletion lowers the perplexity as T⁻ᵇ. Fading spends a share f of its steps on a network that "
        "is not kept. If such a step is worth u of a step on the pruned one, fading stands at "
        "(1\u00a0−\u00a0f\u00a0(1\u00a0−\u00a0u))⁻ᵇ times the control: at u = 0 those steps are lost, at u = 1 none "
        "is. Brackets: 95 % intervals over the measured blocks; one seed."
    )

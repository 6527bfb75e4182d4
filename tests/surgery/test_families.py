"""The recorded survey of all causal language models: what the docs say of it, and that it is still so."""

import json
import os
import subprocess
import sys

import pytest
import transformers

from tests import ROOT, survey_families, zoo
from trsp_core.models import architectures
from trsp_core.surgery import families

AIM = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "gptj",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "stablelm",
    "olmo",
    "olmo2",
    "granite",
    "smollm3",
    "cohere",
    "starcoder2",
    "mpt",
    "mamba",
]


def test_the_docs_hold_what_was_recorded():
    page = survey_families.PAGE.read_text("utf-8")
    told = page.split(survey_families.BEGIN)[1].split(survey_families.END)[0].strip()
    assert told == survey_families.markdown(architectures.recorded())


def test_the_record_is_of_every_model_of_this_transformers():
    found = architectures.recorded()
    assert found.transformers == transformers.__version__
    assert [o.model_type for o in found.outcomes] == list(zoo.MODEL_TYPES)


def test_nine_in_ten_are_supported_and_none_breaks_a_law():
    found = architectures.recorded()
    assert found.share >= 0.9
    assert not found.of("failed")
    assert all(o.reason for o in found.outcomes if o.outcome != "supported")
    assert set(AIM) <= {o.model_type for o in found.of("supported")}


def test_what_is_declared_refused_was_refused():
    outcomes = {o.model_type: o.outcome for o in architectures.recorded().outcomes}
    for family in families.all_families().values():
        for model_type in set(family.model_types) & set(outcomes):
            assert (outcomes[model_type] == "supported") is not bool(family.refused) or outcomes[
                model_type
            ] == "not built"


@pytest.mark.slow
def test_the_survey_ends_as_recorded():
    """Apart, since it forks: this process has threads."""
    code = (
        "import dataclasses, json\nfrom tests import survey_families\n"
        "print(json.dumps([dataclasses.asdict(o) for o in survey_families.survey()]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = {o["model_type"]: o["outcome"] for o in json.loads(done.stdout.splitlines()[-1])}
    assert found == {o.model_type: o.outcome for o in architectures.recorded().outcomes}

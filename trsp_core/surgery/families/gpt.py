"""GPT-2, OPT, GPT-NeoX, Phi and others, which call the same parts by other names."""

from trsp_core.surgery.families import Family

FAMILIES = (
    Family("GPT-2", ("gpt2",), outputs=("c_proj",), note="weights are stored transposed (Conv1D)"),
    Family("OPT", ("opt",), outputs=("out_proj", "fc2"), note="learned positions, which stay as they are"),
    Family("GPT-NeoX", ("gpt_neox",), outputs=("dense", "dense_4h_to_h"), note="attention and MLP run side by side"),
    Family("GPT-J", ("gptj",), outputs=("out_proj", "fc_out"), note="attention and MLP run side by side"),
    Family(
        "BLOOM", ("bloom",), outputs=("dense", "dense_4h_to_h"), note="no positions, but a bias by distance (ALiBi)"
    ),
    Family("Falcon", ("falcon",), outputs=("dense", "dense_4h_to_h")),
    Family("MPT", ("mpt",), outputs=("out_proj", "down_proj"), note="no positions, but a bias by distance (ALiBi)"),
    Family("StarCoder2", ("starcoder2",), outputs=("o_proj", "c_proj")),
    Family("Mamba", ("mamba",), outputs=("out_proj",), note="state-space layers: a state in place of keys and values"),
    Family("Phi", ("phi",), outputs=("dense", "fc2"), note="attention and MLP run side by side"),
    Family("Phi-3", ("phi3",), outputs=("o_proj", "down_proj")),
)

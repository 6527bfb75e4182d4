"""Families whose layers depend on their number or on each other: which layers have to stay, or why none can go."""

from trsp_core.surgery.families import Family

_NUMBERED = "its layers compute with their own number, which a config has no word for"
_SHARED = "its attention layers are one set of weights, used again and again"

FAMILIES = (
    Family("Beam", ("beam",), refused=_NUMBERED),
    Family("BLT", ("blt",), refused="its layers are in several stacks, of bytes and of patches"),
    Family("CPM-Ant", ("cpmant",), refused="it reads its prompt in both directions"),
    Family("DiffLlama", ("diffllama",), refused=_NUMBERED),
    Family("HRM-Text", ("hrm_text",), refused="its layers run several times for each token"),
    Family("Inkling 2", ("inkling2_text",), refused=_NUMBERED),
    Family("Jamba", ("jamba",), refused="which of its layers attend, and which hold experts, follows from a period"),
    Family("LongCat-Flash", ("longcat_flash",), caches=2, note="each of its layers attends twice"),
    Family("MiniMax", ("minimax",), stays=(0,), note="its cache counts tokens in layer 0, which has to attend"),
    Family("ModernBERT decoder", ("modernbert-decoder",), stays=(0,), note="layer 0 alone has no norm of its own"),
    Family("Reformer", ("reformer",), refused="its layers are reversible: each takes two streams and gives two"),
    Family("RWKV", ("rwkv",), refused="it halves its hidden states between layers, by their number"),
    Family("Zamba", ("zamba", "zamba2"), refused=_SHARED),
    Family("Zaya", ("zaya",), refused="the router of each layer reads the router of the one before"),
)

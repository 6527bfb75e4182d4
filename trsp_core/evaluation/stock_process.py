"""Computes what anybody would compute from a checkpoint, with torch and transformers (and peft for adapters beside
packed weights) and nothing of ours.

`verification` runs this file as a fresh, isolated process: `python -I stock_process.py FOLDER LOGITS`, with the
question as a line of JSON on stdin, and the answer as JSON on stdout. It also calls the same functions on the model in
memory, and compares. When stdin ends nobody waits for the answer any more, and the process ends.
"""

import json
import os
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def tokens(tokenizer, text, count):
    """The first `count` token ids of `text`, (1, T)."""
    return tokenizer(text, return_tensors="pt").input_ids[:, :count]


def logits(model, ids):
    """The logits (T, V) of `ids` (1, T), in float32 on the CPU."""
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu()


def continuation(model, ids, count, cached):
    """The ids of `count` tokens after `ids` (1, T), each the likeliest, a list; with a key-value cache if `cached`. The
    model's own generation config is left out of account: no token ends the text, none is barred, nothing is drawn."""
    ids, own = ids.to(model.device), model.generation_config
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}  # nosec B105 - a number of a token
    model.generation_config = type(own)()
    try:
        with torch.inference_mode():
            sequences = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **how)
    finally:
        model.generation_config = own
    return sequences[0, ids.shape[1] :].tolist()


def tie(model, ids, one, other):
    """How much the logits of the two tokens differ at which `one` and `other`, two continuations of `ids` (1, T), first
    part; None where both are the same."""
    position = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if position is None:
        return None
    before = torch.cat([ids, torch.tensor([one[:position]], dtype=ids.dtype)], dim=1)
    last = logits(model, before)[-1]
    return abs(float(last[one[position]] - last[other[position]]))


def end_with_stdin():
    """Wait until stdin ends, since whoever asked has died, and end this process."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main(folder, target):
    """Answer the question on stdin by the checkpoint in `folder`; its logits (T, V) go to the file `target` as
    float32."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, daemon=True).start()
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)  # nosec B615 - a folder of this machine
    device = request["device"] if request["device"] == "auto" else {"": request["device"]}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device).eval()  # nosec B615 - the same
    packed = getattr(model, "is_quantized", False)
    if (Path(folder) / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, Path(folder) / "adapter").eval()
    ids = tokens(tokenizer, request["text"], request["tokens"])
    logits(model, ids).numpy().tofile(target)
    cached, uncached = (continuation(model, ids, request["new_tokens"], cached) for cached in (True, False))
    answer = {
        "ids": ids[0].tolist(),
        "cached": cached,
        "uncached": uncached,
        "tie": tie(model, ids, cached, uncached),
        "dtype": "packed weights" if packed else str(model.dtype).removeprefix("torch."),
        "foreign": sorted({m.partition(".")[0] for m in sys.modules} & {"trsp_core", "pages"}),
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

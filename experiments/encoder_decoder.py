"""The quickstart's line with an encoder-decoder (T5), or with one as policy and a decoder as preference model.

    alignjax run experiments/encoder_decoder.py --workdir runs/t5 [--set small=True]
    alignjax run experiments/encoder_decoder.py --workdir runs/mixed --set preference=decoder [--set small=True]

The small one takes 7 minutes on two cores. A T5 learns to write slowly, so it learns little in so few steps. In the
second line policy and preference model have different tokenizers, and responses become text between them. Both policies
are adapters (LoRA) over one frozen base, which is their reference and the other half of their mixture.
"""

from dataclasses import replace
from pathlib import Path

import alignjax as aj

quickstart = aj.load_module(Path(__file__).with_name("quickstart.py"))


def get_config(small: bool = False, preference: str = "t5") -> aj.Experiment:
    """Returns the quickstart with T5 policies; ``preference`` is the preference model's kind."""
    if preference not in ("t5", "decoder"):
        raise aj.UserError(f"preference={preference!r} is unknown; choose t5 or decoder")
    config = quickstart.get_config(small)
    sizes = dict(width=96, layers=2, heads=4, head_dim=24, hidden=192) if small else dict(
        width=192, layers=3, heads=6, head_dim=32, hidden=512
    )  # fmt: skip
    base = config.stages["base"]
    model = aj.T5Config(
        vocab_size=base.model.vocab_size, decoder_layers=2, activation="gelu_tanh", gated=True, tied=True,
        scaled_output=False, start_token=0, end_token=2, **sizes,
    )  # fmt: skip
    steps = 500 if small else 1200
    writer = replace(base, model=model, adam=replace(base.adam, lr=3e-3), loop=aj.Loop(steps=steps, batch=32))
    lora = aj.Lora(rank=8, alpha=32.0, targets=("q", "v", "cross_q", "cross_v", "up", "down"))
    changed = {
        name: replace(config.stages[name], lora=lora, adam=replace(config.stages[name].adam, lr=5e-3))
        for name in ("nash_md", "self_play")
    }
    if preference == "decoder":  # its tokenizer is another one: it is trained on fewer documents
        changed |= {
            "reader": replace(base, tokenizer_documents=1000),
            **{name: replace(config.stages[name], start="reader") for name in ("preference", "judge")},
        }
    return config.with_stages(base=writer, **changed)

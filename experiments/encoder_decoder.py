"""The quickstart's line with an encoder-decoder (T5), or with one as policy and a decoder as preference model.

    alignjax run experiments/encoder_decoder.py --workdir runs/t5 [--set small=True]
    alignjax run experiments/encoder_decoder.py --workdir runs/mixed --set preference=decoder [--set small=True]

Small, on two cores, 7 minutes: a T5 learns to write slowly, and what so few steps teach is not much. The second has two
tokenizers: text lies between the policy and who compares its replies. Both policies are trained as
adapters (LoRA) over the one frozen base, which is their reference and their mixture's other half.
"""

from dataclasses import replace
from pathlib import Path

from alignjax.errors import UserError
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.pipeline.config import load_module
from alignjax.pipeline.stages import Experiment, Loop

quickstart = load_module(Path(__file__).with_name("quickstart.py"))


def get_config(small: bool = False, preference: str = "t5") -> Experiment:
    if preference not in ("t5", "decoder"):
        raise UserError(f"preference={preference!r} is unknown; choose t5 or decoder")
    config = quickstart.get_config(small)
    sizes = dict(width=96, layers=2, heads=4, head_dim=24, hidden=192) if small else dict(
        width=192, layers=3, heads=6, head_dim=32, hidden=512
    )  # fmt: skip
    base = config.stages["base"]
    model = T5Config(
        vocab_size=base.model.vocab_size, decoder_layers=2, activation="gelu_tanh", gated=True, tied=True,
        scaled_output=False, start_token=0, end_token=2, **sizes,
    )  # fmt: skip
    steps = 500 if small else 1200
    writer = replace(base, model=model, adam=replace(base.adam, lr=3e-3), loop=Loop(steps=steps, batch=32))
    lora = Lora(rank=8, alpha=32.0, targets=("q", "v", "cross_q", "cross_v", "up", "down"))
    changed = {
        name: replace(config.stages[name], lora=lora, adam=replace(config.stages[name].adam, lr=5e-3))
        for name in ("nash_md", "self_play")
    }
    if preference == "decoder":  # its tokenizer is trained on fewer documents, and so another
        changed |= {
            "reader": replace(base, tokenizer_documents=1000),
            **{name: replace(config.stages[name], start="reader") for name in ("preference", "judge")},
        }
    return config.with_stages(base=writer, **changed)

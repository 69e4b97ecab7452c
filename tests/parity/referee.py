"""The reference implementation: transformers on torch. Rows are computed one by one, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from tests.parity.cases import Case

torch.set_num_threads(1)  # the networks are tiny: more threads only wait for each other
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
NEW_TOKENS = 64
END = 1  # what T5's tokenizers put behind a prompt, and our encoder itself


class Outputs(NamedTuple):
    """What transformers computes from prompts and completions."""

    logits: np.ndarray  # [B, N, V], of each completion token
    states: np.ndarray  # [B, N, D], what the head reads
    greedy: np.ndarray  # [B, 64]
    margins: np.ndarray  # [B, 64], by how much each greedy token's logit leads
    encoded: np.ndarray | None  # [B, T + 1, D], the encoder's states, zero on padding


def draw_model(case: Case, rng: np.random.Generator) -> Any:
    """Returns a random model in which every path matters: large weights, and no norm or bias at its neutral value."""
    kind = getattr(transformers, case.model)
    config = kind.config_class(**case.draw(rng))
    config._attn_implementation = "eager"
    model = kind(config).eval()
    if case.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape), np.float32))
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            else:
                weight.copy_((0.5 if id(weight) in tables else 0.25) * noise)
    return model


def load_model(kind: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the model of a folder, in float32, and what transformers reports as missing or unexpected."""
    model, info = getattr(transformers, kind).from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), {name: sorted(value) for name, value in info.items() if value}


@torch.no_grad()
def compute(model: Any, prompts: list[list[int]], completions: np.ndarray) -> Outputs:
    """Returns the outputs of prompts of any lengths and completions [B, N]."""
    encodes = model.config.is_encoder_decoder
    compute_row = encoded_row if encodes else decoder_row
    rows = [compute_row(model, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    greedy = [generate_greedy(model, [*prompt, END] if encodes else prompt) for prompt in prompts]
    memory = None
    if encodes:
        memory = np.zeros((len(rows), max(map(len, prompts)) + 1, rows[0][2].shape[-1]), np.float32)
        for states, row in zip(memory, rows, strict=True):
            states[: len(row[2])] = row[2]
    stacked = (np.stack([row[i] for row in rows]) for i in range(2))
    return Outputs(*stacked, *(np.stack(part) for part in zip(*greedy, strict=True)), memory)


@torch.no_grad()
def compute_logits(model: Any, prompts: list[list[int]], completions: np.ndarray) -> np.ndarray:
    """Returns the logits [B, N, V] of completions [B, N], or the score [B, 1] of prompts by a reward model."""
    if type(model).__name__.endswith("SequenceClassification"):
        return np.stack([model(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in prompts])
    row = encoded_row if model.config.is_encoder_decoder else decoder_row
    return np.stack([row(model, *pair)[0] for pair in zip(prompts, completions, strict=True)])


def decoder_row(model: Any, prompt: list[int], completion: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns logits [N, V] and last hidden states [N, D] of one completion."""
    out = model(input_ids=torch.tensor([[*prompt, *completion.tolist()]]), output_hidden_states=True)
    completion_rows = slice(len(prompt) - 1, -1)
    return out.logits[0, completion_rows].numpy(), out.hidden_states[-1][0, completion_rows].numpy()


def encoded_row(model: Any, prompt: list[int], completion: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns logits [N, V], hidden states of the decoder [N, D] and of the encoder [T + 1, D]."""
    written = torch.tensor([[model.config.decoder_start_token_id, *completion[:-1].tolist()]])
    out = model(input_ids=torch.tensor([[*prompt, END]]), decoder_input_ids=written, output_hidden_states=True)
    return out.logits[0].numpy(), out.decoder_hidden_states[-1][0].numpy(), out.encoder_last_hidden_state[0].numpy()


def generate_greedy(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns 64 greedy tokens, and by how much the logit of each leads the next best."""
    tokens = torch.tensor([ids])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        use_cache=not model.config.is_encoder_decoder,  # its cache has no room for a decoder deeper than its encoder
    )  # fmt: skip
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, -NEW_TOKENS:].numpy().astype(np.int32), (best[:, 0] - best[:, 1]).numpy()

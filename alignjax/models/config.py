"""The configurations: sizes and options of decoder-only transformers and of T5."""

from __future__ import annotations

import dataclasses
import math

from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.fields import no_effect
from alignjax.models.layers import ACTIVATIONS, COMPUTE_DTYPES, REMAT_POLICIES, check_choice
from alignjax.models.rope import RopeScaling

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear maps of a decoder layer: four of attention, three of the MLP."""
UNBOUNDED = 2**30
"""The attention window, in tokens, of a layer that attends to all earlier tokens."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a decoder-only transformer. The defaults are Llama's where Llama has one."""

    vocab_size: int
    width: int  # D, of a state
    layers: int
    heads: int  # query heads
    kv_heads: int  # key/value heads; divides heads
    head_dim: int
    hidden: int  # width inside the MLP
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the embedding is the output projection too
    initializer_range: float = 0.02  # standard deviation of initial embeddings
    compute_dtype: str = "float32"  # "bfloat16" casts parameters inside the step
    remat: str = no_effect("none")  # what the backward pass recomputes; a key of REMAT_POLICIES
    decode: str = no_effect("unrolled")  # or "scanned": compile time independent of the number of layers
    # Options that tell the model families apart.
    family: str = "llama"  # names and file format of an exported checkpoint
    norm: str = "rms"  # or "layer": centred, with a bias
    norm_offset: float = 0.0  # added to every norm's scale (Gemma: 1)
    biases: tuple[str, ...] = ()  # the projections that have a bias; some of PROJECTIONS
    activation: str = "silu"  # a key of ACTIVATIONS
    gated: bool = True  # the MLP computes activation(gate) * up; else activation(up)
    parallel: bool = False  # attention and MLP both read the layer's input (GPT-NeoX)
    post_norms: bool = False  # norms after attention and after the MLP too (Gemma)
    head_norms: bool = False  # norms over each query and key head (Qwen 3, Gemma 3)
    positions: str = "rotary"  # or "learned": a table of ``context`` positions (GPT-2)
    context: int = 2048  # tokens that the checkpoint was trained on; a bound for learned positions only
    rotary_dim: int | None = None  # dimensions of a head that are rotated, from the first on; None: all
    rope_scaling: RopeScaling = RopeScaling()
    windows: tuple[int, ...] = ()  # tokens that each layer attends to, the current one included; empty: UNBOUNDED
    windowed_theta: float | None = None  # rope_theta of layers with a window, without rope_scaling (Gemma 3)
    query_scale: float | None = None  # factor of attention scores; None: head_dim ** -0.5
    attention_cap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)
    logit_cap: float | None = None  # logits become cap * tanh(logit / cap)
    embed_scale: float = 1.0  # factor of embedded tokens (Gemma: sqrt(width))

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden")
        check_range(self, POSITIVE, math.inf, "rope_theta", "norm_eps", "embed_scale")
        check_range(self, 1, math.inf, "context")
        for name in ("rotary_dim", "windowed_theta", "query_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None:
                check_range(self, POSITIVE, math.inf, name)
        if self.windows:
            check_range(self, 1, UNBOUNDED, "windows")
        if unknown := set(self.biases) - set(PROJECTIONS):
            raise UserError(f"TransformerConfig.biases names {min(unknown, key=str)!r}, which is no projection; "
                            f"choose from {', '.join(PROJECTIONS)}")  # fmt: skip
        check_choice(self, "remat", tuple(REMAT_POLICIES))
        check_choice(self, "compute_dtype", COMPUTE_DTYPES)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_choice(self, "decode", ("unrolled", "scanned"))
        check_choice(self, "norm", ("rms", "layer"))
        check_choice(self, "positions", ("rotary", "learned"))

    @property
    def rotated(self) -> int:
        """The number of a head's dimensions that are rotated; 0 with learned positions."""
        return 0 if self.positions == "learned" else self.rotary_dim or self.head_dim


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and options of a T5. The defaults are those of T5 1.0 (1910.10683)."""

    vocab_size: int
    width: int  # D, of a state
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_dim: int
    hidden: int  # width inside the MLP
    norm_eps: float = 1e-6
    activation: str = "relu"  # a key of ACTIVATIONS; v1.1: "gelu_tanh"
    gated: bool = False  # the MLP computes activation(gate) * up; v1.1: True
    tied: bool = True  # the embedding is the output projection too
    scaled_output: bool = True  # states times width ** -0.5 before the output projection; v1.1: False
    buckets: int = 32  # of relative positions
    distance: int = 128  # tokens; all larger distances share a bucket
    start_token: int = 0  # the decoder's first input
    end_token: int = 1  # appended to the prompt before the encoder reads it
    compute_dtype: str = "float32"  # "bfloat16" casts parameters inside the step
    remat: str = no_effect("none")  # what the backward pass recomputes; a key of REMAT_POLICIES
    family: str = "t5"  # or "mt5": the file format of an exported checkpoint

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "vocab_size", "width", "layers", "decoder_layers", "heads", "head_dim", "hidden")
        check_range(self, POSITIVE, math.inf, "norm_eps")
        check_range(self, 4, math.inf, "buckets")
        check_range(self, self.buckets // 2, math.inf, "distance")
        check_range(self, 0, self.vocab_size - 1, "start_token", "end_token")
        check_choice(self, "remat", tuple(REMAT_POLICIES))
        check_choice(self, "compute_dtype", COMPUTE_DTYPES)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_choice(self, "family", ("t5", "mt5"))

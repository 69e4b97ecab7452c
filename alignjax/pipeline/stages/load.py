"""Stages that read what lies outside: a checkpoint, adapters over one, comparisons, replies to imitate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.checkpoints import folders, huggingface, peft, weights
from alignjax.distributed import sharding
from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.fields import Kind, no_effect, stage_input
from alignjax.models.build import ModelConfig, build
from alignjax.models.decoder import TransformerConfig
from alignjax.models.heads import init_head
from alignjax.models.layers import COMPUTE_DTYPES, REMAT_POLICIES, check_choice
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, placeholder_tokenizer, with_chat_template
from alignjax.pipeline import networks
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program
from alignjax.pipeline.networks import Network, NetworkRecord, SharedBase
from alignjax.pipeline.trained_parts import trained_spec
from alignjax.tasks import json_lines
from alignjax.training import data


@dataclasses.dataclass(frozen=True)
class LoadCheckpoint:
    """Reads a Hugging Face folder, shard by shard onto the mesh.

    A sequence classification with one label is a reward model, which ``ZeroShotPreference(start, bradley_terry)`` asks.
    Its score is read at a reply's last token, so the task's ``format.end`` must be the text that its replies end with.
    """

    path: str
    chat: bool = False  # prompts go through the tokenizer's chat template
    dtype: str = "float32"  # of the parameters; under adapters "bfloat16" halves the frozen base
    compute_dtype: str = "float32"
    remat: str = no_effect("none")
    decode: str = no_effect("unrolled")  # or "scanned", of a decoder-only model (TransformerConfig)
    model: ModelConfig | None = None  # what the folder must hold; with it, ``plan`` needs no folder
    digest: str = dataclasses.field(init=False)  # of the folder's content; empty where there is none

    def __post_init__(self) -> None:
        check_choice(self, "dtype", COMPUTE_DTYPES)
        check_choice(self, "compute_dtype", COMPUTE_DTYPES)
        check_choice(self, "remat", tuple(REMAT_POLICIES))
        object.__setattr__(self, "digest", folders.folder_digest(Path(self.path)))

    @property
    def makes(self) -> Kind:
        """A reward model where the folder holds a scalar head, else a policy."""
        return Kind.REWARD if self.digest and weights.has_reward_head(Path(self.path)) else Kind.POLICY

    def config(self) -> ModelConfig:
        """Returns the model's configuration. Raises UserError when the folder holds another than ``model`` names."""
        folder = Path(self.path)
        options: dict[str, Any] = {"compute_dtype": self.compute_dtype, "remat": self.remat}
        found = self.model if self.model and not self.digest else huggingface.read_config(folder)
        if isinstance(found, TransformerConfig):
            options["decode"] = self.decode
        if found is self.model:
            return dataclasses.replace(found, **options)
        if weights.has_reward_head(folder):  # such a checkpoint has no output projection
            found = dataclasses.replace(found, tied=True)
        found = dataclasses.replace(found, **options)
        if self.model and found != (named := dataclasses.replace(self.model, **options)):
            field = min(name for name, value in vars(named).items() if vars(found).get(name) != value)
            raise UserError(f"{folder} holds another model than the experiment names: {field} is "
                            f"{vars(found).get(field)!r}, not {vars(named)[field]!r}")  # fmt: skip
        return found

    def tokenizer(self) -> Tokenizer:
        """Returns the folder's tokenizer, or a placeholder where there is no folder."""
        if self.model and not self.digest:
            return placeholder_tokenizer(self.model.vocab_size)
        return _read_tokenizer(self.path, self.digest)

    def network(self, context: Context) -> NetworkSpec:
        """Returns the folder's network."""
        config = self.config()
        heads = networks.head_shapes({"reward": init_head(config.width)}) if self.makes == Kind.REWARD else {}
        # Before they run, folders with equally many tokens are taken for one family.
        digest = f"{config.vocab_size} tokens" + (" chat" if self.chat else "")
        return NetworkSpec(NetworkRecord(config, self.dtype, heads, self.chat, None), self.tokenizer(), digest)

    def exposure(self, context: Context) -> Exposure:
        """Returns the content of the folder, whatever its path and dtype."""
        return Exposure(identity=frozenset({f"folder {self.digest or self.path}"}))

    def check(self, context: Context) -> None:
        """Raises UserError when the folder is missing, damaged, or does not fit the mesh."""
        folder = Path(self.path)
        if not self.digest:
            huggingface.read_config(folder)  # says what is missing, where ``model`` would stand in for it
        config = self.config()
        weights.check_tensors(folder, config)
        weights.read_reward_head(folder, config.width)
        tokenizer = self.tokenizer()
        if self.chat:
            try:
                with_chat_template(tokenizer, context.task.messages)
            except UserError as error:  # it does not know the folder
                raise UserError(f"{folder}: {error}") from None
        parameter_places(build(config), context.mesh)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: reading compiles nothing."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Reads the folder and writes the stage's network."""
        folder, config = Path(self.path), self.config()
        model = build(config)
        params = weights.read_params(folder, config, parameter_places(model, context.mesh), np.dtype(self.dtype))
        heads = weights.read_reward_head(folder, config.width)
        tokenizer = huggingface.read_tokenizer(folder)
        networks.save(context.folder, Network(context.name, model, tokenizer, "", params, heads=heads, chat=self.chat))
        return {"parameters": parameter_count({**params, **heads})}

    meanings: ClassVar[dict[str, str]] = {"parameters": "numbers in the network"}


@functools.lru_cache(maxsize=4)
def _read_tokenizer(path: str, digest: str) -> Tokenizer:
    """Reads a folder's tokenizer once for all stages that ask; ``digest`` tells when the folder has changed."""
    return huggingface.read_tokenizer(Path(path))


def parameter_places(model: Model, mesh: jax.sharding.Mesh) -> Any:
    """Returns where a model's parameters lie. Raises UserError when one does not divide over the mesh."""
    return sharding.shardings(jax.eval_shape(model.init, jax.random.key(0)), model.rules, mesh)


def parameter_count(params: Any) -> int:
    """Returns how many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class LoadAdapter:
    """Reads a folder of the PEFT library's: adapters over the network of ``start``."""

    path: str
    start: str = stage_input(Kind.POLICY)
    digest: str = dataclasses.field(init=False)  # of the folder's content
    makes: ClassVar[Kind] = Kind.POLICY

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", folders.folder_digest(Path(self.path)))

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the start's network under the folder's adapters."""
        if (start := context.spec(self.start)) is None:
            return None
        return trained_spec(start, self.start, peft.read_adapters(Path(self.path), start.record.config)[0], {})

    def exposure(self, context: Context) -> Exposure:
        """Returns the start's exposure."""
        return context.derived_exposure(self.start)

    def check(self, context: Context) -> None:
        """Raises UserError when the folder is missing or damaged, or is known not to fit the start."""
        peft.check_files(Path(self.path))
        self.network(context)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: reading compiles nothing."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Reads the adapters and writes the stage's network. Raises UserError when the start has adapters already."""
        start = context.load(self.start)
        if start.adapters:
            raise UserError(f"{context.name}: {self.start!r} has adapters already; name the stage they lie over")
        lora, adapters = peft.read_adapters(Path(self.path), start.model.config)
        network = dataclasses.replace(
            start, base={}, adapters=adapters, heads={}, shared_base=SharedBase(self.start, lora)
        )
        networks.save(context.folder, network)
        return {"parameters": parameter_count(adapters), "rank": lora.rank}

    meanings: ClassVar[dict[str, str]] = {"parameters": "numbers in the adapters"}


@dataclasses.dataclass(frozen=True)
class LoadPairs:
    """Reads a file of comparisons, JSON lines or parquet, into the dataset of pairs that a Label stage writes.

    The whole file is read before anything runs. ``read`` says what a row is; the default reads {"prompt", "first",
    "second", "p"} and {"prompt", "chosen", "rejected"}.
    """

    path: str
    read: json_lines.ReadComparison = json_lines.read_comparison
    held_out: float = 0.0  # share of the prompts whose pairs go to the split "held_out": the last ones of the file
    skip_malformed: bool = False  # leave malformed lines out, with a warning and a count; else the first is an error
    digest: str = dataclasses.field(init=False)  # of the file's content
    makes: ClassVar[Kind] = Kind.PAIRS

    def __post_init__(self) -> None:
        check_range(self, 0, 1 - POSITIVE, "held_out")
        object.__setattr__(self, "digest", json_lines.file_digest(self.path))

    def network(self, context: Context) -> None:
        """Returns None: pairs are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns the content of the file, whatever the share that is held out; without a file, the stage alone."""
        return Exposure(fitted=frozenset({f"file {self.digest or self.path or context.name}"}))

    def check(self, context: Context) -> None:
        """Raises UserError when the file cannot be read, or a line is malformed and not to be skipped."""
        self.rows(context)

    def rows(self, context: Context) -> list[json_lines.Comparison | None]:
        """Returns a comparison a line that is well-formed. Raises UserError as ``check`` does, and where there is no
        comparison."""
        return [row for _, row in self._read(context).rows]

    def splits(self, context: Context) -> dict[str, list[dict[str, Any]]]:
        """Returns the pairs of each split as {"prompt", "first", "second", "p"}, in the order of the file.

        The dataset that ``run`` writes holds the same pairs, shuffled. Raises UserError as ``rows`` does.
        """
        return self._split(self.rows(context))

    def _split(self, found: Sequence[json_lines.Comparison | None]) -> dict[str, list[dict[str, Any]]]:
        """Returns the pairs of each split. All pairs of a prompt are in one."""
        rows = [pair._asdict() for pair in found if pair]
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        last = set(prompts[len(prompts) - int(self.held_out * len(prompts)) :])
        splits = {"train": [row for row in rows if row["prompt"] not in last]}
        return {**splits, "held_out": [row for row in rows if row["prompt"] in last]} if last else splits

    def _read(self, context: Context) -> json_lines.NumberedRows[json_lines.Comparison | None]:
        """Returns the rows and the malformed lines of the file."""
        found = read_stage_file(context, self, "comparisons")
        if not any(row for _, row in found.rows):
            raise UserError(f"{context.name}: no line of {self.path} compares two replies to one prompt, or all are "
                            "left out by its read; give another file, or another read")  # fmt: skip
        return found

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: reading compiles nothing."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the dataset; returns its figures."""
        lines = self._read(context)
        splits = self._split([row for _, row in lines.rows])
        pairs = [row for rows in splits.values() for row in rows]
        skipped, prompts = len(lines.rows) - len(pairs), len({row["prompt"] for row in pairs})
        figures = {"pairs": len(pairs), "skipped": skipped, "different_prompts": prompts}
        if self.skip_malformed:
            figures["malformed"] = len(lines.malformed)
        source = {"file": self.path, "digest": self.digest, "read": describe(self.read)}
        data.write_pairs(context.folder / data.PAIR_DATA, splits, {**source, "task": context.task.name, **figures})
        return figures

    meanings: ClassVar[dict[str, str]] = {
        "pairs": "kept",
        "skipped": "lines of the file that compare nothing, or that its read leaves out",
        "different_prompts": "among the pairs",
        "malformed": "lines of the file that were left out",
    }


@dataclasses.dataclass(frozen=True)
class LoadReplies:
    """Reads a file of replies to imitate, JSON lines or parquet: what ``FineTune`` makes a first policy of.

    The whole file is read before anything runs. ``read`` says what a row is; the default reads {"prompt",
    "completion"}, texts or chats. The dataset is one of pairs whose second reply is empty, with p = 1.
    """

    path: str
    read: json_lines.ReadDemonstration = json_lines.read_demonstration
    skip_malformed: bool = False  # leave malformed lines out, with a warning and a count; else the first is an error
    digest: str = dataclasses.field(init=False)  # of the file's content
    makes: ClassVar[Kind] = Kind.REPLIES
    meanings: ClassVar[dict[str, str]] = {
        "replies": "kept",
        "different_prompts": "among the replies",
        "malformed": LoadPairs.meanings["malformed"],
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", json_lines.file_digest(self.path))

    def network(self, context: Context) -> None:
        """Returns None: replies are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns the content of the file; without a file, the stage alone."""
        return Exposure(fitted=frozenset({f"file {self.digest or self.path or context.name}"}))

    def check(self, context: Context) -> None:
        """Raises UserError when the file cannot be read, or a line is malformed and not to be skipped."""
        read_stage_file(context, self, "replies")

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: reading compiles nothing."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the dataset; returns its figures."""
        lines = read_stage_file(context, self, "replies")
        rows = [{"prompt": row.prompt, "first": row.reply, "second": "", "p": 1.0} for _, row in lines.rows]
        figures = {"replies": len(rows), "different_prompts": len({row["prompt"] for row in rows})}
        if self.skip_malformed:
            figures["malformed"] = len(lines.malformed)
        source = {"file": self.path, "digest": self.digest, "read": describe(self.read), "task": context.task.name}
        data.write_pairs(context.folder / data.PAIR_DATA, {"train": rows}, {**source, **figures})
        return figures


def read_stage_file(context: Context, stage: LoadPairs | LoadReplies, kind: str) -> json_lines.NumberedRows[Any]:
    """Returns the rows and the malformed lines of the stage's file; ``kind`` is the plural of what they are.

    Raises UserError, beginning with the stage's name, as ``json_lines.read_rows`` does.
    """
    try:
        return json_lines.read_numbered_rows(stage.path, kind, stage.read, stage.skip_malformed)
    except UserError as error:
        raise UserError(f"{context.name}: {error}") from None

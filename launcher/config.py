"""What a run is: frozen dataclasses, checked completely on construction.

Nothing here imports torch or transformers, reads a file or looks at the machine, so `--help` is quick and a mistake is
found before a GPU or the network is touched, on every rank alike. On the command line the nesting disappears: `--rank`.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from launcher.engines.registry import ENGINES

if TYPE_CHECKING:
    Sharding = str
else:
    Sharding = Literal[tuple(ENGINES)]  # so that --help and a mistyped name list what the registry has


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base."""

    model: str = "meta-llama/Llama-2-7b-hf"
    """Hugging Face directory or hub name of the base model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute and storage dtype of the base; auto is bfloat16 on a GPU that has it, else float32. Trained cores are
    float32 always."""
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    """flash needs flash-attn and a GPU; auto takes the best that this machine and the model have, and logs which."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen base weights."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The samples, and what of them carries loss."""

    data: str = "tatsu-lab/alpaca"
    """JSON, JSONL or parquet file, or a hub dataset name: Alpaca records, or messages / ShareGPT conversations."""
    eval_data: str | None = None
    """Held-out file of the same form; without it, eval_records are held out of data."""
    eval_records: int = 0
    """How many held-out records to evaluate on; 0 without eval_data: no evaluation."""
    prompt_template: str = "auto"
    """auto (the model's chat template for conversations, else alpaca), short, alpaca, chat, or a FILE with
    {instruction} and {input} (a part in [square brackets] is left out without input), or FILE.jinja: a chat template"""
    template_date: str = "2024-07-26"
    """Today's date (YYYY-MM-DD) for chat templates that write it; fixed, so that a run has the same tokens when it is
    resumed on another day."""
    max_length: int = 512
    """Tokens in a sample; a longer one loses the end of its answer, one whose prompt alone does not fit is dropped and
    counted."""
    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens carry loss."""
    packing: bool = False
    """Put several samples in one row of max_length tokens, with no attention across samples."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What records that cannot be used do: end the run with a list of the first ten and the count of each kind of
    fault, or be left out and logged in the same way."""
    text_columns: tuple[str, ...] = ()
    """Sequence classification: the one or two columns that get a label, in place of instructions."""
    label_column: str = "label"
    """With text_columns: a class (whole number from 0, or name), or a number with a fraction to predict."""
    exact_match: bool = False
    """At each evaluation also write every held-out answer greedily and count those that match to the letter."""
    answer_tokens: int = 64
    """Most tokens a generated answer may have when exact_match is counted."""

    def __post_init__(self) -> None:
        _at_least("data.eval_records", self.eval_records, 0)
        _at_least("data.max_length", self.max_length, 8)
        _at_least("data.answer_tokens", self.answer_tokens, 1)
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError(f"--template-date is a date such as 2024-07-26, got {self.template_date!r}") from None
        if len(self.text_columns) > 2:
            raise ValueError(f"data.text_columns are one or two, got {' '.join(self.text_columns)}")
        if self.exact_match and not (self.eval_records or self.eval_data):
            raise ValueError("exact_match counts held-out answers: give --eval-records N or --eval-data FILE as well")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained. `method` is one of ours (loldu) or any PEFT method's name; `full` trains the base itself."""

    method: str = "loldu"
    rank: int = 64
    """Trained diagonal entries per weight, clamped to the weight's smaller side."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of module names, or the one word all-linear."""
    exclude: tuple[str, ...] = ()
    """Modules left out although targets matches them."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained and saved whole beside the adapter, for example a new classification head."""
    options: tuple[str, ...] = ()
    """Further fields of the method's PEFT config as name=value, the value in JSON: scale=2, lora_alpha=16."""

    def __post_init__(self) -> None:
        _at_least("adapter.rank", self.rank, 1)
        if not self.targets:
            raise ValueError(
                "--targets (adapter.targets) is empty: give --targets q_proj v_proj, or --targets all-linear"
            )
        for option in self.options:
            if "=" not in option:
                raise ValueError(
                    f"--options (adapter.options) are written name=value (--options scale=2), got {option!r}"
                )
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError(f"--targets all-linear stands alone, got {' '.join(self.targets)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; every value is a pure function of the step."""

    learning_rate: float = 1e-3
    """LoLDU's as published. With normalize_directions=true, and for SVFit and LoRA-XS, 3e-2 cost least where measured
    (README)."""
    batch_size: int = 128
    """Samples (rows, when packing) per optimizer step, over all processes."""
    micro_batch_size: int = 0
    """At most so many samples in one forward pass of a process; 0: its whole share of the batch at once."""
    max_steps: int = 0
    """Optimizer steps; 0: as many as epochs ask for."""
    epochs: float = 3.0
    """Passes over the data, when max_steps is 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    """Share of the steps in which the rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled decay; on our cores it pulls towards the base model."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    seed: int = 42
    """Decides the order of samples, dropout and random starting values."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"{_flag('optimizer.learning_rate')} is a positive number, got {self.learning_rate}")
        _at_least("optimizer.batch_size", self.batch_size, 1)
        _at_least("optimizer.micro_batch_size", self.micro_batch_size, 0)
        _at_least("optimizer.max_steps", self.max_steps, 0)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _at_least("optimizer.clip_norm", self.clip_norm, 0)
        _at_least("optimizer.seed", self.seed, 0)
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(f'optimizer.{name}')} lies in [0, 1), got {getattr(self, name)}")
        if self.max_steps == 0 and not self.epochs > 0:
            raise ValueError(f"nothing to train: --max-steps is 0 and --epochs is {self.epochs}; give one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, how it is spread, when it saves and stops."""

    output: str | None = None
    """Run folder; without it runs/<recipe>-<time>."""
    sharding: Sharding | None = None
    """How base and factors lie over the processes; without it none for one process, ddp for several."""
    shard_size: int = 0
    """With hsdp: processes that share one copy of the model; 0: those of a node."""
    cpu_offload: bool = False
    """Keep in main memory, between their uses on the GPU, what a process holds of all parameters (fsdp2, hsdp, zero3)
    and of the optimizer's state (these and zero2)."""
    cache: str | None = None
    """Folder of the factor cache, one for all nodes; without it the user's cache directory (XDG_CACHE_HOME/loldu)."""
    cache_per_node: bool = False
    """The cache folder is another one on each node: each makes all factors for itself."""
    verify_base: bool = False
    """Hash the base weights again instead of trusting file size and time when factors are looked up."""
    save_every: int = 0
    """Steps between checkpoints; 0: one at the end, or when stopped."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on; a kill may then cost one checkpoint more."""
    keep_last: int = 0
    """Checkpoints kept, besides the best one; 0: all."""
    eval_every: int = 0
    """Steps between evaluations besides those at the start and the end; 0: none."""
    patience: int = 0
    """Stop after so many evaluations without a better loss; 0: never."""
    max_seconds: float = 0.0
    """Save and stop by itself after this time; 0: no limit."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint in output; never: a fresh run; or the path of a checkpoint."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides events.jsonl."""
    show_samples: int = 0
    """Held-out questions answered on the screen before and after training."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "save_every", "keep_last", "eval_every", "patience", "max_seconds", "show_samples"):
            _at_least(f"run.{name}", getattr(self, name), 0)
        if self.patience and not self.eval_every:
            raise ValueError(f"--patience {self.patience} needs evaluations to watch: give --eval-every N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One complete run. A recipe returns it; a variation is the same with a field replaced."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        evaluates = self.data.eval_records or self.data.eval_data
        for flag, value in (("eval-every", self.run.eval_every), ("show-samples", self.run.show_samples)):
            if value and not evaluates:
                raise ValueError(f"--{flag} {value} needs held-out records: give --eval-records N or --eval-data FILE")
        if self.adapter.method == "full" and self.model.quantize != "none":
            raise ValueError(
                f"full fine-tuning writes the base, which --quantize {self.model.quantize} makes read-only: "
                "train an adapter, or give --quantize none"
            )


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON data; tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
    )


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Build a config dataclass from JSON data; an unknown name is an error that lists the nearest valid ones."""
    hints, known = get_type_hints(cls), {f.name for f in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting {where}{name}; {nearest(name, known)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{where}{name}.")  # type: ignore[arg-type]
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


def nearest(name: str, known: set[str]) -> str:
    """What to type instead of a misspelled name."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"valid names: {', '.join(sorted(known))}"


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:  # written so that NaN fails too
        raise ValueError(f"{_flag(name)} is at least {low}, got {value}")


def _flag(name: str) -> str:
    """A setting as it is typed, and as a recipe writes it."""
    return f"--{name.rpartition('.')[2].replace('_', '-')} ({name})"

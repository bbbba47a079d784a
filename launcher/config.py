"""What a run is: frozen dataclasses, checked completely on construction.

Nothing here imports torch or transformers, reads a file or looks at the machine, so `--help` is quick and a mistake is
found before a GPU or the network is touched, on every rank alike. The command line is flat: adapter.rank is `--rank`.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from launcher.engines.registry import ENGINES
from launcher.optimizers import OPTIMIZERS
from launcher.tasks.registry import REGISTERED

if TYPE_CHECKING:
    Sharding = str
    TaskName = str
    OptimizerName = str
else:  # --help and the error for a wrong name list what the registries have
    Sharding = Literal[tuple(ENGINES)]
    TaskName = Literal[("auto", *REGISTERED)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]


SHORT = reprlib.Repr()  # the repr of a value whose YAML repeats itself by aliases would never end
SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel = 1


@dataclass(frozen=True)
class Range:
    """The values that a number may have. above and below exclude the bound itself."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with a number; None if it is in the range."""
        if value < self.low or (self.above and value == self.low):
            return f"must be {'above' if self.above else 'at least'} {self.low:g}"
        if value > self.high or (self.below and value == self.high):
            return f"must be {'below' if self.below else 'at most'} {self.high:,.12g}"
        return None


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1, below=True)]


class Checked:
    """A config dataclass whose fields are checked against their types and ranges on construction."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        section = cls.__name__.removesuffix("Config").lower()
        for name, hint in _hints(cls).items():
            if problem := _problem(hint, getattr(self, name)):
                value = getattr(self, name)
                raise ValueError(f"--{name.replace('_', '-')} ({section}.{name}) {problem}, got {SHORT.repr(value)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The frozen base model."""

    model: str = "meta-llama/Llama-2-7b-hf"
    """Hugging Face folder or hub name of the base model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the base weights and of computation; auto is bfloat16 on a GPU that supports it, else float32. Trained
    cores are always float32."""
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """Attention implementation; flash needs flash-attn and a GPU, varlen a GPU of the Ampere generation or later. auto
    takes the first of them that works here."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen base weights."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps on a GPU after a minute or more of compiling."""
    train_text_encoder: bool = False
    """With --task subject: adapt the text encoder too, where --targets names its layers (q_proj k_proj v_proj
    out_proj)."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder. Only for models that you trust."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """The training samples, and which of their tokens carry loss."""

    data: str | tuple[str, ...] = "tatsu-lab/alpaca"
    """JSON, JSONL, CSV or parquet file, folder, or hub dataset name: instructions, prompts with completions,
    conversations, or labelled texts or images. Several can be given, each with a weight: a.jsonl b.parquet:0.3 (below 1
    the share of its records that is used, above 1 how often they are used)."""
    task: TaskName = "auto"
    """What is learned: instruct (instructions and conversations), label (classes of --text-columns or --image-column),
    text (plain text), prefer (pairs of a chosen and a rejected answer) or subject (what a folder of pictures shows).
    auto is label with one of these columns, subject with --instance-prompt, else instruct."""
    columns: tuple[str, ...] = ()
    """Columns of other names, as prompt=question answer=solution; also input, system, history, messages, tools. With
    --task text: text=COLUMN; with --task prefer: prompt, chosen and rejected."""
    eval_data: str | None = None
    """File with held-out records of the same form. Without it, --eval-records are held out of --data."""
    eval_records: CountOrZero = 0
    """Number of held-out records for evaluation; 0 without --eval-data means no evaluation."""
    fewer_eval_records: bool = False
    """Hold out a tenth of the records if there are no more than --eval-records. Recipes do so by default, unless
    --eval-records is given."""
    prompt_template: str = "auto"
    """auto (the chat template for conversations, else alpaca), short, alpaca, chat, none (the bare prompt), FILE.jinja
    (a chat template), or a FILE with {instruction} and {input} (a part in [brackets] is left out without input)"""
    template_date: str = "2024-07-26"
    """Today's date (YYYY-MM-DD) for chat templates that write it; fixed, so that a run has the same tokens when it is
    resumed on another day."""
    max_length: Annotated[int, Range(8)] = 512
    """Maximum tokens per sample. A longer answer is cut at its end; a sample whose prompt alone is longer is dropped,
    and the number of dropped samples is logged."""
    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens carry loss."""
    packing: bool = False
    """Put several samples into one row of --max-length tokens, without attention between samples."""
    on_bad_record: Literal["error", "skip"] = "error"
    """error ends the run with a list of the first ten records that cannot be used and a count of each kind of fault;
    skip leaves them out and logs the same list."""
    text_columns: tuple[str, ...] = ()
    """With --task label: the one or two columns with the text to classify."""
    image_column: str | None = None
    """With --task label: the column with the image to classify. For a folder with one subfolder per class, or a .zip of
    one, give image."""
    label_column: str = "label"
    """With --text-columns or --image-column: the column with a class (whole number from 0, or name), or a fraction to
    predict. A folder's subfolders are its classes."""
    random_crop: Annotated[float, Range(0, 1, above=True)] = 0.08
    """With --image-column: train on a random part of each image, at least this share of its area; 1 turns it off."""
    random_flip: bool = True
    """With --image-column: mirror half of the training images, at random each time."""
    exact_match: bool = False
    """At each evaluation, also generate every held-out answer greedily and count exact matches."""
    answer_tokens: Count = 64
    """Maximum tokens of an answer that is generated for --exact-match."""
    preference_loss: Literal["dpo", "orpo"] = "dpo"
    """With --task prefer: DPO compares with the base model (the adapter disabled), ORPO adds its odds ratio to the loss
    of the chosen answer and needs no reference."""
    preference_beta: Annotated[float, Range(0, 1e3, above=True)] = 0.1
    """With --task prefer: how strongly the preference weighs (beta of DPO, lambda of ORPO)."""
    instance_prompt: str = ""
    """With --task subject: the words for the pictures of --data, with a rare one that names the subject: a photo of sks
    dog."""
    class_prompt: str = ""
    """With --task subject: the words for the subject's class (a photo of a dog). Pictures of the class are trained too,
    so that the model does not forget it."""
    class_data: str | None = None
    """Folder with pictures of the class. Without it, the base draws --class-pictures of them before training."""
    class_pictures: Count = 100
    """Number of pictures of the class to draw; they are kept in the cache."""
    prior_weight: Annotated[float, Range(0, 1e3)] = 0.0
    """With --class-prompt: weight of the loss on pictures of the class (1 in DreamBooth); 0 trains without them."""
    resolution: CountOrZero = 0
    """With --task subject: side of the square pictures in pixels; 0 is the side that the pipeline was made for."""
    crop: Literal["center", "random"] = "center"
    """With --task subject: which square of a picture is used, after its shorter side was scaled to --resolution.
    Latents of center crops are computed once; with random, the VAE runs in each step."""
    flip: bool = False
    """With --task subject: mirror half of the pictures, at random in each step; not for subjects with a left and a
    right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("--data (data.data) is empty: give a file, a folder or a hub dataset")
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", self.data[0] if len(self.data) == 1 else tuple(self.data))
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError(
                f"--template-date (data.template_date) must be a date such as 2024-07-26, got {self.template_date!r}"
            ) from None
        if len(self.text_columns) > 2:
            raise ValueError(f"--text-columns (data.text_columns) takes one or two, got {' '.join(self.text_columns)}")
        if self.exact_match and not (self.eval_records or self.eval_data):
            raise ValueError("--exact-match needs held-out records: give --eval-records N or --eval-data FILE as well")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """What is trained."""

    method: str = "loldu"
    """loldu or another method of this project, the name of any PEFT method, or full: train the base model itself."""
    rank: Count = 64
    """The method's rank: for loldu and svfit the trained diagonal entries per weight, for lora the usual r. At most the
    weight's smaller side."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of the names of the modules to adapt, or the single word all-linear."""
    exclude: tuple[str, ...] = ()
    """Modules that are not adapted although --targets matches them."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained in full and saved with the adapter, such as a new classification head."""
    options: tuple[str, ...] = ()
    """Further fields of the method's PEFT config as name=value, with the value in JSON: scale=2, lora_alpha=16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError(
                "--targets (adapter.targets) is empty: give --targets q_proj v_proj, or --targets all-linear"
            )
        for option in self.options:
            if "=" not in option:
                raise ValueError(
                    f"--options (adapter.options) has the form name=value (--options scale=2), got {option!r}"
                )
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError(f"--targets all-linear cannot be combined with names, got {' '.join(self.targets)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """The optimizer and its learning-rate schedule."""

    optimizer: OptimizerName = "adamw"
    """adamw, adamw8bit, lion and lion8bit (bitsandbytes; one process or ddp), or gradnormlorp (for --method full)."""

    learning_rate: Annotated[float, Range(0, 1e3, above=True)] = 1e-3
    """Peak learning rate. 1e-3 is LoLDU's published value; 3e-2 was best in our measurements for SVFit, LoRA-XS and
    LoLDU with normalize_directions=true."""
    batch_size: Annotated[int, Range(1, 10**7)] = 128
    """Samples (rows, when packing) per optimizer step, summed over all processes."""
    micro_batch_size: CountOrZero = 0
    """Maximum samples per forward pass of a process; 0 means the process's whole share of the batch."""
    micro_batch_tokens: CountOrZero = 0
    """Maximum positions (samples x the longest of them) per forward pass; 0 means those of --micro-batch-size samples
    of mean length."""
    max_steps: CountOrZero = 0
    """Number of optimizer steps; 0 means as many as --epochs needs."""
    epochs: Annotated[float, Range(0, 1e6)] = 3.0
    """Passes over the data, if --max-steps is 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate changes after the warm-up."""
    warmup_ratio: Share = 0.0
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Range(0, 1e3)] = 0.0
    """Decoupled weight decay; on trained cores it pulls the model towards the base model."""
    adam_beta1: Share = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Share = 0.999
    """Decay rate of the second moment. Lion also has two rates: its own default for the second is 0.99."""
    projection_rank: Count = 8
    """With gradnormlorp: rank to which a weight's gradient is projected."""
    projection_every: Count = 250
    """With gradnormlorp: steps between two decompositions of the gradient."""
    clip_norm: Annotated[float, Range(0, 1e9)] = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    seed: CountOrZero = 42
    """Determines the order of samples, dropout and random initial values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0 and not self.epochs > 0:
            raise ValueError(f"nothing to train: --max-steps is 0 and --epochs is {self.epochs}; give one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Where the run is stored, how it is distributed, when it saves and stops."""

    output: str | None = None
    """Run folder. Default: runs/NAME-TIME, NAME being that of the recipe or file."""
    sharding: Sharding | None = None
    """How the base model is distributed over the processes. Default: none for one process, ddp for several."""
    shard_size: CountOrZero = 0
    """With hsdp: number of processes that share one copy of the model; 0 means those of one node."""
    cpu_offload: bool = False
    """Keep parameters (fsdp2, hsdp, zero3) and optimizer state (these and zero2) in main memory while the GPU does not
    need them."""
    cache: str | None = None
    """Folder of the factor cache, shared by all nodes. Default: the user's cache folder (XDG_CACHE_HOME/loldu)."""
    cache_per_node: bool = False
    """The cache folder is local to each node: each node computes all factors itself."""
    verify_base: bool = False
    """Hash the base weights again when factors are looked up, instead of trusting file size and time."""
    save_every: CountOrZero = 0
    """Steps between checkpoints; 0 saves only at the end, or when the run is stopped."""
    async_save: bool = False
    """Write checkpoints in the background while training continues. A kill can then lose one more checkpoint."""
    keep_last: CountOrZero = 0
    """Number of checkpoints to keep besides the best one; 0 keeps all."""
    eval_every: CountOrZero = 0
    """Steps between evaluations, besides those at the start and the end; 0 means none."""
    patience: CountOrZero = 0
    """Stop after this many evaluations without a lower loss; 0 turns this off."""
    max_seconds: Annotated[float, Range(0, 1e9)] = 0.0
    """Save and stop after this many seconds; 0 means no limit."""
    resume: str = "auto"
    """auto resumes from the newest good checkpoint in --output; never starts afresh; or the path of a checkpoint."""
    accept_changes: bool = False
    """Resume although settings that change the learning curve differ from those the run began with."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where to log besides events.jsonl."""
    show_samples: CountOrZero = 0
    """Number of held-out questions to answer at each evaluation; shown on the screen before and after training."""
    report: bool = True
    """Write report.html when the run has finished: curves, trained numbers and answers (loldu report)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.eval_every:
            raise ValueError(f"--patience {self.patience} needs regular evaluations: give --eval-every N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One complete run. A recipe returns it; a variation replaces a field."""

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
                f"--method full trains the base weights, which --quantize {self.model.quantize} makes read-only: "
                "train an adapter, or give --quantize none"
            )


def data_name(data: str | tuple[str, ...]) -> str:
    """The sources of a run in one line."""
    return data if isinstance(data, str) else " ".join(data)


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON data; tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
    )


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Build a config dataclass from JSON data.

    Raises ValueError for an unknown name, with the path of the nearest valid one, and for a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{where.rstrip('.') or 'the file'} must hold settings (name: value), got {SHORT.repr(values)}"
        )
    hints = _hints(cls)
    built = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown setting {where}{name}; {nearest_setting(where, str(name))}")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, f"{where}{name}.")
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


def nearest_setting(where: str, name: str) -> str:
    """What to write instead of an unknown setting: a name of the same section, or the section where it belongs."""
    paths = {f"{section}.{name}" for section, hint in _hints(Config).items() for name in _hints(hint)}
    valid = {path.removeprefix(where) for path in paths if path.startswith(where)} if where else set(_hints(Config))
    near = [where + match for match in difflib.get_close_matches(name, valid, n=3, cutoff=0.6)]
    if not near:
        ends = {path.rpartition(".")[2]: path for path in paths}
        near = [ends[match] for match in difflib.get_close_matches(name, ends, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"valid names: {', '.join(where + known for known in sorted(valid))}"


def nearest(name: str, known: set[str]) -> str:
    """What to type instead of a misspelled name."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"valid names: {', '.join(sorted(known))}"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass with their types, ranges included."""
    return get_type_hints(cls, include_extras=True)


def _problem(hint: Any, value: Any) -> str | None:
    """Why a value does not fit a type hint ("must be at least 1"); None if it does."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = (part.problem for part in parts[1:] if isinstance(part, Range))
        return _problem(parts[0], value) or next((said for problem in ranges if (said := problem(value))), None)
    if origin in (Union, types.UnionType):
        problems = [_problem(part, value) for part in parts if part is not type(None)]
        return None if (value is None and type(None) in parts) or None in problems else problems[0]
    if origin is Literal:
        return None if isinstance(value, str) and value in parts else f"must be one of {', '.join(parts)}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "must be a list"
        return next(
            (f"must be a list; each entry {said}" for part in value if (said := _problem(parts[0], part))), None
        )
    if hint is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return "must be a whole number"
        return None if abs(value) < 2**63 else "must be below 2^63"
    if hint is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return "must be a number"
        return None if abs(value) < math.inf else "must be a finite number"  # written so that NaN fails too
    assert hint is str, hint
    if not isinstance(value, str):
        return "must be text"
    half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
    return f"must be text in UTF-8, without {half!r}" if half else None

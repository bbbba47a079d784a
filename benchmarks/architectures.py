"""Which of transformers' architectures this project trains: `python benchmarks/architectures.py [TYPE ...]`.

For each type of language model in transformers, makes a random model of a few hundred thousand parameters and does with
it what a user does: train, shard, quantise, resume, generate, merge, export, pack. Each result is "works", "refused:
why" or "fails: how". If two ways must give the same loss, "works" means that they do. Writes
benchmarks/results/architectures.json and docs/architectures.md; --table writes only the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig  # noqa: E402
from launcher.inference.export import export_lora  # noqa: E402
from launcher.inference.load import load  # noqa: E402
from launcher.inference.merge import merge  # noqa: E402
from launcher.inference.sources import find  # noqa: E402
from launcher.models.generation import answer  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "architectures.json"
PAGE = REPO / "docs" / "architectures.md"
TOKENIZER = REPO / "recipes" / "tiny" / "model"
VOCABULARY = 384
SAME = 2e-4  # between two ways of computing one loss, in float32; below 2e-6 if they agree
LIMIT_S = 300

# Types whose checkpoints hold more than a language model, here trained on text only.
MULTIMODAL = (
    "aya_vision", "gemma3", "gemma3n", "gemma4", "glm4v", "idefics3", "internvl", "llama4", "llava", "llava_next",
    "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
)  # fmt: skip
# Not text decoders that users fine-tune: parts of speech and image models, and encoders.
LEFT_OUT = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
    "data2vec-text", "electra", "emu3", "ernie", "fuyu", "git", "got_ocr2", "marian", "mbart", "megatron-bert", "moshi",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "mvp", "pegasus", "phi4_multimodal", "plbart",
    "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper",
    "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "gemma4_assistant", "gemma4_unified_assistant", "blt",
    "dots3_note", "gemma3n",
)  # fmt: skip

# A value is used if a type's config has a field of that name.
SIZES: dict[str, Any] = {
    name: value
    for names, value in (
        ("hidden_size d_model n_embd embedding_dim embedding_size dim attention_hidden_size word_embed_proj_dim "
         "lru_width", 64),
        ("intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff ffn_hidden_size "
         "dense_intermediate_size intermediate_size_mlp block_ff_dim dff", 96),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth", 2),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
         "attention_heads swa_num_attention_heads linear_num_key_heads num_experts num_local_experts "
         "n_routed_experts moe_num_experts", 4),
        ("num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads multi_query_group_num "
         "num_experts_per_tok moe_k num_experts_per_token moe_topk index_n_heads", 2),
        ("head_dim d_head attention_head_dim d_kv mamba_d_head mamba_head_dim swa_head_dim swa_v_head_dim v_head_dim "
         "linear_key_head_dim linear_value_head_dim global_head_dim dim_head kv_channels q_lora_rank kv_lora_rank "
         "o_lora_rank hidden_size_per_layer_input laurel_rank gate_low_rank_dim qk_head_dim index_topk", 16),
        ("vocab_size vocab_size_per_layer_input first_vocab_size", VOCABULARY),
        ("max_position_embeddings n_positions context_length n_ctx max_seq_len max_seq_length max_sequence_length "
         "max_target_positions max_source_positions seq_length", 192),
        ("moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size "
         "expert_ffn_hidden_size expert_dim moe_ffn_hidden_size image_size", 32),
        ("qk_rope_head_dim qk_nope_head_dim index_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads "
         "mamba_num_heads n_mamba_heads linear_num_value_heads rotary_dim patch_size", 8),
        ("n_group topk_group n_groups mamba_n_groups mamba_ngroups n_shared_experts num_shared_experts", 1),
        ("sliding_window attention_chunk_size window_size attention_window_size", 24),
        ("pad_token_id pad_token_index", 2), ("eos_token_id", 1), ("bos_token_id decoder_start_token_id", 0),
        ("is_decoder", True),
    )
    for name in names.split()
}  # fmt: skip
FULL_HEADS = {"num_key_value_heads": 4}  # latent attention
SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]}
LATENT_ATTENTION = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa",
    "minicpm3", "youtu",
)  # fmt: skip
HYBRIDS = (
    "qwen3_next", "bailing_hybrid", "olmo_hybrid", "minimax", "lfm2",
    "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "recurrent_gemma", "nemotron_h",
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT_ATTENTION, FULL_HEADS),
    "longcat_flash": FULL_HEADS | {"head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": [96] * 5,
        "activation_sparsity_pattern": [0.0] * 5, "layer_types": [*["sliding_attention"] * 4, "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        for kind in ("qwen2_5_vl_text", "qwen2_vl_text")
    },
    "glm4v_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5
        },
    },
    "bamba": {"attn_layer_indices": [1]},
    "rwkv": {"num_hidden_layers": 8},  # it treats layers from the seventh on differently in evaluation
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "kimi_linear": FULL_HEADS | {"num_hidden_layers": 5, "linear_head_dim": 16, "linear_num_heads": 4},
    "t5": {"decoder_start_token_id": 0},
    "zamba": MAMBA | {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": MAMBA["layer_types"], "num_mem_blocks": 1},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    **{kind: {"num_hidden_layers": 4} for kind in HYBRIDS},
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2", "exaone4", "olmo3"), SLIDING),
    "mistral": {"sliding_window": 24},
    "qwen4_exp_text": {
        "num_hidden_layers": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "dbrx": {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96, "hidden_size": 64},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
}  # fmt: skip

# Bases of classifiers: encoders, and decoders with a classification head.
CLASSIFIERS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "funnel", "gemma",
    "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "modernbert", "mpnet", "opt",
    "phi3", "qwen2", "qwen3", "qwen3_5", "rembert", "roberta", "roformer", "t5", "xlm-roberta",
)  # fmt: skip
CASES = ("train", "fsdp2", "nf4", "int8", "resume", "generate", "merge", "export", "packing")


LABEL_CASES = ("train", "fsdp2", "nf4", "int8", "resume")
PREFACE = """# Architectures

Every type of language model in transformers {transformers} (torch {torch}) that can be built small and at random,
tested on a CPU with LoLDU on all linear layers. `python benchmarks/architectures.py` writes this page and
benchmarks/results/architectures.json.

- **train**: two steps. **fsdp2**: the losses equal those of one process. **nf4**, **int8**: two steps on a
  quantised base, and an answer from it; fused experts keep the compute dtype.
- **resume**: interrupted after the first step, the second has the same loss. **generate**: the tokens equal those of
  full forward passes. **merge**, **export**: the logits equal those of base and adapter. **packing**: two samples in
  one row have the same loss as in two rows.
- A number in brackets refers to the reason below. \"refused\": an error before training, with a remedy. A reason
  against packing lists the layouts that were tried (`sdpa` and `eager`: a mask; by layer type: a mask for each type
  of layer; `positions`: position ids that start again), and the relative difference of the second sample's outputs.
- **tried**: the commit of this project that the row was last tried with."""


def shrunk(kind: Any, **own: Any) -> Any:
    """The config of a type, and of its parts, at a size that trains in a second."""
    fields = {field.name for field in dataclasses.fields(kind)}
    parts = {}
    for name, part in kind.sub_configs.items():
        if name in fields and name not in own:
            if part is transformers.AutoConfig:
                default = getattr(kind(), name)
                part = type(default) if default is not None else None
            if part is not None:
                parts[name] = shrunk(part, **OWN.get(part.model_type, {})).to_dict()
    plain = {name: value for name, value in SIZES.items() if name in fields}
    plain |= {
        name: 0.0
        for name in fields
        if ("drop" in name or "jitter" in name) and isinstance(getattr(kind(), name, None), float)
    }
    return kind(**plain | parts | own)


def make(kind: str, folder: Path, *, labels: bool = False) -> int:
    """Write a random checkpoint of that type with the embedded model's tokenizer; returns its number of parameters."""
    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[kind], **OWN.get(kind, {}), **({"is_decoder": False} if labels else {}))
    causal = type(config) in AutoModelForCausalLM._model_mapping
    whole = AutoModel if labels else AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model: Any = whole.from_config(config)
    with torch.no_grad():  # initial weights of 0.02 hide errors in attention
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size="500KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    if kind == "t5":  # its classifier reads the state at the mark that its own tokenizer puts at the end
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        end, backend = tokenizer.eos_token, tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
        backend.save(str(folder / "tokenizer.json"))
    return sum(parameter.numel() for parameter in model.parameters())


class Trial:
    """One model and the cases to try with it."""

    def __init__(self, folder: Path, *, labels: bool = False):
        self.folder = folder
        records = json.loads((REPO / "recipes" / "tiny" / "instructions" / "train.json").read_text())
        short = sorted(records, key=lambda record: len(str(record)))
        (folder / "data.json").write_text(json.dumps(short[:40]))
        (folder / "two.json").write_text(json.dumps(short[:2]))
        rows = [{"text": record["instruction"], "label": number % 2} for number, record in enumerate(short[:40])]
        (folder / "labels.json").write_text(json.dumps(rows))
        self.base = Config(
            model=ModelConfig(model=str(folder / "model"), dtype="float32"),
            data=DataConfig(data=str(folder / "data.json"), prompt_template="short", max_length=96),
            adapter=AdapterConfig(rank=4, targets=("all-linear",)),
            optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=2, max_steps=2),
            run=RunConfig(save_every=1, cache=str(folder / "cache")),
        )
        if labels:
            data = DataConfig(data=str(folder / "labels.json"), text_columns=("text",), max_length=96)
            self.base = replace(self.base, data=data)

    def losses(self, name: str, change: Callable[[Config], Config] = lambda config: config) -> list[float]:
        """Of a run of that name. Raises ValueError with the run's own words if it is refused."""
        out = self.folder / name
        config = change(replace(self.base, run=replace(self.base.run, output=str(out))))
        code = run(config, name)
        if code:
            raise Refused() if code == 2 else RuntimeError(f"exit code {code}")
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        return [event["loss"] for event in events if "loss" in event]

    def train(self) -> None:
        found = self.losses("train")
        assert len(found) == 2, found
        assert all(loss == loss and abs(loss) < 1e6 for loss in found), found

    def fsdp2(self) -> None:
        self._same(self.losses("fsdp2", _running(sharding="fsdp2")), self.losses("train"))

    def nf4(self) -> None:
        self._quantised("nf4")

    def int8(self) -> None:
        self._quantised("int8")

    def _quantised(self, kind: Any) -> None:
        """Two steps, and an answer from the quantised base and its adapter."""
        self.losses(kind, lambda config: replace(config, model=replace(config.model, quantize=kind)))
        if not self.base.data.text_columns:
            model, tokenizer = load(find(str(self.folder / kind)))
            answer(model, tokenizer, [tokenizer("Sort: dca")["input_ids"]], max_tokens=2, stop_ids=[])

    def resume(self) -> None:
        shutil.copytree(self.folder / "train", self.folder / "resume")
        shutil.rmtree(self.folder / "resume" / "checkpoints" / "step-000002")
        shutil.rmtree(self.folder / "resume" / "adapter")
        (self.folder / "resume" / "state").write_text("stopped\n")
        wanted = self.losses("train")
        found = self.losses("resume")
        assert found == wanted, f"losses {found} after a resume, {wanted} without"

    def generate(self) -> None:
        """Check that the first tokens equal those of full forward passes, without cache and padding."""
        model, tokenizer = load(find(str(self.folder / "train")))
        prompts = [tokenizer(text)["input_ids"] for text in ("Reverse the word lomi", "Sort: dca")]
        written = answer(model, tokenizer, prompts, max_tokens=4, stop_ids=[])
        for prompt, ids in zip(prompts, written, strict=True):
            so_far = list(prompt)
            for token in ids:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([so_far]), use_cache=False).logits[0, -1]
                gap = float(logits.max() - logits[token])
                assert gap < 1e-3, f"token {token} is {gap:.2g} below the likeliest one of a whole forward pass"
                so_far.append(token)

    def merge(self) -> None:
        merge(str(self.folder / "train"), out=str(self.folder / "merged"))

    def export(self) -> None:
        export_lora(str(self.folder / "train"), out=str(self.folder / "lora"))

    def packing(self) -> None:
        """Check that two samples in one row give the same loss as in two rows."""

        def two(*, packing: bool, batch: int) -> Callable[[Config], Config]:
            return lambda c: replace(
                c,
                data=replace(c.data, data=str(self.folder / "two.json"), packing=packing, max_length=192),
                optimizer=replace(c.optimizer, batch_size=batch),
            )

        self._same(self.losses("packed", two(packing=True, batch=1)), self.losses("apart", two(packing=False, batch=2)))

    @staticmethod
    def _same(found: list[float], wanted: list[float]) -> None:
        apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        assert apart < SAME, f"losses {found}, expected {wanted}"


class Refused(Exception):
    """A run ended with exit code 2; its error is on stderr."""


def _running(**values: Any) -> Callable[[Config], Config]:
    return lambda config: replace(config, run=replace(config.run, **values))


def attempt(kind: str, folder: Path, cases: tuple[str, ...], labels: bool) -> dict[str, Any]:
    """The result of each case. Runs in a separate process, whose output goes to a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    log = folder / "log.txt"
    place = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(place, stream)
    try:
        found["parameters"] = make(kind, folder / "model", labels=labels)
    except Exception as error:
        return {"made": f"{type(error).__name__}: {_short(str(error))}"}
    trial = Trial(folder, labels=labels)
    for case in cases:
        before, started = log.stat().st_size, time.monotonic()
        try:
            getattr(trial, case)()
            found[case] = "works"
        except Refused:
            sys.stderr.flush()
            said = log.read_bytes()[before:].decode(errors="replace")
            found[case] = "refused: " + _short(said.rpartition("error: ")[2])
        except ValueError as error:
            found[case] = "refused: " + _short(str(error))
        except Exception as error:
            traceback.print_exc()
            said = log.read_bytes()[before:].decode(errors="replace")
            lines = [line for line in said.splitlines() if re.match(r"^[\w.]*(Error|Exception)\b", line)]
            found[case] = "fails: " + _short(lines[0] if lines and not str(error).strip("() ") else repr(error))
        found.setdefault("seconds", {})[case] = round(time.monotonic() - started, 1)
        if case == "train" and found[case] != "works":
            break
    return found


def _short(text: str) -> str:
    text = re.sub(r"\S*/(model|train|lora|merged)\b", "MODEL", " ".join(text.split()))
    return text if len(text) < 1000 else text[:997] + "..."


def _child(kind: str, folder: Path, cases: tuple[str, ...], labels: bool, pipe: Any) -> None:
    pipe.send(attempt(kind, folder, cases, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="default: all; the results of others are kept")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--keep", metavar="DIR", help="keep models, runs and logs there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--labels", action="store_true", help="classifiers alone")
    parser.add_argument("--table", action="store_true", help="write the page from the existing results")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    every = dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL])
    texts = [("types", kind) for kind in args.kinds or every if kind not in LEFT_OUT or kind in args.kinds]
    labels = [("labels", kind) for kind in args.kinds or CLASSIFIERS if kind in CLASSIFIERS]
    asked = ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    tried = {
        "commit": subprocess.check_output(asked, text=True).strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for section, kind in () if args.table else [*([] if args.labels else texts), *labels]:
        cases = tuple(case for case in args.cases if section == "types" or case in LABEL_CASES)
        found = try_apart(kind, cases, section == "labels", args.keep)
        if set(cases) >= set(CASES if section == "types" else LABEL_CASES):
            found["tried"] = tried
        place = results.setdefault(section, {})
        place[kind] = found if "tried" in found else place.get(kind, {}) | found
        results["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
        args.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(section, kind, {case: found.get(case, found.get("made", "-")) for case in cases}, flush=True)
    if args.table or args.out == RESULTS:
        PAGE.write_text(page(results))


def try_apart(kind: str, cases: tuple[str, ...], labels: bool, keep: str | None) -> dict[str, Any]:
    """Run `attempt` in a separate process, with a time limit."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(keep or scratch) / (f"{kind}-labels" if labels else kind)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mine, theirs = fork.Pipe()
        child = fork.Process(target=_child, args=(kind, folder, cases, labels, theirs))
        child.start()
        found = mine.recv() if mine.poll(LIMIT_S) else {"train": f"fails: no answer in {LIMIT_S} s"}
        child.kill()
        child.join()
    return found


def page(results: dict[str, Any]) -> str:
    """docs/architectures.md: a table for language models, one for classifiers, and the reasons for refusals."""
    lines = [PREFACE.format(**results["versions"]), ""]
    reasons: dict[str, str] = {}
    for section, title, cases in (("types", "Language models", CASES), ("labels", "Classifiers", LABEL_CASES)):
        tried = {kind: found for kind, found in sorted(results.get(section, {}).items()) if "made" not in found}
        trained = sum(found["train"] == "works" for found in tried.values())
        commits = Counter(_tried(found) for found in tried.values())
        at = ", ".join(f"{number} with {commit}" for commit, number in commits.most_common())
        lines += [f"## {title}", "", f"{trained} of {len(tried)} types train. Tried: {at}.", ""]
        lines += [f"| type | {' | '.join(cases)} | tried |", f"| --- |{' --- |' * (len(cases) + 1)}"]
        for kind, found in tried.items():
            cells = []
            for case in cases:
                word, _, why = found.get(case, "").partition(": ")
                if why:
                    word += f" [{reasons.setdefault(why, str(len(reasons) + 1))}]"
                cells.append({"works": "yes"}.get(word, word))
            lines.append(f"| {kind} | {' | '.join(cells)} | {_tried(found).split()[0]} |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {_escaped(why)}" for why, number in reasons.items()), ""]
    return "\n".join(lines)


def _tried(found: dict[str, Any]) -> str:
    return "{commit} on {date}".format(**found["tried"]) if "tried" in found else "earlier commits"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    main()

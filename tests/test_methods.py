"""Any PEFT method in the one loop: trained, stopped, resumed, loaded in plain PEFT; methods that are not supported are
refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import REPO, Runs
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapters.schedule import for_steps, schedule_of
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, as_dict
from launcher.engines.replicated import Replicated
from launcher.factorization import cache
from launcher.methods import peft_config, refusals, unusual_learning_rate
from launcher.models.build import build
from launcher.models.generation import answer
from launcher.models.head_loss import HeadLoss
from launcher.processes import Ranks
from launcher.tasks.choose import task_of
from launcher.training import checkpoint
from launcher.training.changes import changes
from launcher.training.loop import SCHEDULE
from launcher.training.resolve import check_context, resolve
from launcher.training.run import run

PROJECTIONS = ("q_proj", "v_proj", "down_proj")
NORMS = ("input_layernorm", "norm")
ALWAYS = [
    ("full",), ("lora", "lora_dropout=0.1"), ("dora",), ("vera",), ("randlora",), ("fourierft",), ("ia3",), ("svfit",),
    ("lorasb",), ("prompt_tuning",), ("adalora",), ("dsee", "entries=8"), ("sara",), ("increlora",),
    ("flora",),
]  # fmt: skip
# The rest of PEFT's methods, and of ours; those with sizes of their own get ones that fit.
ALSO = [
    ("allora", "eta=2"),
    ("rslora",), ("pissa",), ("olora",), ("lora_xs",), ("svft",), ("loldu",), ("lolduxs",), ("svfit", "energy=0.9"),
    ("psoft",), ("oft",), ("ln_tuning",), ("boft",), ("beft",), ("c3a", "block_size=4"), ("deft",), ("delora",),
    ("frod",), ("glora",), ("gralora",), ("hira",), ("hra",), ("lily",), ("loha",), ("lokr",), ("miss",), ("osf",),
    ("peanut",), ("pvera",), ("road", "group_size=4"), ("shira",), ("supertuning",), ("tinylora",), ("unilora",),
    ("trainable_tokens", "token_indices=[5,6]"), ("vblora", "vector_length=4"), ("waveft", "n_frequency=100"),
    ("p_tuning",), ("prefix_tuning",),
    ("shadow", "target_modules=.*layers[.][0-9]+$"),
]  # fmt: skip
SAVED_SMALLER = ("adalora",)  # the result leaves out the directions that were masked
TARGETS = {"ln_tuning": NORMS, "trainable_tokens": ("embed_tokens",), "full": ("q_proj", "v_proj")}


def name_of(method):
    return " ".join(method)


@pytest.fixture
def four_steps(stories, alpaca_file, tmp_path):
    """Four quick steps of a real Llama with 260,032 parameters, saved after two."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps(json.loads(alpaca_file.read_text())[:60]))

    def config(method):
        name, *options = method
        targets = TARGETS.get(name, PROJECTIONS)
        return Config(
            model=ModelConfig(model=str(stories)),
            data=DataConfig(data=str(records), prompt_template="short", max_length=64),
            adapter=AdapterConfig(method=name, rank=4, targets=targets, options=tuple(options)),
            optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=4),
            run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False, save_every=2),
        )

    return config


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, id=name_of(m)) for m in ALWAYS]
    + [pytest.param(m, id=name_of(m), marks=pytest.mark.slow) for m in ALSO],
)
def test_a_method_trains_resumes_bit_for_bit_and_loads_in_plain_peft(method, four_steps, stories, tmp_path):
    whole = four_steps(method)
    again = replace(whole, run=replace(whole.run, output=str(tmp_path / "again")))

    assert run(whole, "test") == 0
    stopped_after(2, whole.run.output, again.run.output)
    torch.manual_seed(999)  # what a new process would not know either
    assert run(again, "test") == 0

    assert events(again) == events(whole)
    once, twice = (load_file(last_checkpoint(c) / "rank-00000.safetensors") for c in (whole, again))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    atol = 1e-4 if method[0] in SAVED_SMALLER else 0  # sums over fewer numbers, of which none is missing but zeros
    torch.testing.assert_close(logits(loaded(whole, stories)), logits(trained(whole, stories)), rtol=0, atol=atol)
    assert not torch.equal(logits(trained(whole, stories)), logits(AutoModelForCausalLM.from_pretrained(stories)))


def stopped_after(step, source, target):
    """A copy of a finished run's folder as a stop after this step leaves it."""
    shutil.copytree(source, target)
    for folder in Path(target, "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    for result in ("adapter", "model"):
        shutil.rmtree(Path(target, result), ignore_errors=True)
    Path(target, "state").write_text("stopped\n")


def events(config):
    return [json.loads(line) for line in Path(config.run.output, "events.jsonl").read_text().splitlines()]


def last_checkpoint(config):
    return Path(config.run.output, "checkpoints", "step-000004")


def trained(config, base):
    """The model of the last checkpoint, as a resume builds it."""
    torch.manual_seed(config.optimizer.seed)
    cpu = torch.device("cpu")
    adapter = for_steps(peft_config(config.adapter), config.optimizer.max_steps)
    if config.adapter.method == "lorasb":
        adapter.step = config.optimizer.learning_rate
    folder = Path(config.run.cache)
    made = {entry.about["name"]: cache.load(folder, entry.key) for entry in cache.entries(folder)}
    model = build(config.model, base, adapter, dtype="float32", attention="sdpa", factors=made.get, device=cpu)
    found = checkpoint.load(last_checkpoint(config))
    Replicated(model, config.optimizer, Ranks()).restore(found)
    if (schedule := schedule_of(model)) is not None:
        schedule.restore(found.step, {name: found.read(f"{SCHEDULE}{name}", shape) for name, shape in shapes(found)})
    return model


def shapes(found):
    """The names of the schedule's tensors in a checkpoint, and their shapes."""
    names = [name for name in found.tensors if name.startswith(SCHEDULE)]
    return [(name.removeprefix(SCHEDULE), found.tensors[name].shape) for name in names]


def loaded(config, base):
    """The run's result by stock functions alone."""
    torch.manual_seed(31)
    if config.adapter.method == "full":
        return AutoModelForCausalLM.from_pretrained(Path(config.run.output, "model"))
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), Path(config.run.output, "adapter"))


@torch.no_grad()
def logits(model):
    tokens = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    return model.eval()(tokens).logits


@pytest.mark.slow
def test_two_processes_train_like_one(stories, alpaca_file, tmp_path):
    """A parameter shared by layers (Uni-LoRA), shared frozen buffers (VeRA), factors from gradients, the whole base,
    ranks that each process allocates for itself.

    Sums over ranks come in another order: float32 rounding, which Adam's first steps pass on times the rate.
    """
    runs = Runs(tmp_path, stories, alpaca_file)

    def changed(method):
        adapter = AdapterConfig(method=method, rank=4, targets=PROJECTIONS)
        optimizer = replace(runs.base.optimizer, max_steps=4)
        return lambda config: replace(config, adapter=adapter, optimizer=optimizer)

    methods = ("lora", "vera", "unilora", "lorasb", "full", "adalora", "sara", "increlora")
    runs.start(2, *(runs.entry(f"{method}-2", "ddp", change=changed(method)) for method in methods))
    for method in methods:
        runs.alone(method, change=changed(method))

    for method in methods:
        torch.testing.assert_close(runs.losses(f"{method}-2"), runs.losses(method), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "lorra"}, "unknown --method lorra; there are, the nearest first: lora, "),
        ({"method": "cpt"}, "cannot be trained here: among methods that train a prompt, give prompt_tuning, p_tuning"),
        ({"method": "adalora", "options": ("init_r=4",)}, "init_r 4 must be above target_r 64"),
        ({"method": "adalora", "options": ("beta1=1",)}, "AdaLoRA's beta1 is between 0 and 1, got 1"),
        ({"method": "adamss", "options": ("use_asa=true",)}, "use_asa=true cannot be trained here"),
        ({"method": "poly"}, "poly cannot be trained here: it needs a task number"),
        ({"method": "lora", "options": ("init_lora_weights=eva",)}, "init_lora_weights=eva cannot .* a pass over data"),
        ({"method": "lora", "options": ("init_lora_weights=pissa_niter_4",)}, "at each loading: give pissa"),
        ({"method": "lora", "options": ("lora_alhpa=8",)}, "unknown option lora_alhpa .* did you mean lora_alpha"),
        ({"method": "lora", "options": ("lora_alpha=big",)}, "lora_alpha=big of method lora: .* expected int, got str"),
        ({"method": "loldu", "options": ("through_write=true",)}, "unknown option through_write"),
        ({"method": "ln_tuning"}, "not for linear layers but for norm layers: --targets input_layernorm"),
        ({"method": "svfit", "options": ("energy=2",)}, "energy is a share between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(adapter, said):
    with pytest.raises(ValueError, match=said):
        peft_config(AdapterConfig(**adapter))


def test_the_documentation_lists_every_refused_method_with_its_reason():
    page = (REPO / "docs" / "methods.md").read_text().partition("### What is refused")[2].partition("\n\nSome")[0]
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `") and "--method" not in line
    ]

    listed = {name: why for names, why in rows for name in re.findall("`([a-z_]+)`", names.partition(" (")[0])}

    assert listed == refusals()


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dora", (), {"use_dora": True, "r": 6}),
        ("pissa", (), {"init_lora_weights": "pissa"}),
        ("lora", ("lora_dropout=0", "lora_alpha=32"), {"lora_dropout": 0.0, "lora_alpha": 32}),
        ("oft", (), {"r": 0, "oft_block_size": 32}),  # its r is a number of blocks
        ("vera", ("d_initial=0.2",), {"r": 6, "d_initial": 0.2}),
    ],
)
def test_names_and_options_become_pefts_fields(method, options, expected):
    config = peft_config(AdapterConfig(method=method, rank=6, options=options))

    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "options", "rate", "usual"),
    [
        ("svfit", (), 1e-3, "0.03"),
        ("loldu", (), 1e-1, "0.001"),
        ("loldu", ("normalize_directions=true",), 1e-3, "0.03"),
        ("loldu", ("normalize_directions=true",), 1e-1, None),
        ("loldu", (), 1e-3, None),
        ("loldu", (), 1e-2, None),
        ("lora", (), 1e-5, None),
        ("full", (), 1e-5, None),
    ],
)
def test_a_learning_rate_far_from_the_best_one_is_a_warning_for_our_methods(method, options, rate, usual):
    said = unusual_learning_rate(method, peft_config(AdapterConfig(method=method, options=options)), rate)

    assert said == (
        usual and f"--learning-rate {rate:g} is far from {usual}, at which {method} trained best on small models"
    )


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("data", {"packing": True}, "--packing several samples into one: leave --packing out"),
        ("data", {"text_columns": ("a",)}, "hides the padding from a classification head"),
        ("model", {"gradient_checkpointing": True}, "cannot compute again: leave --gradient-checkpointing out"),
        ("run", {"sharding": "fsdp2"}, "calls the base's embedding by itself, .* give --sharding ddp, or a method"),
    ],
)
def test_prompt_tuning_methods_are_refused(part, values, said):
    config = Config(adapter=AdapterConfig(method="prefix_tuning"))
    asked = replace(config, **{part: replace(getattr(config, part), **values)})

    with pytest.raises(ValueError, match=said):
        resolve(asked, Ranks(world_size=2))


@pytest.mark.parametrize(("method", "changed"), [("adalora", ("--max-steps 20 (was 10)",)), ("lora", ())])
def test_another_number_of_steps_is_another_schedule_of_ranks(method, changed):
    began = Config(adapter=AdapterConfig(method=method), optimizer=OptimizerConfig(max_steps=10, schedule="constant"))
    now = replace(began, optimizer=replace(began.optimizer, max_steps=20))

    found = changes({"config": as_dict(began), "resolved": {"steps": 10}}, now, 20)

    assert found.curve == changed


@pytest.mark.parametrize("sharding", ["fsdp2", "zero2", "zero3"])
def test_a_schedule_of_ranks_is_refused_where_parameters_are_cut(sharding):
    config = Config(adapter=AdapterConfig(method="adalora"), run=RunConfig(sharding=sharding))

    with pytest.raises(
        ValueError, match=r"adalora cannot be trained under .* which this engine cuts: give --sharding ddp"
    ):
        resolve(config, Ranks(world_size=2))


def test_a_trained_prompt_takes_room_of_the_context(stories):
    config = Config(adapter=AdapterConfig(method="prompt_tuning", rank=8), data=DataConfig(max_length=510))

    with pytest.raises(ValueError, match="--max-length 510 and 8 trained tokens are more than this model's context"):
        check_context(config, AutoConfig.from_pretrained(stories))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_trained_prompt_gives_the_models_own_loss_and_answers_alike_alone_and_in_a_batch(method, stories):
    torch.manual_seed(0)
    adapter = peft_config(AdapterConfig(method=method, rank=5))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories), adapter).eval()
    ids = torch.randint(3, 300, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["attention_mask"][1, 8:] = 0
    batch["labels"][1, 8:] = batch["labels"][:, :3] = -100
    head = HeadLoss(model)

    found = head(**batch, num_items_in_batch=1, use_cache=False).loss
    own = model(**batch, num_items_in_batch=1, use_cache=False).loss
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompts = [ids[0, :9].tolist(), ids[1, :4].tolist()]

    assert head.usable
    torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-5)
    assert answer(model, tokenizer, prompts, 8) == [answer(model, tokenizer, [prompt], 8)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("method", "exports"),
    [("loldu", True), ("svfit", True), ("flora", True), ("sara", False), ("lora", False), ("adalora", False)],
)
def test_a_run_suggests_export_lora_only_for_adapters_that_it_takes(method, exports):
    config = replace(Config(), adapter=AdapterConfig(method=method))

    steps = task_of(config).next_steps(config, Path("run"), Path("run/adapter"))

    assert any("export-lora" in line for line in steps) == exports
    assert any("loldu merge" in line for line in steps)

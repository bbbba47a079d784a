"""A dozen small random models that stand for kinds of architectures go through all that a user does with a model.

The whole, some 140 types, is `python benchmarks/architectures.py`; its results are the page docs/architectures.md.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("architectures", REPO / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(SPEC)
sys.modules["architectures"] = architectures
SPEC.loader.exec_module(architectures)

FAST = {"gpt_oss": "mixture of experts with sinks and windows, eager attention alone"}
KINDS = {
    "deepseek_v3": "latent attention, dense layers beside experts",
    "falcon": "a linear class of its own",
    "gemma3": "a vision tower, windows in a sub-config",
    "gpt2": "transposed weights, tied ends, dropout",
    "gptj": "no SDPA",
    "jamba": "a state beside attention, layers that are read raw",
    "llama4": "a router that returns a tuple, chunks",
    "llava": "another prefix in the checkpoint",
    "mamba": "no attention",
    "mixtral": "experts stored one by one",
    "pythia": "a head under another name",
    "zamba2": "layers that share their weights",
}
TYPES = {"pythia": "gpt_neox"}
MAY_REFUSE = {"jamba": {"packing"}, "mamba": {"packing"}, "zamba2": {"packing", "fsdp2"}}


def tried(kind, tmp_path, cases):
    return architectures.try_apart(TYPES.get(kind, kind), cases, False, str(tmp_path))


def wrong(kind, found, cases):
    """The cases that do not work, but for those that this kind refuses with a remedy."""
    return {
        case: found.get(case, found)
        for case in cases
        if found.get(case) != "works"
        and not (case in MAY_REFUSE.get(kind, ()) and found.get(case, "").startswith("refused: "))
    }


@pytest.mark.parametrize("kind", FAST)
def test_a_mixture_of_experts_trains_packed_shards_and_exports(kind, tmp_path):
    cases = ("train", "fsdp2", "export", "packing")

    assert wrong(kind, tried(kind, tmp_path, cases), cases) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_architecture_works_throughout(kind, tmp_path):
    found = tried(kind, tmp_path, architectures.CASES)

    assert wrong(kind, found, architectures.CASES) == {}


def test_the_page_is_that_of_the_results():
    results = json.loads(architectures.RESULTS.read_text())

    assert architectures.PAGE.read_text() == architectures.page(results)

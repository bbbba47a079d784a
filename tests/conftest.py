"""Shared fixtures: real small models and data beside the checkout, and one thread per test process."""

import logging
import os
import signal
import sys
from pathlib import Path

# The commands installed beside this Python (accelerate, torchrun), even if its environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # multi-process tests share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, which some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(part: str) -> Path:
    path = SHARED / "data" / part
    if not path.exists():
        pytest.skip(f"needs the shared data folder beside the checkout: no {path}")
    return path


@pytest.fixture(autouse=True)
def logs():
    """Levels and handlers as Python starts with them: commands and ranks other than the first set levels for their
    process, and a run's screen writes warnings to standard output."""
    logging.getLogger().setLevel(logging.WARNING)
    for handler in list(logging.getLogger().handlers):
        if type(handler).__module__.split(".")[0] == "launcher":
            logging.getLogger().removeHandler(handler)
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "launcher"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def compilers():
    """CC and CXX stay as they are: a test that builds PEFT's BOFT itself would change those of the tests after it."""
    from launcher.models.skeleton import same_compiler

    with same_compiler():
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `pytest -n 2`, tests of one file run in order on one process, since they share fixtures.

    All that use the one Slurm do so too. Pages of the documentation are independent.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if file.endswith("docs/test_commands.py"):
                return nodeid
            return "cluster" if "cluster/" in file else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def babyllama() -> Path:
    """A real pretrained Llama of 969,216 parameters."""
    return _shared("models/babyllama-361")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained Llama of 260,032 parameters with a BPE vocabulary."""
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def alpaca_file() -> Path:
    """5,000 real Alpaca records."""
    return _shared("instruction/alpaca_5000.json")


@pytest.fixture(scope="session")
def sst2_rows() -> list[dict]:
    """400 real film phrases and whether they praise: {sentence, label}."""
    lines = _shared("classification/sst2_train.tsv").read_text().splitlines()[1:401]
    return [{"sentence": text.strip(), "label": int(label)} for text, label in (line.rsplit("\t", 1) for line in lines)]


@pytest.fixture(scope="session")
def tiny_roberta(sst2_rows, tmp_path_factory) -> Path:
    """A random RoBERTa of 35,000 parameters, for masked words as RoBERTa-base is, and a tokenizer of these phrases."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator([row["sentence"] for row in sst2_rows], vocab_size=400, special_tokens=special)
    words.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # weights of size 0.3: with RoBERTa's 0.02 so small a model tells no two sentences apart
    limits: dict = {"vocab_size": 400, "max_position_embeddings": 66, "type_vocab_size": 1, "hidden_dropout_prob": 0.0}
    RobertaForMaskedLM(RobertaConfig(**sizes, **limits, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    """A random ViT of 23,000 parameters for images of 16 x 16, without a head, with dropout."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    sizes: dict = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    ViTModel(
        ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.2, hidden_dropout_prob=0.1),
        add_pooling_layer=False,
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Thirty images in three folders of classes: noise of one colour each, of several sizes, as JPEG and PNG."""
    import numpy as np
    from PIL import Image

    root, drawn = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(10):
            height, width = drawn.integers(12, 40, 2)
            pixels = drawn.integers(0, 120, (height, width, 3))
            pixels[..., 2 - number] += 130
            Image.fromarray(pixels.astype("uint8")).save(root / name / (f"{i}.png" if i % 2 else f"{i}.jpg"))
    return root


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, from subprocesses too, unless -m asks for tests that need one: the others start several
    processes, which would ask for a GPU each, and compare with numbers of a CPU."""
    if not asks_for_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def asks_for_gpu(marks: str) -> bool:
    """Whether an expression of -m asks for tests marked gpu."""
    words = marks.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and (not i or words[i - 1] != "not") for i, word in enumerate(words))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))

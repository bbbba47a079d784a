"""The tensors of a checkpoint on disk: found under either name, and every broken folder named with its remedy."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_llama
from transformers import AutoModel

from adapters.checkpoint_files import list_tensors, local_folder, open_tensor
from adapters.checkpoint_names import local_weights, model_tensors

NAME = "layers.1.self_attn.k_proj"


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_every_tensor_of_every_shard_is_listed_with_its_shape(folder):
    model = tiny_llama()

    tensors = list_tensors(folder)

    assert len({info.file for info in tensors.values()}) > 1
    assert {n: info.shape for n, info in tensors.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_a_slice_is_read_alone(folder):
    info = list_tensors(folder)["model." + NAME + ".weight"]

    panel = open_tensor(info)[:, :5]

    assert torch.equal(panel, tiny_llama().get_parameter(info.name)[:, :5])


@pytest.mark.parametrize("headless", [False, True])
def test_a_weight_is_found_with_and_without_the_base_models_prefix(tmp_path, headless):
    """A causal model's checkpoint works for the headless model, and the other way round."""
    tiny_llama().save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "headless")
    tensors = list_tensors(tmp_path / ("headless" if headless else "whole"))
    whole = tiny_llama()

    found = [model_tensors(model, tensors) for model in (whole.model, whole)]

    assert found[0][NAME + ".weight"] == found[1]["model." + NAME + ".weight"]
    assert found[0][NAME + ".weight"].name.endswith(NAME + ".weight")
    assert ("lm_head.weight" in found[1]) != headless


def test_weights_come_from_each_checkpoint_that_is_here(folder, tmp_path, caplog):
    (tmp_path / "empty").mkdir()

    weights = list(local_weights(["/gone", str(tmp_path / "empty"), "someone/else", str(folder)], "model." + NAME))

    assert len(weights) == 1
    assert torch.equal(weights[0], tiny_llama().get_parameter("model." + NAME + ".weight"))
    assert "holds no weights" in caplog.text


def test_packed_weights_are_no_full_precision_ones(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")

    assert list(local_weights([str(tmp_path)], "a")) == []


@pytest.mark.parametrize("name", ["/gone", "no such/folder at all", "someone/never-fetched"])
def test_what_is_not_on_this_machine_has_no_folder(name):
    assert local_folder(name) is None


def test_weights_that_are_stored_twice_are_refused(folder):
    """transformers would read the single file and other tools the index."""
    save_file({"a.weight": torch.zeros(2, 2)}, folder / "model.safetensors")

    with pytest.raises(ValueError, match=r"twice, in model.safetensors and in the \d files .*: remove one of the two"):
        list_tensors(folder)


def test_an_index_of_the_single_file_is_no_second_copy(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    names = dict.fromkeys(list_tensors(tmp_path), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    assert list_tensors(tmp_path).keys() == names.keys()


def test_an_empty_folder_says_what_it_expected(tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights: expected model.safetensors or model.safetensors.index"):
        list_tensors(tmp_path)


def test_a_pickle_only_folder_names_the_conversion(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model.bin\).*python -c .*save_pretrained"):
        list_tensors(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short .*fetch this file again"):
        list_tensors(tmp_path)


def test_a_missing_shard_is_named(folder):
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    gone = folder / sorted(set(shards.values()))[1]
    gone.unlink()

    with pytest.raises(ValueError, match=rf"{gone.name} is missing although the checkpoint's index names it"):
        list_tensors(folder)

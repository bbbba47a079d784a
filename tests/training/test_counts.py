"""What a training step costs, counted: a change that makes it more expensive fails here, whatever the load of the
machine.

Counted are positions computed, tokens whose logits are computed, bytes kept for the backward pass, points where the
host waits for the device, and copies. On a CPU nothing waits; the operations that would are the same.
"""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data.joined import join
from launcher.data.microbatches import positions
from launcher.tasks.base import Layout, on_device
from launcher.training import loop
from launcher.training import run as run_module

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"}
COPIES = {"clone", "_to_copy", "copy_"}
HIDDEN, VOCABULARY = 64, 512  # of the model


class Operations(TorchDispatchMode):
    """Operations of this thread: those that make a host wait, and the sizes of what is copied."""

    def __init__(self):
        super().__init__()
        self.waits, self.copied = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if name in WAITS or (name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])):
            self.waits[name] += 1
        if name in COPIES:
            self.copied[tensors[0].numel()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tolists(monkeypatch):
    """Calls of Tensor.tolist by this thread, which no operation shows."""
    found, own = [], torch.Tensor.tolist

    def tolist(tensor):
        if threading.current_thread() is threading.main_thread():
            found.append(tensor.numel())
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["padded"])
def training(request, stories, alpaca_file, cache, tmp_path, monkeypatch):
    """A run that is ready for its first step: 24 samples a step, at most 4 in a micro-batch."""
    found = []
    if request.param == "padded":
        monkeypatch.setattr(run_module, "check_joined", lambda *args: "this test is of padded rows")
    monkeypatch.setattr(run_module, "train", lambda training, resume: found.append(training) or "stopped")
    config = Config(
        model=ModelConfig(model=str(stories), dtype="float32"),
        data=DataConfig(data=str(alpaca_file), eval_records=8, prompt_template="short", max_length=200),
        adapter=AdapterConfig(rank=8, targets=("all-linear",)),
        optimizer=OptimizerConfig(batch_size=24, micro_batch_size=4, max_steps=3),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(cache), report=False),
    )
    run_module.run(config, "test")
    return found[0]


def step(training, number):
    total, stops, batch = loop.gradients(training, number)
    training.engine.update(1e-3, [total, stops])
    return batch


def test_a_step_computes_the_positions_of_its_plan_and_logits_of_tokens_with_loss_alone(training):
    computed = []
    model = training.engine.model.get_base_model()
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: computed.append(given[0].numel()))
    step(training, 1)  # whose first forward pass checks the head's loss
    computed.clear()
    before = training.forward.logits_rows

    batch = step(training, 2)

    lengths = [training.samples.train.lengths[row] for row in batch.rows]
    assert sorted(computed) == sorted(positions(part, lengths) for part in batch.dealt[0])
    assert sum(lengths) / sum(computed) >= 0.9  # in sample order 0.6
    assert training.forward.logits_rows - before == batch.targets


@pytest.mark.parametrize("training", ["joined"], indirect=True)
def test_joined_samples_are_computed_without_padding_and_their_beginning_once(training, tolists):
    computed = []
    model = training.engine.model.get_base_model()
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: computed.append(given[0].numel()))
    step(training, 1)
    training.batches.at(2)
    computed.clear()
    tolists.clear()
    before = training.forward.logits_rows

    with Operations() as operations:
        batch = step(training, 2)

    assert tolists == [3]  # norm, loss and stop requests, in one transfer
    data = training.samples.train
    once = [len(join(data, [batch.rows[place] for place in part])["input_ids"][0]) for part in batch.dealt[0]]
    assert sorted(computed) == sorted(once)
    assert sum(once) < sum(data.lengths[row] for row in batch.rows)
    assert training.forward.logits_rows - before == batch.targets
    assert not operations.waits


@pytest.mark.parametrize("training", ["padded", "joined"], indirect=True)
def test_evaluation_computes_no_more_than_training_would_and_gives_the_loss_of_padded_rows(training):
    computed = []
    model = training.engine.model.get_base_model()
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: computed.append(given[0].numel()))
    padded = replace(loop.evaluation_of(training), layout=Layout())
    model.eval()
    wanted = training.task.evaluate(padded)["eval_loss"]
    computed.clear()
    before = training.forward.logits_rows

    found = loop.evaluate(training)["eval_loss"]

    data, evaluation = training.samples.held_out, loop.evaluation_of(training)
    if evaluation.layout.flat:
        once = [len(join(data, part)["input_ids"][0]) for part in evaluation.micro_batches]
        assert sum(once) < sum(data.lengths)
    else:
        once = [positions(part, data.lengths) for part in evaluation.micro_batches]
        assert "attention_mask" not in evaluation.batch(training.task, [0, 1])
    assert sorted(computed) == sorted(once)
    assert training.forward.logits_rows - before == int(data.targets.sum())
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("training", ["joined"], indirect=True)
def test_evaluation_never_makes_the_host_wait_before_its_last_loss(training):
    evaluation = loop.evaluation_of(training)
    batch = evaluation.batch(training.task, [0, 1, 2])
    training.task.loss(training.forward, batch, 1)  # which checks the head's loss

    with Operations() as operations, torch.no_grad():
        training.task.loss(training.forward, dict(batch), 1)
        assert not evaluation.interrupted()

    assert not operations.waits


@pytest.mark.parametrize("training", ["padded", "joined"], indirect=True)
def test_the_backward_pass_keeps_so_many_bytes_a_token_and_no_logits(training):
    """Each storage once, without parameters and factors. 14.3 float32 rows of the hidden size a layer and token, 13.7
    if samples are joined."""
    step(training, 1)
    model, batch = training.engine.model, training.batches.at(2)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = max(batch.of_rank(0), key=lambda rows: sum(training.samples.train.lengths[row] for row in rows))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loop.batch_loss(training, rows, batch.targets)
    computed = len(rows) * max(training.samples.train.lengths[row] for row in rows)

    layers = model.config.num_hidden_layers
    rows_kept = sum(t.untyped_storage().nbytes() for t in kept.values()) / computed / layers / HIDDEN / 4
    assert rows_kept <= 14.5
    assert not [t.shape for t in kept.values() if t.ndim and t.shape[-1] == VOCABULARY]
    loss.backward()


def test_a_step_makes_the_host_wait_once(training, tolists):
    """In addition to transformers' own check in each forward pass, whether positions start again."""
    step(training, 1)
    model = training.engine.model
    plain = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "position_ids": torch.arange(5).expand(2, 5)}
    with Operations() as of_the_model:
        model(**plain, use_cache=False)
    batch = training.batches.at(2)
    tolists.clear()

    with Operations() as operations:
        step(training, 2)

    passes = len(batch.dealt[0])
    assert passes > 4
    assert operations.waits == Counter({name: count * passes for name, count in of_the_model.waits.items()})
    assert tolists == [3]  # norm, loss and stop requests, in one transfer


def test_a_micro_batch_is_copied_to_the_device_in_four_tensors(training):
    batch = loop.collated(training, training.batches.at(1).of_rank(0)[0])

    with Operations() as operations:
        on_device(batch, torch.device("meta"))

    assert batch.keys() == {"input_ids", "labels", "position_ids", "loss_at"}
    assert sum(operations.copied.values()) == 4


@pytest.mark.parametrize("training", ["joined"], indirect=True)
def test_joined_samples_are_copied_to_the_device_in_seven_tensors(training):
    batch = loop.collated(training, training.batches.at(1).of_rank(0)[0])

    with Operations() as operations:
        on_device(batch, torch.device("meta"))

    assert batch.keys() == {"input_ids", "labels", "position_ids", "loss_at", "attention_mask", "samples"}
    assert sum(operations.copied.values()) == 7  # two of them for `samples`


@pytest.mark.parametrize("training", ["padded", "joined"], indirect=True)
def test_the_adapter_copies_nothing_of_a_layers_size(training):
    """Copies of as many numbers as a micro-batch has hidden states, or more, with the adapter and without it."""
    step(training, 1)
    rows, model = training.batches.at(2).of_rank(0)[0], training.engine.model
    batch = on_device(loop.collated(training, rows), training.device)
    size = batch["input_ids"].numel() * HIDDEN
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    given = {name: part for name, part in batch.items() if name not in ("input_ids", "labels", "loss_at")}
    given |= {"inputs_embeds": embeddings, "use_cache": False}

    def large(run):
        with Operations() as operations:
            run(**given).logits.sum().backward()
        return {numel: count for numel, count in operations.copied.items() if numel >= size}

    with_adapter = large(model)
    with model.disable_adapter():
        without = large(model)

    assert with_adapter == without


def test_two_processes_compute_hardly_more_positions_than_one(training):
    def computed(world):
        batch = replace(training.batches, world_size=world, _last=[]).at(1)
        return batch.tokens / batch.token_share

    assert computed(2) <= 1.1 * computed(1)  # 24 samples are few to divide; in sample order 1.3

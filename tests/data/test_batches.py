"""The order of samples, batches, and packed rows that do not see each other."""

import math

import pytest
import torch
from byte_records import encode
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening
from transformers.modeling_utils import AttentionInterface

from launcher.data import batches

# --- order ---


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_every_epoch_visits_every_sample_once(count, batch_size):
    steps = math.lcm(count, batch_size) // batch_size

    visited = [i for step in range(steps) for i in batches.batch_indices(3, step, batch_size, count)]

    for epoch in range(len(visited) // count):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_follow_the_order_of_their_epoch():
    three = [batches.batch_indices(3, step, 6, 9) for step in range(3)]

    expected = batches.epoch_order(3, 0, 9).tolist() + batches.epoch_order(3, 1, 9).tolist()
    assert [i for batch in three for i in batch] == expected
    assert batches.batch_indices(3, 1, 6, 9) == three[1]  # asked for alone, as after a resume


def test_orders_differ_between_epochs_and_seeds_and_repeat_exactly():
    orders = {
        (seed, epoch): tuple(batches.epoch_order(seed, epoch, 50).tolist()) for seed in range(4) for epoch in range(4)
    }

    assert len(set(orders.values())) == 16
    assert tuple(batches.epoch_order(2, 1, 50).tolist()) == orders[2, 1]
    # A resumed run must find the order of the run before it, on any machine and version: so this one is recorded.
    assert batches.epoch_order(42, 0, 8).tolist() == [4, 2, 0, 6, 1, 5, 3, 7]


def test_a_batch_that_cannot_be_shared_shows_its_arithmetic():
    with pytest.raises(ValueError, match=r"--batch-size 10 / 4 processes = 2\.50 samples each.*--batch-size 8 or 12"):
        batches.check_batch(10, 4)
    with pytest.raises(ValueError, match=r"--batch-size 2 / 4 processes = 0\.50 .*--batch-size 4, or"):
        batches.check_batch(2, 4)


# --- packing ---


def some_samples(babyllama, count=12, max_length=160):
    """Samples of different lengths in the real model's vocabulary."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "once " * (1 + i % 5)} for i in range(count)]
    return encode(rows, AutoTokenizer.from_pretrained(babyllama), max_length=max_length)


def model_of(babyllama, attention="sdpa"):
    return AutoModelForCausalLM.from_pretrained(babyllama, dtype=torch.float32, attn_implementation=attention).eval()


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


def by_sample(values, encoded, rows, flat):
    """{sample: its slice of values (B, N, ...)} for packed rows, or rows flattened into one."""
    result, end = {}, 0
    for b, row in enumerate(rows):
        end = end if flat else 0
        for sample in row:
            begin, end = end, end + encoded.lengths[sample]
            result[sample] = values[0 if flat else b, begin:end]
    return result


def test_packed_rows_hold_every_sample_once_and_fit():
    lengths = torch.randint(1, 65, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    rows = batches.pack(lengths, batches.epoch_order(7, 0, 1000), 64)

    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.9  # what packing is for
    assert rows == batches.pack(lengths, batches.epoch_order(7, 0, 1000).tolist(), 64)


@pytest.mark.parametrize("packing", [False, True])
def test_target_tokens_are_those_the_models_shifted_loss_counts(babyllama, packing):
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160) if packing else list(range(len(encoded)))

    batch = batches.collate(encoded, rows, pad_id=0, packing=packing)

    assert (batch["labels"][:, 1:] != -100).sum() == batches.target_tokens(encoded, rows) == encoded.targets.sum()


def test_padding_is_on_the_right_and_carries_nothing(babyllama):
    encoded = some_samples(babyllama, count=3)

    batch = batches.collate(encoded, [0, 2], pad_id=2, multiple_of=8)

    first, last = encoded.lengths[0], encoded.lengths[2]
    assert batch["input_ids"].shape == (2, -(-last // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == [first, last]
    assert batch["input_ids"][0, first:].eq(2).all()
    assert batch["labels"][0, first:].eq(-100).all()
    assert batch["position_ids"][1, :last].tolist() == list(range(last))


def test_no_packed_sample_sees_another(babyllama):
    """Other samples' tokens change nothing, bit for bit: a hidden key's weight is exactly 0."""
    encoded, model = some_samples(babyllama), model_of(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    batch = batches.collate(encoded, rows, pad_id=0, packing=True)
    before = by_sample(logits_of(model, batch), encoded, rows, flat=False)
    disturbed = rows[0][0]
    by_sample(batch["input_ids"], encoded, rows, flat=False)[disturbed][1:] = 300

    after = by_sample(logits_of(model, batch), encoded, rows, flat=False)

    assert len(rows[0]) > 2
    assert not torch.equal(before[disturbed], after[disturbed])
    assert all(torch.equal(before[i], after[i]) for i in before if i != disturbed)


def varlen_reference(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """What a flash kernel does with its borders, in plain torch: causal attention inside each (heads, length, size)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    assert attention_mask is None
    spans = zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False)
    parts = [
        scaled_dot_product_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling)
        for a, b in spans
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("varlen_reference", varlen_reference)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_packed_and_unpacked_samples_have_the_same_logits_and_loss(babyllama, attention):
    """float32 sums over rows of other lengths run in another order: logits of size 10 agree to 1e-4, losses to 1e-5."""
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    plain = batches.collate(encoded, list(range(len(encoded))), pad_id=0)
    packed = batches.collate(encoded, rows, pad_id=0, packing=True, attention=attention)
    flat = attention == "flash"

    unpacked_logits = logits_of(model_of(babyllama), plain)
    packed_logits = logits_of(model_of(babyllama, "varlen_reference" if flat else "sdpa"), packed)

    expected = by_sample(unpacked_logits, encoded, [[i] for i in range(len(encoded))], flat=False)
    for sample, logits in by_sample(packed_logits, encoded, rows, flat).items():
        torch.testing.assert_close(logits, expected[sample], rtol=0, atol=1e-4)
    losses = [
        cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for logits, batch in ((unpacked_logits, plain), (packed_logits, packed))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_flash_layout_is_the_one_transformers_collates(babyllama):
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    order = [i for row in rows for i in row]
    one_by_one = batches.collate(encoded, list(range(len(encoded))), pad_id=0)
    features = [{k: one_by_one[k][i, : encoded.lengths[i]] for k in ("input_ids", "labels")} for i in order]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features, return_tensors="pt")

    batch = batches.collate(encoded, rows, pad_id=0, packing=True, attention="flash", multiple_of=8)

    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[name]).squeeze(), torch.as_tensor(value).squeeze()), name
        assert torch.as_tensor(batch[name]).dtype == torch.as_tensor(value).dtype, name


@pytest.mark.gpu
def test_flash_attention_keeps_packed_samples_apart(babyllama):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    batch = batches.collate(encoded, rows, pad_id=0, packing=True, attention="flash")
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    model = model_of(babyllama, "flash_attention_2").to("cuda", torch.bfloat16)
    before = by_sample(logits_of(model, batch), encoded, rows, flat=True)
    disturbed = rows[0][0]
    by_sample(batch["input_ids"], encoded, rows, flat=True)[disturbed][1:] = 300

    after = by_sample(logits_of(model, batch), encoded, rows, flat=True)

    assert not torch.equal(before[disturbed], after[disturbed])
    assert all(torch.equal(before[i], after[i]) for i in before if i != disturbed)

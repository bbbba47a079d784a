"""AdaLoRA's schedule against PEFT's own training loop, its state, and settings that follow from the number of steps."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama

from adapters.adalora import AdaLoRAConfig
from adapters.schedule import for_steps, schedule_of

STEPS = 12
SHAPE = {"target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 4, "deltaT": 2, "orth_reg_weight": 0.3}
COMMON = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def batch(step):
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def adapted(config):
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), config).train()


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, schedule, steps):
    """As the launcher's loop does: the loss of the task, the penalty's gradient, an update, the allocation."""
    for step in steps:
        ids = batch(step)["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        schedule.before_update()
        optimizer.step()
        schedule.after_update(step)
        optimizer.zero_grad()


def numbers(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_it_trains_as_pefts_own_loop_does():
    own = adapted(AdaLoraConfig(total_step=STEPS, **SHAPE, **COMMON))
    optimizer = adam(own)
    for step in range(1, STEPS + 1):
        own(**batch(step)).loss.backward()
        optimizer.step()
        own.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    ours = adapted(for_steps(AdaLoRAConfig(**SHAPE, **COMMON), STEPS))

    train(ours, adam(ours), schedule_of(ours), range(1, STEPS + 1))

    torch.testing.assert_close(numbers(ours), numbers(own), rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert ours.active_peft_config.rank_pattern == own.active_peft_config.rank_pattern
    assert sum(map(sum, ours.active_peft_config.rank_pattern.values())) == 2 * 4


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_a_restored_schedule_continues_bit_for_bit(stop):
    """After the first step, amid the allocation, at its end and after it."""
    config = for_steps(AdaLoRAConfig(**SHAPE, **COMMON), STEPS)
    whole = adapted(config)
    optimizer, schedule = adam(whole), schedule_of(whole)
    train(whole, optimizer, schedule, range(1, stop + 1))
    again = adapted(for_steps(AdaLoRAConfig(**SHAPE, **COMMON), STEPS))
    again.load_state_dict(whole.state_dict())
    other, restored = adam(again), schedule_of(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    restored.restore(stop, {name: tensor.clone() for name, tensor in schedule.state().items()})

    train(whole, optimizer, schedule, range(stop + 1, STEPS + 1))
    train(again, other, restored, range(stop + 1, STEPS + 1))

    one, two = numbers(whole), numbers(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.active_peft_config.rank_pattern == whole.active_peft_config.rank_pattern


def test_a_checkpoint_without_the_importance_is_refused():
    model = adapted(for_steps(AdaLoRAConfig(**SHAPE, **COMMON), STEPS))

    with pytest.raises(ValueError, match=r"no sensitivity of model\.layers\.0"):
        schedule_of(model).restore(3, {})


def test_stock_peft_loads_the_result_without_the_masked_directions(tmp_path):
    model = adapted(for_steps(AdaLoRAConfig(**SHAPE, **COMMON), STEPS))
    train(model, adam(model), schedule_of(model), range(1, STEPS + 1))
    model.eval().save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    assert type(loaded.active_peft_config) is AdaLoraConfig  # PEFT's own class
    assert sum(p.shape[0] for name, p in loaded.named_parameters() if "lora_E" in name) == 2 * 4
    ids = batch(0)["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_schedule_follows_from_the_number_of_steps():
    config = for_steps(AdaLoRAConfig(r=6, **COMMON), 5000)

    found = {name: getattr(config, name) for name in ("target_r", "init_r", "total_step", "tinit", "tfinal", "deltaT")}
    assert found == {"target_r": 6, "init_r": 9, "total_step": 5000, "tinit": 500, "tfinal": 2500, "deltaT": 5}


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (10, {"tinit": 6, "tfinal": 4}), (10, {"deltaT": 0})])
def test_a_schedule_without_steps_to_allocate_is_refused(steps, options):
    with pytest.raises(ValueError, match="AdaLoRA"):
        for_steps(AdaLoRAConfig(**options, **COMMON), steps)

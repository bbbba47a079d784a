"""Updates of bfloat16 weights that are lost in rounding."""

import torch

from launcher.training.rounding import lost_share, lost_updates


def after_steps(weight, learning_rate):
    """The weight after 20 steps of AdamW along one gradient."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_the_share_of_lost_updates_is_that_of_weights_which_adamw_does_not_move():
    weight = torch.linspace(0.0005, 0.05, 200).bfloat16()

    stayed = float((after_steps(weight, 1e-5) == weight).float().mean())

    assert 0.8 < stayed < 1
    assert abs(lost_share([weight], 1e-5) - stayed) < 0.02
    assert lost_share([weight.float()], 1e-5) == 0
    assert (after_steps(weight.float(), 1e-5) != weight.float()).all()


def test_a_warning_names_the_learning_rate_and_what_helps():
    weight = torch.full((8,), 0.02).bfloat16()

    assert "at --learning-rate 1e-05, 100% of the trained" in lost_updates([weight], 1e-5)
    assert lost_updates([weight], 1e-3) is None

"""Rules against torch.optim in float64."""

import pytest
import torch
from torch import nn

from megatron_aquila.optim.clip import Clip
from megatron_aquila.optim.rules import AdamW, Rule, Sgd
from tests.optim.toys import draw

CLIP = Clip.at(torch.tensor(1.0, dtype=torch.float64), 0.0)


def run(rule: Rule, theirs: type[torch.optim.Optimizer], decays: bool, **settings: object) -> None:
    weight = draw([50], 1)
    param = nn.Parameter(weight.clone())
    optimizer = theirs([param], **settings)
    state = {name: torch.zeros(50, dtype=torch.float64) for name in rule.state}
    for step in range(1, 6):
        lr = 0.1 / step
        grad = draw([50], 2, step)
        param.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        rule.update_(weight, grad, state, lr=lr, decays=decays, step=torch.tensor(step), clip=CLIP)
    torch.testing.assert_close(weight, param.detach(), rtol=1e-14, atol=1e-15)


def test_adamw() -> None:
    rule = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    run(rule, torch.optim.AdamW, True, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    run(rule, torch.optim.AdamW, False, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def test_sgd() -> None:
    run(Sgd(weight_decay=0.1), torch.optim.SGD, True, weight_decay=0.1)
    run(Sgd(weight_decay=0.1), torch.optim.SGD, False, weight_decay=0.0)


def test_adamw_calls_the_kernel_it_was_given() -> None:
    calls = []
    rule = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, kernel=lambda *args, **kwargs: calls.append(kwargs))
    state = {name: torch.zeros(1) for name in rule.state}
    rule.update_(torch.zeros(1), torch.zeros(1), state, lr=0.5, decays=True, step=torch.tensor(3), clip=CLIP)
    settings = {"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    nothing = {"publish": None, "remainder": None}
    assert calls == [{**settings, "step": 3, "factor": CLIP.factor, "applies": CLIP.applies, **nothing}]


@pytest.mark.parametrize("rule", [Sgd(weight_decay=0.1), AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)])
def test_gradients_are_clipped_and_the_weight_published(rule: Rule) -> None:
    clip = Clip.at(torch.tensor(8.0, dtype=torch.float64), 1.0, loss_scale=2.0)
    outcomes = []
    for how, factor in ((clip, 1.0), (CLIP, float(clip.factor))):
        weight, state = draw([50], 1), {name: torch.zeros(50, dtype=torch.float64) for name in rule.state}
        published = torch.zeros(50, dtype=torch.bfloat16)
        grad, step = draw([50], 2) * factor, torch.tensor(1)
        rule.update_(weight, grad, state, lr=0.1, decays=True, step=step, clip=how, publish=published)
        assert torch.equal(published, weight.bfloat16())
        outcomes.append(weight)
    assert torch.equal(*outcomes)
    assert not torch.equal(outcomes[0], draw([50], 1))


@pytest.mark.parametrize("decays", [True, False])
def test_what_is_not_finite_is_not_applied(decays: bool) -> None:
    weight, grad = draw([50], 1), torch.full((50,), torch.nan, dtype=torch.float64)
    clip = Clip.at(torch.tensor(torch.nan, dtype=torch.float64), 1.0)
    Sgd(weight_decay=0.1).update_(weight, grad, {}, lr=0.1, decays=decays, step=torch.tensor(0), clip=clip)
    assert torch.equal(weight, draw([50], 1))

"""Rules against torch.optim in float64."""

import torch
from torch import nn

from megatron_aquila.optim.rules import AdamW, Rule, Sgd
from tests.optim.toys import draw


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
        rule.update_(weight, grad, state, lr=lr, decays=decays, step=step)
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
    rule.update_(torch.zeros(1), torch.zeros(1), state, lr=0.5, decays=True, step=3)
    assert calls == [{"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}]

"""What every training of the examples does: AdamW on a one-cycle schedule, and a step of both."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer
Schedule = torch.optim.lr_scheduler.LRScheduler


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int) -> tuple[Optimizer, Schedule]:
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)


def take_step(loss: Tensor, optimizer: Optimizer, schedule: Schedule) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

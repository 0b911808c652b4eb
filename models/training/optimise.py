"""Muon for the hidden matrices, AdamW for the rest, an averaged copy, and the schedule.

Muon here runs its Newton-Schulz steps in float32 on stacks of equal matrices: PyTorch's own
runs them in bfloat16, which is very slow on processors without bfloat16 instructions.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from training.network import Network

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of [count, rows, columns] near one (Newton-Schulz)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, scaled to AdamW's usual update size."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters, momentum = group["params"], group["momentum"]
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].lerp_(parameter.grad, 1 - momentum)
                updates.append(parameter.grad.lerp(state["velocity"], momentum))
            scale = 0.2 * max(parameters[0].shape) ** 0.5
            for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


class Optimiser:
    """Both optimisers behind one step, with one relative learning rate."""

    def __init__(self, network: Network, lr: float, weight_decay: float = 0.1) -> None:
        self.parameters = list(network.parameters())
        matrices = [p for p in network.blk.parameters() if p.ndim == 2]
        norms = [p for p in self.parameters if p.ndim == 1]
        self.lr = lr
        self.muon = Muon(matrices, lr, weight_decay)
        self.adam = torch.optim.AdamW(
            [
                {"params": [network.token_embd.weight], "weight_decay": weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.97),
        )

    def step(self, relative: float) -> float:
        """Update at a share of the full learning rate; returns the gradient's norm."""
        for optimiser in (self.muon, self.adam):
            for group in optimiser.param_groups:
                group["lr"] = self.lr * relative
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        return float(norm)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


class Average:
    """An exponential moving average of the weights, reaching back a share of the run."""

    def __init__(self, network: Network, span: float = 0.04) -> None:
        self.span = span
        self.weights = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def update(self, network: Network, step: int) -> None:
        """Weigh the new weights by one over a span that grows with the step."""
        share = 1.0 / (1.0 + self.span * step)
        with torch.no_grad():
            for name, value in network.state_dict().items():
                self.weights[name].lerp_(value, share)


def relative_rate(fraction: float, step: int, warm_up: int = 60, floor: float = 0.02) -> float:
    """Warm up over some steps, then a cosine over the fraction of the run that is done."""
    warm = min(1.0, (step + 1) / warm_up)
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))

"""Direct preference optimisation of a low-rank adapter, and its GGUF file."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.batches import Document, collate
from training.network import Network

Pair = tuple[Document, Document]  # the better answer and the worse one to the same prompt


class LowRank(nn.Module):
    """``W x + alpha / rank B A x``; W stays as it is, B is 0 at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def add_adapter(network: Network, rank: int, alpha: float) -> dict[str, LowRank]:
    """Give every matrix of the blocks an adapter, by the tensor's name in a GGUF file; all else is frozen."""
    network.requires_grad_(False)
    found: dict[str, LowRank] = {}
    for i, block in enumerate(network.blk):
        for name, module in list(block.named_children()):
            if isinstance(module, nn.Linear):
                found[f"blk.{i}.{name}.weight"] = LowRank(module, rank, alpha)
                setattr(block, name, found[f"blk.{i}.{name}.weight"])
    return found


def write_adapter(path: Path, adapters: dict[str, LowRank], alpha: float, name: str) -> None:
    """Whole or not at all, as convert_lora_to_gguf.py has it."""
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor, adapter in adapters.items():
        writer.add_tensor(f"{tensor}.lora_a", adapter.a.detach().float().numpy())
        writer.add_tensor(f"{tensor}.lora_b", adapter.b.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def log_probability(network: Network, documents: Sequence[Document]) -> Tensor:
    """Of each answer [batch], in nats."""
    inputs, targets, _ = collate(documents)
    logits = network(inputs).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(targets.shape).sum(dim=1)


@dataclass(frozen=True)
class Plan:
    """``beta``: how firmly the adapter is held to the base model (DPO's own)."""

    minutes: float = 10.0
    max_steps: int = 100_000
    batch: int = 32
    beta: float = 0.1
    rate: float = 3e-4
    seed: int = 0


def margins(network: Network, reference: Tensor, pairs: Sequence[Pair], beta: float) -> Tensor:
    """``beta`` times what the adapter adds to the better answer's log-probability above the worse one's [pairs].

    ``reference`` [pairs]: the difference under the base model. Source: DPO (arXiv 2305.18290), Eq. 7.
    """
    better, worse = (log_probability(network, side) for side in zip(*pairs, strict=True))
    return beta * (better - worse - reference)


def reference(network: Network, pairs: Sequence[Pair], batch: int) -> Tensor:
    """Differences of log-probabilities [pairs] under the network as it is now."""
    found = []
    with torch.no_grad():
        for start in range(0, len(pairs), batch):
            better, worse = (log_probability(network, side) for side in zip(*pairs[start : start + batch], strict=True))
            found.append(better - worse)
    return torch.cat(found)


def held_out(network: Network, before: Tensor, pairs: Sequence[Pair], plan: Plan) -> tuple[float, float]:
    """Mean loss, and the share of pairs whose better answer the adapter favours."""
    with torch.no_grad():
        m = torch.cat(
            [
                margins(network, before[start : start + plan.batch], pairs[start : start + plan.batch], plan.beta)
                for start in range(0, len(pairs), plan.batch)
            ]
        )
    return float(-F.logsigmoid(m).mean()), float((m > 0).float().mean())


def train(
    network: Network, adapters: dict[str, LowRank], pairs: Sequence[Pair], valid: Sequence[Pair], plan: Plan
) -> None:
    """Follow the loss of DPO for so long; report as it goes. The best adapter on ``valid`` stays."""
    torch.manual_seed(plan.seed)
    rng, started = random.Random(plan.seed), time.monotonic()
    before, before_valid = reference(network, pairs, plan.batch), reference(network, valid, plan.batch)
    parameters = [parameter for adapter in adapters.values() for parameter in (adapter.a, adapter.b)]
    optimiser = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0)
    best, kept = math.log(2.0), [parameter.detach().clone() for parameter in parameters]  # of no adapter at all
    step, order = 0, list[int]()
    while step < plan.max_steps and time.monotonic() - started < 60 * plan.minutes:
        if len(order) < plan.batch:
            order += rng.sample(range(len(pairs)), len(pairs))
        chosen, order = order[: plan.batch], order[plan.batch :]
        loss = -F.logsigmoid(margins(network, before[chosen], [pairs[i] for i in chosen], plan.beta)).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        done = max((time.monotonic() - started) / (60 * plan.minutes), step / plan.max_steps)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * min(1.0, (step + 1) / 20) * (1 - 0.9 * min(1.0, done))
        optimiser.step()
        step += 1
        if step % 10 == 0 or step == plan.max_steps:
            found, accuracy = held_out(network, before_valid, valid, plan)
            print(
                f"step {step}: loss {loss.item():.3f}, held out {found:.3f}, favoured {100 * accuracy:.0f}%", flush=True
            )
            if found < best:
                best, kept = found, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)

"""The training loop: Bradley-Terry loss, AdamW, a schedule by steps and time, checkpoints."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from reward_models.training.encoder import RewardNetwork, Tokens, collate, encode
from reward_models.training.pairs import Pair

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    minutes: float = 45.0
    batch: int = 16  # pairs
    limit: int = 256  # tokens, as at inference
    rate: float = 2e-4  # of the encoder
    head_rate: float = 2e-3
    frozen_layers: int = 2  # the lowest layers; the embeddings are always frozen
    weight_decay: float = 0.01
    centring: float = 0.01  # weight of the mean squared score
    warm_up: int = 20  # steps
    seed: int = 0
    save_minutes: float = 3.0
    report_steps: int = 10


@dataclass(frozen=True)
class Encoded:
    """A pair as tokens."""

    chosen: Tokens
    rejected: Tokens

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], limit: int) -> list[Encoded]:
    """Tokens of both sides of every pair."""
    prompts = [pair.prompt for pair in pairs]
    chosen = encode(tokenizer, prompts, [pair.chosen for pair in pairs], limit)
    rejected = encode(tokenizer, prompts, [pair.rejected for pair in pairs], limit)
    return [Encoded(*both) for both in zip(chosen, rejected, strict=True)]


def make_batches(pairs: Sequence[Encoded], size: int, seed: int) -> list[list[Encoded]]:
    """Batches of pairs of similar length, in random order."""
    rng = random.Random(seed)
    order = rng.sample(pairs, len(pairs))
    pool = 12 * size
    batches: list[list[Encoded]] = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda pair: pair.length)
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(batches)
    return batches


def scores(network: RewardNetwork, batch: Sequence[Encoded], device: str) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected side, each [len(batch)]."""
    sequences = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
    ids, mask, types = (part.to(device) for part in collate(sequences))
    out = network(ids, mask, types).float()
    return out[: len(batch)], out[len(batch) :]


@dataclass(frozen=True)
class Gradients:
    """Of a part of a batch: one gradient a parameter, the summed loss, and how many pairs came out right."""

    values: list[Tensor]
    loss: float
    right: int


class Workers:
    """Gradients of parts of a batch, one thread of one core each.

    One core a thread waits far less than one operation spread over cores. Without matrix instructions for
    it, bfloat16 is slower than float32 on a processor.
    """

    def __init__(self, network: RewardNetwork, parameters: list[Tensor], plan: Plan, device: str) -> None:
        self.network, self.parameters, self.plan, self.device = network, parameters, plan, device
        self.count = 1 if device != "cpu" else min(4, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        self.bfloat16 = device != "cpu" or torch.cpu._is_amx_tile_supported()

    def part(self, batch: Sequence[Encoded], size: int) -> Gradients:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            chosen, rejected = scores(self.network, batch, self.device)
        loss = F.softplus(rejected - chosen).sum()
        total = loss + self.plan.centring * 0.5 * (chosen**2 + rejected**2).sum()
        values = torch.autograd.grad(total / size, self.parameters)
        return Gradients(list(values), float(loss.detach()), int((chosen > rejected).sum()))

    def gradients(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        """Set every parameter's gradient; returns the mean loss and how many pairs came out right."""
        parts = [batch[i :: self.count] for i in range(min(self.count, len(batch)))]
        results = list(self.pool.map(self.part, parts, [len(batch)] * len(parts)))
        for parameter, *values in zip(self.parameters, *(r.values for r in results), strict=True):
            parameter.grad = sum(values[1:], values[0])
        return sum(r.loss for r in results) / len(batch), sum(r.right for r in results)


@torch.no_grad()
def accuracy_by_kind(network: RewardNetwork, pairs: Sequence[Pair], encoded: Sequence[Encoded], device: str) -> str:
    """Share of pairs ranked right, for each kind that has at least ten, on one line."""
    found: dict[str, list[bool]] = {}
    network.eval()
    order = sorted(range(len(pairs)), key=lambda i: encoded[i].length)
    for start in range(0, len(order), 16):
        part = order[start : start + 16]
        chosen, rejected = scores(network, [encoded[i] for i in part], device)
        for i, right in zip(part, (chosen > rejected).tolist(), strict=True):
            for kind in ("all", pairs[i].kind):
                found.setdefault(kind, []).append(right)
    network.train()
    return ", ".join(f"{kind} {sum(r) / len(r):.2f}" for kind, r in sorted(found.items()) if len(r) >= 10)


def relative_rate(fraction: float, step: int, warm_up: int) -> float:
    """Linear warm-up over steps, then linear decay over the share of the run that is done."""
    return min(1.0, (step + 1) / warm_up) * max(0.02, 1.0 - fraction)


def parameter_groups(network: RewardNetwork, plan: Plan) -> list[dict[str, object]]:
    """Head and encoder with their own rates; frozen parts are marked so and left out."""
    frozen = [network.words, network.positions, network.types, network.norm]
    if not plan.frozen_layers:
        frozen = [network.words, network.positions]  # the type embeddings were never trained
    for module in [*frozen, *list(network.layers)[: plan.frozen_layers]]:
        module.requires_grad_(False)
    head = [*network.dense.parameters(), *network.score.parameters()]
    in_head = {id(parameter) for parameter in head}
    encoder = [p for p in network.parameters() if p.requires_grad and id(p) not in in_head]
    return [
        {"params": [p for p in encoder if p.ndim > 1], "rate": plan.rate},
        {"params": [p for p in encoder if p.ndim == 1], "rate": plan.rate, "weight_decay": 0.0},
        {"params": head, "rate": plan.head_rate},
    ]


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(
    network: RewardNetwork,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    plan: Plan,
    work: Path,
    *,
    held_out: Sequence[Pair] = (),
    device: str = "cpu",
    resume: bool = False,
) -> float:
    """Train in place on one pass over the pairs, or as much of it as the time allows.

    The schedule follows the larger of the share of steps and the share of time. Returns the minutes
    that training took, those before a resumption included. The held-out pairs are ranked at every
    checkpoint, for the reader alone.
    """
    batches = make_batches(encode_pairs(tokenizer, pairs, plan.limit), plan.batch, plan.seed)
    network.to(device).train()
    groups = parameter_groups(network, plan)
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, weight_decay=plan.weight_decay)
    held_out_tokens = encode_pairs(tokenizer, held_out, plan.limit)
    step, before = 0, 0.0
    checkpoint = work / CHECKPOINT
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        step, before = state["step"], state["seconds"]
        print(f"resumed at step {step}, minute {before / 60:.1f}", flush=True)
    torch.manual_seed(plan.seed + step)  # the dropout of the head
    started = saved = time.monotonic()
    seconds = before

    def write() -> None:
        save(
            checkpoint,
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": seconds,
            },
        )
        if held_out:
            print(f"held out: {accuracy_by_kind(network, held_out, held_out_tokens, device)}", flush=True)

    trained = [p for group in optimiser.param_groups for p in group["params"]]
    workers = Workers(network, trained, plan, device)
    losses: list[float] = []
    right = seen = tokens = 0
    while step < len(batches):
        seconds = before + time.monotonic() - started
        fraction = max(step / len(batches), seconds / 60 / plan.minutes)
        if fraction >= 1:
            break
        batch = batches[step]
        loss, ranked = workers.gradients(batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        relative = relative_rate(fraction, step, plan.warm_up)
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * relative
        optimiser.step()
        step += 1
        losses.append(loss)
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: the loss is not finite at step {step}; lower the rate.")
        right += ranked
        seen += len(batch)
        tokens += 2 * len(batch) * max(pair.length for pair in batch)
        if step % plan.report_steps == 0:
            elapsed = time.monotonic() - started
            print(
                f"step {step}/{len(batches)} loss {sum(losses) / len(losses):.4f} "
                f"accuracy {right / seen:.3f} tokens {tokens / elapsed:.0f}/s "
                f"minute {seconds / 60:.1f}",
                flush=True,
            )
            losses, right, seen = [], 0, 0
        if time.monotonic() - saved > plan.save_minutes * 60:
            write()
            saved = time.monotonic()
    seconds = before + time.monotonic() - started
    write()
    network.eval()
    return seconds / 60

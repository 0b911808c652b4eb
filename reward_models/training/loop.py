"""The training loop: Bradley-Terry loss, AdamW, a schedule by steps and time, checkpoints."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
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
    limit: int = 128  # tokens; shorter than at inference, for speed
    rate: float = 2e-4  # of the encoder
    head_rate: float = 2e-3
    frozen_layers: int = 3  # the lowest layers; the embeddings are always frozen
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
    device: str = "cpu",
    resume: bool = False,
) -> float:
    """Train in place on one pass over the pairs, or as much of it as the time allows.

    The schedule follows the larger of the share of steps and the share of time. Returns the minutes
    that training took, those before a resumption included.
    """
    batches = make_batches(encode_pairs(tokenizer, pairs, plan.limit), plan.batch, plan.seed)
    network.to(device).train()
    groups = parameter_groups(network, plan)
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, weight_decay=plan.weight_decay)
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

    trained = [p for group in optimiser.param_groups for p in group["params"]]
    losses: list[float] = []
    right = seen = tokens = 0
    while step < len(batches):
        seconds = before + time.monotonic() - started
        fraction = max(step / len(batches), seconds / 60 / plan.minutes)
        if fraction >= 1:
            break
        batch = batches[step]
        chosen, rejected = scores(network, batch, device)
        loss = F.softplus(rejected - chosen).mean()
        total = loss + plan.centring * 0.5 * (chosen**2 + rejected**2).mean()
        optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        relative = relative_rate(fraction, step, plan.warm_up)
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * relative
        optimiser.step()
        step += 1
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: the loss is not finite at step {step}; lower the rate.")
        right += int((chosen > rejected).sum())
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

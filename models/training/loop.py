"""The training loop, its checkpoints, and the loss."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from training.batches import Document, Item, Maker, collate, epochs
from training.network import Network, Shape
from training.optimise import Average, Optimiser, relative_rate

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Plan:
    """How long, how fast and on how much at once to train.

    The first occurrence of a requested word weighs `emphasis` in the loss: such words are few and
    rare, and at a weight of one a short training learns to ignore requests.
    """

    minutes: float = 55.0
    max_steps: int = 100_000
    batch_tokens: int = 8192
    limit: int = 416
    rate: float = 3e-3
    emphasis: float = 5.0
    seed: int = 0
    save_minutes: float = 3.0
    report_steps: int = 20


def answer_loss(network: Network, inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Weighted sum of the cross-entropy in nats of the counted targets, and how many they are."""
    counted = targets != -100
    losses = F.cross_entropy(network.head(network.hidden(inputs)[counted]).float(), targets[counted], reduction="none")
    return losses @ weights[counted], len(losses)


def validation_loss(
    network: Network, sequences: Sequence[Document], device: str = "cpu", batch: int = 16
) -> tuple[float, int]:
    """Mean nats a token over the answers of all sequences, and the number of tokens."""
    network.eval()
    total, count = 0.0, 0
    ordered = sorted(sequences, key=lambda s: len(s.tokens))
    with torch.no_grad():
        for start in range(0, len(ordered), batch):
            parts = (part.to(device) for part in collate(ordered[start : start + batch]))
            loss, tokens = answer_loss(network, *parts)
            total += float(loss)
            count += tokens
    network.train()
    return total / count, count


class Workers:
    """Gradients of parts of a batch, one thread of one core each.

    One core a thread waits far less than one operation spread over cores, all the more
    where other programs share the machine.
    """

    def __init__(self, network: Network, device: str, emphasis: float) -> None:
        self.network, self.device, self.emphasis = network, device, emphasis
        # Without matrix instructions for it, bfloat16 is slower than float32 on a processor.
        self.bfloat16 = device != "cpu" or torch.cpu._is_amx_tile_supported()
        self.count = 1 if device != "cpu" else min(4, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        self.parameters = list(network.parameters())

    def part(self, sequences: list[Document], counted: int) -> tuple[list[Tensor], float]:
        tensors = (part.to(self.device) for part in collate(sequences, self.emphasis))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss, _ = answer_loss(self.network, *tensors)
        loss = loss / counted
        return list(torch.autograd.grad(loss, self.parameters)), float(loss.detach())

    def gradients(self, batch: list[Document]) -> float:
        """Set every parameter's gradient for the batch; returns the mean loss a token."""
        counted = sum(len(sequence.tokens) - sequence.prompt for sequence in batch)
        parts = [batch[i :: self.count] for i in range(min(self.count, len(batch)))]
        results = list(self.pool.map(self.part, parts, [counted] * len(parts)))
        for parameter, *grads in zip(self.parameters, *(r[0] for r in results), strict=True):
            parameter.grad = sum(grads[1:], grads[0])
        return sum(r[1] for r in results)


def save(path: Path, state: dict) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(
    shape: Shape,
    tokenizer: Tokenizer,
    corpus: Sequence[Item],
    maker: Maker[Item],
    validation: Sequence[Document],
    plan: Plan,
    work: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
) -> Network:
    """Train until the minutes or the steps are used up; returns the averaged network."""
    torch.manual_seed(plan.seed)
    network = Network(shape).to(device)
    optimiser = Optimiser(network, plan.rate)
    average = Average(network)
    step, tokens, before = 0, 0, 0.0
    path = work / CHECKPOINT
    if resume and path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.weights = state["average"]
        optimiser.load_state_dict(state["optimiser"])
        step, tokens, before = state["step"], state["tokens"], state["seconds"]
        print(f"resumed at step {step}", flush=True)
    averaged = Network(shape).to(device)
    workers = Workers(network, device, plan.emphasis)
    batches = epochs(
        corpus,
        maker,
        tokenizer,
        batch_tokens=plan.batch_tokens,
        limit=plan.limit,
        seed=plan.seed,
        start=step,
    )
    started = saved = time.monotonic()
    losses: list[float] = []
    print(f"{network.parameter_count()} parameters, {workers.count} worker(s)", flush=True)

    def checkpoint(seconds: float) -> None:
        averaged.load_state_dict(average.weights)
        state = {
            "shape": shape.as_dict(),
            "tokenizer": tokenizer.to_str(),
            "network": network.state_dict(),
            "average": average.weights,
            "optimiser": optimiser.state_dict(),
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
        }
        loss, _ = validation_loss(averaged, validation, device)
        state["validation_loss"] = loss
        save(path, state)
        print(f"step {step}: saved, validation {loss:.4f} nats a token", flush=True)

    while True:
        seconds = before + time.monotonic() - started
        fraction = max(step / plan.max_steps, seconds / 60 / plan.minutes)
        if fraction >= 1:
            break
        batch = next(batches)
        losses.append(workers.gradients(batch))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: the loss is not finite at step {step}; lower the rate.")
        norm = optimiser.step(relative_rate(fraction, step))
        step += 1
        tokens += sum(len(sequence.tokens) for sequence in batch)
        average.update(network, step)
        if step % plan.report_steps == 0:
            print(
                f"step {step} loss {sum(losses) / len(losses):.4f} norm {norm:.2f} "
                f"tokens {tokens} at {tokens / max(seconds, 1e-9):.0f}/s minute {seconds / 60:.1f}",
                flush=True,
            )
            losses.clear()
        if time.monotonic() - saved > plan.save_minutes * 60:
            checkpoint(seconds)
            saved = time.monotonic()
    checkpoint(before + time.monotonic() - started)
    return averaged

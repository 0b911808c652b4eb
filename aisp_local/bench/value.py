"""A value function of pre-logits for ``re-control``: collected with the engine, trained with PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.api import Aligner
from aisp_local.controllers.re_control import Value
from aisp_local.errors import InputError
from aisp_local.rewards.base import call
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray, Message, Sampling

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Episodes:
    """Base responses: pre-logits of every generated token [L, d] each, and the rewards [N] of the whole responses."""

    states: Sequence[FloatArray]
    rewards: Array


def collect(
    aligner: Aligner, prompts: Sequence[str], *, n: int, max_tokens: int, seed: int, say: Callable[[str], None]
) -> Episodes:
    """``n`` responses of the base model to each prompt, at temperature 1 and min-p 0.02."""
    states: list[FloatArray] = []
    rewards: list[float] = []
    for i, text in enumerate(prompts):
        prompt: list[Message] = [{"role": "user", "content": text}]
        rollouts = aligner.engine.rollout(
            prompt,
            Controls(n, sampling=Sampling(1.0, min_p=0.02)),
            max_tokens=max_tokens,
            seeds=RowSeeds(seed, i),
            want=frozenset({"prelogits"}),
        )
        assert rollouts.prelogits is not None
        found = call(aligner.reward.name, aligner.reward.score, prompt, rollouts.texts)
        for z, reward in zip(rollouts.prelogits, found.tolist(), strict=True):
            if len(z) and np.isfinite(reward):
                states.append(z)
                rewards.append(reward)
        say(f"{i + 1} of {len(prompts)} prompts, {len(states)} responses")
    if len(states) < 10:
        raise InputError(f"only {len(states)} responses have a reward; give more prompts")
    return Episodes(states, np.array(rewards))


def check_torch() -> None:
    """Raises InputError without PyTorch, which ``train`` needs."""
    if find_spec("torch") is None:
        raise InputError(
            "training a value function needs torch, which is not installed: pip install 'aisp-local[train]'"
        )


def train(
    episodes: Episodes,
    *,
    epochs: int = 60,
    rate: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Value, dict[str, float]]:
    """A ReLU network d -> d -> 1 whose loss is RE-Control's: the squared difference of consecutive values, and of the
    last one to the response's reward. A tenth of the responses is held out, of the same prompts; the best epoch on them
    is kept.

    Gives the value function and, of the held-out responses, the correlation of its mean, first and last value with the
    reward. Source: arXiv 2406.05954 and its training script.
    """
    check_torch()
    torch: Any = import_module("torch")
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(episodes.states))
    held = max(1, len(order) // 10)
    states = [torch.from_numpy(np.ascontiguousarray(z)) for z in episodes.states]
    # The network sees states of mean 0 and deviation 1; the scaling is folded into its first matrix at the end.
    everything = torch.cat([states[i] for i in order[held:]])
    mean, scale = everything.mean(dim=0), everything.std(dim=0) + 1e-6
    middle, spread = float(episodes.rewards[order[held:]].mean()), float(episodes.rewards[order[held:]].std()) + 1e-9
    targets = torch.tensor((episodes.rewards - middle) / spread, dtype=torch.float32)
    d = int(everything.shape[1])
    network = torch.nn.Sequential(torch.nn.Linear(d, d), torch.nn.ReLU(), torch.nn.Linear(d, 1))
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)

    def values(chosen: npt.NDArray[np.int64]) -> tuple[Any, npt.NDArray[np.int64]]:
        """Of all steps of the chosen responses, one after the other, and where each ends."""
        lengths = np.array([len(states[i]) for i in chosen])
        flat = (torch.cat([states[i] for i in chosen]) - mean) / scale
        return network(flat)[:, 0], lengths.cumsum()

    def loss(chosen: npt.NDArray[np.int64]) -> Any:
        found, ends = values(chosen)
        inside = np.ones(len(found) - 1, np.bool_)
        inside[ends[:-1] - 1] = False  # from one response to the next
        steps = (found[1:] - found[:-1])[torch.from_numpy(inside)].square().sum()
        last = (found[torch.from_numpy(ends - 1)] - targets[torch.from_numpy(chosen)]).square().sum()
        return (steps + last) / len(chosen)

    rng, started = np.random.default_rng(seed + 1), time.monotonic()
    best, kept = float("inf"), {name: value.clone() for name, value in network.state_dict().items()}
    for epoch in range(epochs):
        shuffled = rng.permutation(order[held:])
        for start in range(0, len(shuffled), batch):
            optimiser.zero_grad()
            loss(shuffled[start : start + batch]).backward()
            optimiser.step()
        with torch.no_grad():
            now = float(loss(order[:held]))
        if now < best:
            best, kept = now, {name: value.clone() for name, value in network.state_dict().items()}
        if epoch % 10 == 9 or epoch == epochs - 1:
            say(f"epoch {epoch + 1}: held-out loss {now:.3f} (best {best:.3f}), {time.monotonic() - started:.0f} s")
    network.load_state_dict(kept)
    with torch.no_grad():
        found, ends = values(order[:held])
    parts = np.split(found.numpy(), ends[:-1])
    rewards = episodes.rewards[order[:held]]
    a, b = (kept[name].numpy() for name in ("0.weight", "0.bias"))
    folded = a / scale.numpy()
    value = Value(
        folded,
        b - folded @ mean.numpy(),
        kept["2.weight"].numpy()[0] * np.float32(spread),
        kept["2.bias"].numpy() * np.float32(spread) + np.float32(middle),
    )
    figures = {
        name: _correlation(np.array([of(part) for part in parts]), rewards)
        for name, of in (("mean", np.mean), ("first", lambda x: x[0]), ("last", lambda x: x[-1]))
    }
    return value, figures | {"responses": len(order), "held_out": held, "loss": best}


def _correlation(a: Array, b: Array) -> float:
    """nan where one of them does not vary."""
    if len(a) < 3 or float(np.ptp(a)) == 0.0 or float(np.ptp(b)) == 0.0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

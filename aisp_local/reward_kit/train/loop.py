"""The training loop: Bradley-Terry loss, AdamW, early stopping, checkpoints that a run goes on from."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aisp_local.errors import AispError, InputError
from aisp_local.host import processors
from aisp_local.interrupts import Uninterrupted
from aisp_local.reward_kit.export.network import scorer
from aisp_local.reward_kit.train.backbone import Backbone
from aisp_local.reward_kit.train.plan import Plan
from aisp_local.reward_kit.train.work import CHECKPOINT, best_of

Tokens = tuple[list[int], list[int]]  # ids and type ids of what the model reads
_POOL = 12  # batches among which comparisons are sorted by length
_SAVE_SECONDS = 120.0
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Encoded:
    """A comparison as tokens."""

    better: Tokens
    worse: Tokens

    @property
    def length(self) -> int:
        return max(len(self.better[0]), len(self.worse[0]))


@dataclass(frozen=True)
class Held:
    """What the held-out comparisons say: mean Bradley-Terry loss in nats, and the share ranked right."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Progress:
    """Where the training is."""

    step: int
    steps: int
    seconds: float
    loss: float | None  # of the comparisons since the last report; None if there were none
    accuracy: float | None
    tokens_per_second: float
    held: Held | None  # only when they were just looked at
    best: Held | None


@dataclass
class State:
    """All that a checkpoint keeps beside the network and the optimiser."""

    step: int = 0
    seconds: float = 0.0
    held: list[Held] = field(default_factory=list)

    @property
    def best(self) -> Held | None:
        return min(self.held, key=lambda held: held.loss, default=None)


class Trainer:
    """Trains a backbone in place. Everything random follows the plan's seed."""

    def __init__(
        self,
        backbone: Backbone,
        plan: Plan,
        folder: Path,
        *,
        fingerprint: str,
        device: str,
        types: bool,
        draw: Callable[[int], list[Encoded]],
        held_out: Sequence[Encoded],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """``draw(pass)`` gives the comparisons of a pass; ``fingerprint`` names data and options in checkpoints."""
        import torch

        self.backbone, self.plan, self.folder, self.fingerprint = backbone, plan, folder, fingerprint
        self.device, self.types, self.draw, self.held_out = device, types, draw, held_out
        self.on_progress = on_progress
        self.state = State()
        self._saved: Held | None = None  # the best evaluation that the checkpoint in the folder names
        self.model = backbone.model.to(device)
        self.scorer = scorer(self.model, backbone.decoder)
        self._freeze()
        self._set_dropout()
        head = {id(parameter) for parameter in backbone.head()}
        free = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in free if id(p) not in head and p.ndim > 1], "rate": plan.rate},
            {"params": [p for p in free if id(p) not in head and p.ndim < 2], "rate": plan.rate, "weight_decay": 0.0},
            {"params": [p for p in free if id(p) in head], "rate": plan.head_rate},
        ]
        self.groups = [group for group in groups if group["params"]]
        self.trained = [p for group in self.groups for p in group["params"]]
        self.optimiser = torch.optim.AdamW(self.groups, lr=plan.rate, weight_decay=plan.weight_decay, fused=True)
        self.per_pass = max(1, math.ceil(len(draw(0)) / plan.batch))
        self.every = max(1, self.per_pass // plan.evaluations)
        cores = 1 if device != "cpu" else max(1, min(4, len(processors()), plan.batch))
        # One core a thread waits far less than one operation spread over the cores. But all threads draw dropout from
        # one stream, and which draws first is the clock's to say.
        self.threads, self.inner = (1, cores) if plan.dropout else (cores, 1)
        self.half = device != "cpu" or _has_bfloat16()

    @property
    def steps(self) -> int:
        """Of all passes."""
        return self.per_pass * self.plan.epochs

    def run(self) -> State:
        """Train to the end, and leave the network with the weights of the best evaluation.

        An exception, Ctrl-C above all, leaves a checkpoint from which ``resume`` goes on.
        """
        import torch

        started = time.monotonic() - self.state.seconds
        saved = reported = time.monotonic()
        losses: list[float] = []
        right = tokens = 0
        self.model.train()
        batches: list[list[Encoded]] = []
        drawn = -1
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(self.inner,)) as pool:
            torch.set_num_threads(1)
            try:
                while True:
                    # Due by the state alone, so that one that an interrupt cost is made up for.
                    held = self._evaluate(pool) if self._due() else None
                    now = time.monotonic()
                    if held is not None or (losses and now - reported > _REPORT_SECONDS):
                        rate = tokens / max(now - reported, 1e-9)
                        mean = sum(losses) / len(losses) if losses else None
                        share = right / len(losses) if losses else None
                        self.state.seconds = now - started
                        step, seconds, best = self.state.step, self.state.seconds, self.state.best
                        self.on_progress(Progress(step, self.steps, seconds, mean, share, rate, held, best))
                        losses, right, tokens, reported = [], 0, 0, time.monotonic()
                    if now - saved > _SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
                    self.state.seconds = time.monotonic() - started
                    done = self._done()
                    if done >= 1 or self._stopped():
                        break
                    epoch, at = divmod(self.state.step, self.per_pass)
                    if epoch != drawn:
                        batches, drawn = self._batches(epoch), epoch
                    batch = batches[at]
                    loss, ranked = self._step(pool, batch, self.plan.relative_rate(done))
                    losses += [loss] * len(batch)
                    right += ranked
                    tokens += sum(len(side[0]) for pair in batch for side in (pair.better, pair.worse))
                if not self.state.held or self.state.held[-1].step != self.state.step:  # the time was up
                    self._evaluate(pool)
            except BaseException:
                self.state.seconds = time.monotonic() - started
                self.save()
                raise
            finally:
                torch.set_num_threads(threads)
        self.state.seconds = time.monotonic() - started
        self.save()
        best = self.state.best
        assert best is not None
        self.model.load_state_dict(self._weights(best))
        self.model.eval()
        return self.state

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if there is one. Raises InputError when it is of another training."""
        import torch

        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        try:
            kept = torch.load(path, map_location=self.device, weights_only=True)
            fingerprint, state = kept["fingerprint"], _state(kept)
        except Exception as error:  # torch.load raises whatever its bytes lead it to
            raise _unusable(path, error) from error
        if fingerprint != self.fingerprint:
            raise InputError(
                f"{path} belongs to another training (other data, backbone or options); give the same ones, or "
                "begin anew with --restart, which deletes it"
            )
        try:
            self.model.load_state_dict(kept["model"])
            self.optimiser.load_state_dict(kept["optimiser"])
        except Exception as error:
            raise _unusable(path, error) from error
        self.state, self._saved = state, state.best
        if state.best is not None:
            self._weights(state.best)
        return True

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. The weights of its best evaluation are there before it is."""
        held = [[entry.step, entry.loss, entry.accuracy] for entry in self.state.held]
        _write(
            self.folder / CHECKPOINT,
            {
                "fingerprint": self.fingerprint,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.state.step,
                "seconds": self.state.seconds,
                "held": held,
            },
        )
        self._saved = self.state.best
        self._clear_weights()

    def _weights(self, held: Held) -> dict[str, Any]:
        """The weights of an evaluation. Raises InputError if they are not there, or are another network's."""
        import torch

        path = self.folder / best_of(held.step)
        try:
            weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            shapes = {name: value.shape for name, value in weights.items()}
            if shapes != {name: value.shape for name, value in self.model.state_dict().items()}:
                raise ValueError("it holds another network")
        except Exception as error:  # torch.load raises whatever its bytes lead it to
            raise _unusable(path, error) from error
        return weights

    def _clear_weights(self) -> None:
        """Delete weights that neither the checkpoint nor this run names any more."""
        keep = {best_of(held.step) for held in (self._saved, self.state.best) if held is not None}
        for path in self.folder.glob(best_of("*")):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _due(self) -> bool:
        """Whether the held-out comparisons are to be ranked after this step, and are not yet."""
        step, last = self.state.step, self.state.held[-1].step if self.state.held else 0
        return step != last and (step % self.every == 0 or step == self.steps)

    def _stopped(self) -> bool:
        """Whether training ends for want of a better loss."""
        best = self.state.best
        return best is not None and sum(held.step > best.step for held in self.state.held) >= self.plan.patience

    def _freeze(self) -> None:
        self.model.get_input_embeddings().weight.requires_grad_(False)
        layers = self.backbone.layers()
        if self.plan.frozen_layers >= max(1, len(layers)):
            raise InputError(
                f"{self.plan.frozen_layers} layers cannot be frozen: {self.backbone.name} has {len(layers)}, and some "
                "must learn"
            )
        for layer in list(layers)[: self.plan.frozen_layers]:
            layer.requires_grad_(False)

    def _set_dropout(self) -> None:
        import torch

        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = self.plan.dropout
            for name in ("attention_dropout", "dropout_prob"):  # what some attentions read at each step
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, self.plan.dropout)

    def _done(self) -> float:
        """Share of the run that is done, by steps or by time."""
        by_steps = self.state.step / self.steps
        return by_steps if self.plan.minutes is None else max(by_steps, self.state.seconds / 60 / self.plan.minutes)

    def _batches(self, epoch: int) -> list[list[Encoded]]:
        """A pass in batches of similar length, in random order."""
        order = self.draw(epoch)
        batches = []
        for start in range(0, len(order), _POOL * self.plan.batch):
            part = sorted(order[start : start + _POOL * self.plan.batch], key=lambda pair: pair.length)
            batches += [part[i : i + self.plan.batch] for i in range(0, len(part), self.plan.batch)]
        random.Random(self.plan.seed * 1_000_003 + epoch).shuffle(batches)
        # A pass drawn anew may be a little shorter than the first.
        return [batches[i % len(batches)] for i in range(self.per_pass)]

    def _scores(self, batch: Sequence[Encoded]) -> tuple[Any, Any]:
        """Scores of the better and of the worse sides."""
        import torch

        rows = [pair.better for pair in batch] + [pair.worse for pair in batch]
        feed = {name: part.to(self.device) for name, part in collate(rows, self.types).items()}
        kind = "cpu" if self.device == "cpu" else "cuda"
        with torch.autocast(kind, torch.bfloat16, enabled=self.half):
            scores = self.scorer(**feed)[:, 0].float()
        return scores[: len(batch)], scores[len(batch) :]

    def _part(self, batch: Sequence[Encoded], size: int) -> tuple[list[Any], float, int]:
        """Gradients of a part of a batch, its summed loss, and how many came out right."""
        import torch
        from torch.nn import functional as F

        better, worse = self._scores(batch)
        loss = F.softplus(worse - better).sum()
        total = loss + self.plan.centring * 0.5 * (better**2 + worse**2).sum()
        gradients = torch.autograd.grad(total / size, self.trained, allow_unused=True)
        return list(gradients), float(loss.detach()), int((better > worse).sum())

    def _step(self, pool: ThreadPoolExecutor, batch: Sequence[Encoded], relative: float) -> tuple[float, int]:
        """One step of the optimiser, whole or not at all; mean loss, and how many came out right."""
        import torch

        if self.plan.dropout:  # at each step, so that a run that goes on from here draws the same
            torch.manual_seed(self.plan.seed * 1_000_003 + self.state.step)
        parts = [batch[i :: self.threads] for i in range(min(self.threads, len(batch)))]
        results = list(pool.map(self._part, parts, [len(batch)] * len(parts)))
        for parameter, *values in zip(self.trained, *(gradients for gradients, _, _ in results), strict=True):
            known = [value for value in values if value is not None]
            parameter.grad = sum(known[1:], known[0]) if known else None
        loss = sum(result[1] for result in results) / len(batch)
        if not math.isfinite(loss):
            raise AispError(f"the loss is not finite at step {self.state.step + 1}; lower the rates")
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * relative
        with Uninterrupted():
            self.optimiser.step()
            self.state.step += 1
        return loss, sum(result[2] for result in results)

    def _evaluate(self, pool: ThreadPoolExecutor) -> Held:
        """Rank the held-out comparisons, and keep the weights if they do better."""
        import torch
        from torch.nn import functional as F

        def part(batch: Sequence[Encoded]) -> tuple[float, float]:
            with torch.no_grad():
                better, worse = self._scores(batch)
            right = (better > worse).float() + 0.5 * (better == worse).float()
            return float(F.softplus(worse - better).sum()), float(right.sum())

        self.model.eval()
        order = sorted(self.held_out, key=lambda pair: pair.length)
        found = list(pool.map(part, [order[i : i + 16] for i in range(0, len(order), 16)]))
        self.model.train()
        n = len(order)
        held = Held(self.state.step, sum(loss for loss, _ in found) / n, sum(right for _, right in found) / n)
        before = self.state.best
        if before is None or held.loss < before.loss:
            # Before it is recorded: a checkpoint must never name weights that are not there.
            _write(self.folder / best_of(held.step), self.model.state_dict())
        self.state.held.append(held)
        self._clear_weights()
        return held


def collate(rows: Sequence[Tokens], types: bool) -> dict[str, Any]:
    """Inputs of the model, each [n, L], padded with 0 on the right."""
    import torch

    length = max(len(ids) for ids, _ in rows)
    parts = torch.zeros(3, len(rows), length, dtype=torch.long)
    for i, (ids, kinds) in enumerate(rows):
        parts[0, i, : len(ids)] = torch.tensor(ids)
        parts[1, i, : len(ids)] = 1
        parts[2, i, : len(ids)] = torch.tensor(kinds)
    feed = {"input_ids": parts[0], "attention_mask": parts[1]}
    return feed | {"token_type_ids": parts[2]} if types else feed


def _state(kept: Any) -> State:
    """What a checkpoint says of the run. Raises KeyError, TypeError or ValueError."""
    held = [Held(int(step), float(loss), float(accuracy)) for step, loss, accuracy in kept["held"]]
    return State(int(kept["step"]), float(kept["seconds"]), held)


def _unusable(path: Path, error: Exception) -> InputError:
    said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
    return InputError(f"{path} cannot be read ({said}); begin anew with --restart, which deletes the checkpoint")


def _write(path: Path, state: Any) -> None:
    import torch

    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise AispError(f"{path} cannot be written ({error}); make room, or choose another folder") from error


def _has_bfloat16() -> bool:
    """Whether this processor has instructions for its products, with which these are faster.

    By what it is, not by a clock: the same seed must give the same weights, however busy the machine is.
    """
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""The rollout engine: prefill once, fork to n rows, decode a column of tokens a step.

The prompt lives in sequence 0, all but its last token; rows are the sequences 1..n. Each row decodes
the prompt's last token itself, since a token shared by sequences could have one control only.
Sequence 0 is never written by a row, so later iterations and turns start from it. The prompt of an
encoder-decoder model is encoded once instead, for all rows, which start from the decoder's first token.
"""

from __future__ import annotations

import codecs
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.engine.base import Want
from aisp_local.engine.head import OutputHead
from aisp_local.engine.prompts import prompt_tokens
from aisp_local.engine.sampling import log_law, log_softmax, pick
from aisp_local.errors import CapacityError, DecodeError, InputError
from aisp_local.native import MAX_SEQUENCES, MAX_THREADS, Context, ControlKind, Model
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FinishReason, FloatArray, Prompt, Rollouts

_CTX_STEP = 256  # llama.cpp pads the cache to this


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class LlamaEngine:
    """n rollouts of one prompt under controls, on one model. Safe to share between threads: calls queue.

    ``memory_limit``: bytes that the KV cache may take (default: what is available on the host).
    ``control``: inside llama.cpp's graph, or by a callback, which is all that a stock llama-cpp-python can.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        n_ubatch: int = 512,
        control: ControlKind = "auto",
    ) -> None:
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise InputError(f"{threads} threads were asked for; llama.cpp takes 1 to {MAX_THREADS}")
        self.model = Model(model, n_gpu_layers=n_gpu_layers)
        self._control: ControlKind = control
        self._threads = threads
        self._memory_limit = memory_limit
        self._n_ubatch = n_ubatch
        self._context: Context | None = None
        self._cached: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # what sequence 0 holds, or what was encoded
        self._encoded = 0  # for how many rows
        self._head: OutputHead | None = None
        self._lock = threading.Lock()

    @property
    def d(self) -> int:
        return self.model.d

    @property
    def head(self) -> OutputHead:
        """The output head on the host; ``project`` dequantises it at first use (V * d * 4 bytes)."""
        if self._head is None:
            self._head = OutputHead(self.model.path, self.model.output_rows)
        return self._head

    @property
    def n_ctx(self) -> int:
        return self.model.n_ctx_train

    def room(self, prompt: Prompt) -> int:
        """How many tokens a response to the prompt may have; less than 1 if the prompt alone is too long."""
        return self._room(self.tokens(prompt))

    def _room(self, tokens: npt.NDArray[np.int32]) -> int:
        left = self.n_ctx - len(tokens)
        return self.n_ctx - 1 if self.model.has_encoder and left >= 0 else left

    def tokens(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """The prompt's tokens [P]."""
        return prompt_tokens(self.model, prompt)

    def rollout(
        self,
        prompt: Prompt,
        controls: Controls,
        *,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str] = (),
        want: frozenset[Want] = frozenset(),
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> Rollouts:
        """Decode ``controls.n`` responses of at most ``max_tokens`` tokens; see types.Rollouts.

        Raises CapacityError when prompt or rows do not fit, DecodeError when llama.cpp fails.
        """
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        if any(not stop for stop in stop_strings):
            raise InputError("a stop string is empty")
        with self._lock:
            tokens = self.tokens(prompt)
            room = self._room(tokens)
            if room < 1:
                raise CapacityError(
                    f"the prompt has {len(tokens)} tokens and the model's context {self.model.n_ctx_train}; "
                    "shorten the prompt"
                )
            max_tokens = min(max_tokens, room)
            start = time.perf_counter()
            context = self._reserve(len(tokens), controls.n, max_tokens)
            context.clear_controls()
            context.want_prelogits(False)
            for row in range(1, context.n_seq_max):
                context.remove(row)
            if self.model.has_encoder:
                self._encode(context, tokens, controls.n)
                last, position = self.model.decoder_start, 0
            else:
                self._prefill(context, tokens)
                last, position = int(tokens[-1]), len(tokens) - 1
            run = _Run(self, context, last, position, controls, max_tokens, seeds, stop_strings, want)
            return run.decode(start, should_stop, on_step)

    def _reserve(self, prompt: int, n: int, max_tokens: int) -> Context:
        """A context with room for the prompt and n rows; the one at hand if it is large enough."""
        if n + 1 > MAX_SEQUENCES:
            raise CapacityError(
                f"{n} rollouts at once were asked for; llama.cpp takes at most {MAX_SEQUENCES - 1}: "
                "use a smaller n and more iterations"
            )
        n_ubatch = self._n_ubatch
        if self.model.has_encoder:  # takes the prompt in one go, and no more than there are cells
            cells, n_ubatch = max(prompt, n * max_tokens), max(prompt, n_ubatch)
        else:
            cells = prompt - 1 + n * max_tokens
        cells = -(-cells // _CTX_STEP) * _CTX_STEP
        old = self._context
        if old is not None and old.n_ctx >= cells and old.n_seq_max >= n + 1 and old.n_ubatch >= n_ubatch:
            return old
        if old is not None:
            cells, rows = max(cells, old.n_ctx), max(n + 1, old.n_seq_max)
            old.close()
            self._context, self._cached = None, self._cached[:0]
        else:
            rows = n + 1
        self._check_memory(prompt, n, max_tokens, cells)
        self._context = Context(
            self.model,
            project=lambda z: self.head.project_first(z),
            control=self._control,
            n_ctx=cells,
            n_seq_max=rows,
            n_ubatch=n_ubatch,
            n_threads=self._threads,
        )
        return self._context

    def _check_memory(self, prompt: int, n: int, max_tokens: int, cells: int) -> None:
        each = self.model.kv_bytes_per_token
        limit = self._memory_limit if self._memory_limit is not None else available_memory()
        if limit is None or each == 0 or cells * each <= limit:
            return
        fits = max(0, (limit // each // _CTX_STEP * _CTX_STEP - (prompt - 1)) // max_tokens)
        advice = f"n = {fits} would fit" if fits else "not even one does: use fewer tokens"
        raise CapacityError(
            f"{n} rollouts of {max_tokens} tokens need {cells * each / 2**20:.0f} MiB of KV cache and "
            f"{limit / 2**20:.0f} MiB are available; {advice}"
        )

    def _prefill(self, context: Context, tokens: npt.NDArray[np.int32]) -> None:
        """Bring sequence 0 to ``tokens[:-1]``, keeping the longest prefix that it shares."""
        wanted = tokens[:-1]
        shared = min(len(wanted), len(self._cached))
        differs = np.flatnonzero(wanted[:shared] != self._cached[:shared])
        keep = int(differs[0]) if len(differs) else shared
        if keep < len(self._cached) and not (keep and context.remove(0, keep)):
            context.clear()
            keep = 0
        self._cached = wanted[:keep]
        for start in range(keep, len(wanted), context.n_batch):
            part = wanted[start : start + context.n_batch]
            positions = np.arange(start, start + len(part))
            context.decode(part, positions, np.zeros(len(part), np.int64), outputs=False)
            self._cached = wanted[: start + len(part)]

    def _encode(self, context: Context, tokens: npt.NDArray[np.int32], n: int) -> None:
        """Let the encoder read the prompt for rows 1..n, unless it has."""
        if not np.array_equal(tokens, self._cached) or self._encoded < n:
            self._cached = self._cached[:0]
            context.encode(tokens, n)
            self._cached, self._encoded = tokens, n

    def close(self) -> None:
        """Free the context and the model."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self.model.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """The state of one call of ``rollout``."""

    def __init__(
        self,
        engine: LlamaEngine,
        context: Context,
        last: int,
        position: int,
        controls: Controls,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str],
        want: frozenset[Want],
    ) -> None:
        n = controls.n
        self.engine, self.context, self.controls = engine, context, controls
        self.max_tokens, self.want = max_tokens, want
        self.last, self.position = last, position  # of the token that every row decodes first
        self.tokens = np.zeros((n, max_tokens), np.int32)
        self.lengths = np.zeros(n, np.int64)
        self.reasons: list[FinishReason] = ["interrupted"] * n
        self.stops = [stop.encode() for stop in stop_strings]
        self.bytes = [bytearray() for _ in range(n)]
        self.uniforms = np.zeros((n, max_tokens))
        if not controls.sampling.greedy:
            for row in range(n):
                self.uniforms[row] = seeds.generator(row, "sampling").random(max_tokens)
        controlled = controls.vectors is not None
        self.needs_head = controlled and bool(want & {"kl", "logprobs"})
        self.needs_z = self.needs_head or "prelogits" in want
        self.logprobs = np.zeros((n, max_tokens), np.float32) if "logprobs" in want else None
        self.kl = np.zeros(n) if "kl" in want else None
        self.z = np.zeros((n, max_tokens, engine.d), np.float32) if "prelogits" in want else None

    def decode(
        self,
        start: float,
        should_stop: Callable[[], bool] | None,
        on_step: Callable[[int, int, int], None] | None,
    ) -> Rollouts:
        context, n = self.context, self.controls.n
        for row in range(n):
            context.fork(0, row + 1)
        vectors = self.controls.vectors
        if vectors is not None:
            context.set_controls(
                vectors[:, : self.max_tokens],
                range(1, n + 1),
                self.position,
                held=self.controls.held,
            )
        context.want_prelogits(self.needs_z)
        active = np.arange(n)
        current = np.full(n, self.last, np.int32)
        total = 0
        for step in range(self.max_tokens):
            if should_stop is not None and should_stop():
                break
            context.decode(
                current,
                np.full(len(active), self.position + step),
                active + 1,
                outputs=True,
            )
            logits = context.logits()
            current = pick(logits, self.controls.sampling, self.uniforms[active, step])
            if not np.isfinite(logits[np.arange(len(active)), current]).all():
                raise DecodeError(
                    f"the model gave logits that are not finite at step {step + 1}; "
                    "the file may be damaged, or the control far too strong"
                )
            if self.want:
                self._record(step, active, logits, current)
            self.tokens[active, step] = current
            self.lengths[active] = step + 1
            total += len(active)
            ended = self.engine.model.eog[current]
            if self.stops:
                ended |= self._stopped(active, current)
            if ended.any():
                for done in active[ended]:
                    self.reasons[int(done)] = "stop"
                    context.remove(int(done) + 1)
                active, current = active[~ended], current[~ended]
            if on_step is not None:
                on_step(step + 1, len(active), total)
            if len(active) == 0:
                break
        else:
            for left in active:
                self.reasons[int(left)] = "length"
        return self._rollouts(time.perf_counter() - start, total)

    def _stopped(self, active: npt.NDArray[np.intp], current: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which rows hold a stop string after their new token."""
        found = np.zeros(len(active), np.bool_)
        for i, (row, token) in enumerate(zip(active, current, strict=True)):
            piece = self.engine.model.piece(int(token))
            text = self.bytes[row]
            text += piece
            found[i] = any(text.find(stop, max(0, len(text) - len(piece) - len(stop))) >= 0 for stop in self.stops)
        return found

    def _record(
        self,
        step: int,
        active: npt.NDArray[np.intp],
        logits: FloatArray,
        current: npt.NDArray[np.int32],
    ) -> None:
        z = self.context.prelogits() if self.needs_z else None
        if self.z is not None and z is not None:
            self.z[active, step] = z
        base = self.engine.head.project(z) if self.needs_head and z is not None else logits
        if self.logprobs is not None:
            law = log_softmax(base.astype(np.float64))
            self.logprobs[active, step] = law[np.arange(len(active)), current]
        if self.kl is not None and self.needs_head:
            sampling = self.controls.sampling
            p = log_law(logits, sampling)
            q = log_softmax(base.astype(np.float64) / (sampling.temperature or 1.0))
            terms = np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)
            self.kl[active] += terms.sum(axis=1)

    def _text(self, row: int) -> str:
        tokens = self.tokens[row, : self.lengths[row]]
        data = b"".join(self.engine.model.piece(int(token)) for token in tokens)
        for stop in self.stops:
            data = data.split(stop, 1)[0]
        # An incremental decoder leaves out a character that the token limit cut in two.
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

    def _rollouts(self, seconds: float, total: int) -> Rollouts:
        rows = range(self.controls.n)
        lengths = self.lengths
        return Rollouts(
            tokens=[self.tokens[i, : lengths[i]].copy() for i in rows],
            texts=[self._text(i) for i in rows],
            finish_reasons=self.reasons,
            decode_seconds=seconds,
            n_tokens=total,
            base_logprobs=None if self.logprobs is None else [self.logprobs[i, : lengths[i]].copy() for i in rows],
            kl=None if self.kl is None else self.kl.astype(np.float32),
            prelogits=None if self.z is None else [self.z[i, : lengths[i]].copy() for i in rows],
        )

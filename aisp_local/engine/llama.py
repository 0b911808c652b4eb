"""The rollout engine: prompts are prefilled once, rows fork from them and decode a column of tokens a step.

The prompts live in the sequences 0 to P - 1, all but their last token; rows are the sequences after them. Each row
decodes its prompt's last token itself, since a token shared by sequences could have one control only. A prompt's
sequence is never written by a row, so later iterations, turns and prompts start from it. The prompt of an
encoder-decoder model is encoded once instead, for all rows, which start from the decoder's first token.

Models with two sets of rope factors (LongRoPE: Phi-3, Phi-4-mini, MiniCPM): llama.cpp takes the long ones when the
context is longer than what the model was first trained on, and a unified cache counts as one context, however short its
sequences are. Which set is right depends on what one sequence of the run can need. Where llama.cpp would take the long
ones for the sum of short sequences, the model is loaded again with another bound.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.background import events
from aisp_local.engine import plain
from aisp_local.engine.base import Feed, Job, OneJob, too_long
from aisp_local.engine.cache import PromptCache
from aisp_local.engine.decode import Decoder, Lane, Start, response_text, unbegun
from aisp_local.engine.head import OutputHead, adapts_head, fingerprint, has_tensor
from aisp_local.engine.plain import Sample
from aisp_local.engine.prompts import prompt_tokens
from aisp_local.errors import CapacityError, InputError, ModelError
from aisp_local.grammar import Grammar
from aisp_local.host import available_cores, available_memory
from aisp_local.native import MAX_SEQUENCES, MAX_THREADS, Context, ControlKind, Lora, Matcher, Model
from aisp_local.seeds import RowSeeds
from aisp_local.timeline import OFF, Timeline, recorded
from aisp_local.types import Controls, Prompt, Rollouts, Sampling, Want

_CTX_STEP = 256  # llama.cpp pads the cache to this
_SCORES_BYTES = 2**28  # of attention scores in a batch, where they are written out
_NO_BOUND = 2**31 - 1  # no context is longer

_runs: ContextVar[tuple[object, ...]] = ContextVar("_runs", default=())
"""The runs from within which this code was called, in this thread or, with its context, in another."""


@dataclass(frozen=True)
class Claim:
    """What a run, or several at once, need of the context."""

    prompts: Sequence[npt.NDArray[np.int32]]  # tokens
    at_once: int  # of them
    slots: int
    rows: int
    max_tokens: int
    held: int  # cells of prompts
    decoded: int  # cells of rows
    long: bool  # whether it takes the long rope factors
    runs: int = 1

    def __add__(self, other: Claim) -> Claim:
        """Both, if their rope factors are the same."""
        return Claim(
            [*self.prompts, *other.prompts],
            self.at_once + other.at_once,
            self.slots + other.slots,
            self.rows + other.rows,
            max(self.max_tokens, other.max_tokens),
            self.held + other.held,
            self.decoded + other.decoded,
            self.long,
            self.runs + other.runs,
        )

    @property
    def cells(self) -> int:
        return -(-(self.held + self.decoded) // _CTX_STEP) * _CTX_STEP


class LlamaEngine:
    """Rollouts under controls, on one model. Safe to share between threads: calls queue, also ``close``.

    Whatever ends a run (an error, a callback that raises, Ctrl-C), the next one is as on a new engine. A callback or a
    reward cannot use the engine that waits for it: InputError.

    ``threads``: that decode (default: one a core). ``parallel``: at most so many rollouts decode at once; others wait
    for a free row (default: all, up to 255). ``memory_limit``: bytes that the KV cache may take (default: what is
    available on the host). ``flash_attention``: default llama.cpp's. ``control``: inside llama.cpp's graph, or by
    a callback, which is all that a stock llama-cpp-python can. ``loras``: adapters that the base model has throughout.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        threads: int | None = None,
        parallel: int | None = None,
        memory_limit: int | None = None,
        n_ubatch: int = 512,
        flash_attention: bool | None = None,
        control: ControlKind = "auto",
        loras: Sequence[str | os.PathLike[str] | Lora] = (),
    ) -> None:
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise InputError(f"{threads} threads were asked for; llama.cpp takes 1 to {MAX_THREADS}")
        if parallel is not None and not 1 <= parallel < MAX_SEQUENCES:
            raise InputError(f"parallel is {parallel} rollouts at once; llama.cpp takes 1 to {MAX_SEQUENCES - 1}")
        adapters = [Lora.of(lora) for lora in loras]
        self.model = Model(model, n_gpu_layers=n_gpu_layers, loras=adapters)
        for adapter in adapters:
            if adapts_head(self.model.path, adapter.path):
                self.model.close()
                raise ModelError(
                    f"{adapter.path} adapts the output matrix, which perturbations of its input need as it is; "
                    "merge it into the model (llama-export-lora), or train one without"
                )
        self.timeline: Timeline = OFF
        self._control: ControlKind = control
        self._threads = min(available_cores(), MAX_THREADS) if threads is None else threads
        self._parallel = parallel
        self._memory_limit = memory_limit
        self._n_ubatch = n_ubatch
        self._flash_attention = flash_attention
        self._context: Context | None = None
        self._cache: PromptCache | None = None
        self._slots = 1  # prompts that the context can hold; its other sequences are rows
        self._encoded: tuple[npt.NDArray[np.int32], int] | None = None  # what the encoder read, for how many rows
        self._head: OutputHead | None = None
        self._parts: dict[bytes, Sequence[int]] = {}  # how prompts are to be read, by their tokens
        self._long = False  # whether the context takes the long rope factors, where there are two sets
        self._lock = threading.Lock()
        self._run: object | None = None  # names the run that has the lock
        self._closed = False

    def _check_free(self) -> None:
        """Refuse to wait for a run that waits for us."""
        if self._run is not None and self._run in _runs.get():
            raise InputError(
                "the engine was called from within its own run, by a callback or by the reward; use another one there"
            )

    def _within(self, run: object) -> contextvars.Context:
        """This context, for code that is called from within the run."""
        context = copy_context()
        context.run(lambda: _runs.set((*_runs.get(), run)))
        return context

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the engine is closed; make a new one")

    @property
    def d(self) -> int:
        return self.model.d

    @property
    def offloaded(self) -> bool:
        """Whether decoding leaves the processor's cores alone."""
        return self.model.on_gpu

    @property
    def settings(self) -> dict[str, Any]:
        """How the context is made: ``n_ctx`` (cells), ``threads``, ``flash_attention`` (None: llama.cpp's choice)."""
        context = self._context
        return {
            "n_ctx": 0 if context is None else context.n_ctx,
            "threads": self._threads,
            "flash_attention": None if context is None else context.flash_attention,
        }

    @property
    def head(self) -> OutputHead:
        """The output head on the host; ``project`` dequantises it at first use (V * d * 4 bytes)."""
        if self._head is None:
            self._head = OutputHead(self.model.path, self.model.output_rows)
        return self._head

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model."""
        return fingerprint(self.model.path, [(lora.path, lora.scale) for lora in self.model.loras])

    @property
    def n_ctx(self) -> int:
        return self.model.n_ctx_train

    def room(self, prompt: Prompt) -> int:
        """How many tokens a response to the prompt may have; less than 1 if the prompt alone is too long."""
        return self._room(self.tokens(prompt))

    def _room(self, tokens: npt.NDArray[np.int32]) -> int:
        left = self.n_ctx - len(tokens)
        return self.n_ctx - 1 if self.model.has_encoder and left >= 0 else left

    def _checked_room(self, tokens: npt.NDArray[np.int32]) -> int:
        room = self._room(tokens)
        if room < 1:
            raise too_long(len(tokens), self.n_ctx)
        return room

    def tokens(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """The prompt's tokens [P]."""
        return prompt_tokens(self.model, prompt)

    def text(self, tokens: npt.NDArray[np.int32]) -> str:
        """What tokens of a response say; a character that their end cuts in two is left out."""
        return response_text(self.model, tokens)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty if it says nothing."""
        return self.model.piece(token)

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises InputError for a grammar that llama.cpp refuses."""
        Matcher(self.model, grammar).close()

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
        grammar: Grammar | None = None,
    ) -> Rollouts:
        """Decode ``controls.n`` responses of at most ``max_tokens`` tokens; see types.Rollouts.

        Raises CapacityError when prompt or rows do not fit, DecodeError when llama.cpp fails.
        """
        job = Job(prompt, controls, max_tokens, seeds, stop_strings, want, grammar)
        job.check(self.d)
        feed = OneJob(job, should_stop, on_step)
        self.run(feed, prompts=[prompt], n=controls.n, max_tokens=max_tokens)
        return feed.rollouts or unbegun(job, self.d)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        grammar: Grammar | str | Mapping[str, Any] | None = None,
        logprobs: bool = False,
        at_once: int | None = None,
    ) -> list[list[Sample]]:
        """``n`` samples of each prompt, in one batch, of the model alone: no control and no reward.

        ``[i][k]`` is the k-th sample of ``prompts[i]``, the same whatever the other prompts are, but for rounding.
        ``temperature`` 0 is greedy. ``at_once``: prompts that decode together (default: as many as make 32 rows).
        ``grammar``: as for ``Aligner.generate``. ``logprobs``: see Sample. Raises CapacityError where a prompt or so
        many rows do not fit, InputError and DecodeError.
        """
        samples: list[list[Sample]] = [[] for _ in prompts]
        sampling = Sampling(temperature, top_k, top_p, min_p)
        request = plain.Request.of(n, max_tokens, sampling, seed, stop_strings, grammar, logprobs, at_once)
        plain.run(self, prompts, request, samples.__setitem__, lambda: False)
        return samples

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        grammar: Grammar | str | Mapping[str, Any] | None = None,
        logprobs: bool = False,
        at_once: int | None = None,
    ) -> Generator[tuple[int, list[Sample]], None, None]:
        """``generate``, a prompt at a time as its samples are finished: pairs of i and the samples of ``prompts[i]``.

        It decodes in a thread of its own, from the first ``next`` on, until it is done or the iterator is closed.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        request = plain.Request.of(n, max_tokens, sampling, seed, stop_strings, grammar, logprobs, at_once)
        return events(lambda put, closed: plain.run(self, prompts, request, lambda *done: put(done), closed))

    def run(
        self, feed: Feed, *, prompts: Sequence[Prompt], n: int, max_tokens: int, at_once: int | None = None
    ) -> None:
        """Decode the feed's jobs until it has no more; see engine.base.Engine.

        With two sets of rope factors the longest prompt decides for all: see the top of this file.
        Raises CapacityError when prompts or rows do not fit, DecodeError when llama.cpp fails.
        """
        self._check_free()
        with self._lock:
            self._check_open()
            run, token = object(), None
            try:
                self._run = run
                token = _runs.set((*_runs.get(), run))
                claim = self._claim(prompts, n, max_tokens, min(len(prompts), at_once or len(prompts)))
                self._decoder(claim).run(self._lane(feed, claim))
            finally:
                self._run = None
                if token is not None:
                    _runs.reset(token)

    def _claim(self, prompts: Sequence[Prompt], n: int, max_tokens: int, at_once: int) -> Claim:
        """Raises CapacityError for a prompt that is longer than the model's context."""
        tokens = [self.tokens(prompt) for prompt in prompts]
        max_tokens = min(max_tokens, max(self._checked_room(each) for each in tokens))
        slots = 1 if self.model.has_encoder else min(at_once, MAX_SEQUENCES // 2)
        rows = min(n, self._parallel or n, MAX_SEQUENCES - slots)
        held, decoded = slots * (max(map(len, tokens)) - 1), rows * max_tokens
        if self.model.has_encoder:  # takes the prompt in one go, and no more than there are cells
            held = max(0, max(map(len, tokens)) - decoded)
        # The last token of a response is never decoded.
        longest = max(len(each) + min(max_tokens, self._room(each)) - 1 for each in tokens)
        return Claim(tokens, at_once, slots, rows, max_tokens, held, decoded, 0 < self._rope_bound[0] < longest)

    def _decoder(self, claim: Claim) -> Decoder:
        """Of rows with nothing in them, in a context that is large enough."""
        context = self._reserve(claim)
        context.clear_controls()
        for sequence in range(self._slots, context.n_seq_max):
            context.remove(sequence)
        timeline = recorded(self.timeline)
        return Decoder(self.model, context, lambda: self.head, first=self._slots, timeline=timeline)

    def _lane(self, feed: Feed, claim: Claim) -> Lane:
        """For a decoder whose context has room for the claim."""
        context, cache = self._context, self._cache
        assert context is not None and cache is not None

        def open_prompt(job: Job, idle: bool) -> tuple[Start, int] | None:
            prompt = self.tokens(job.prompt)
            limit = min(job.max_tokens, claim.max_tokens, self._checked_room(prompt))
            if self.model.has_encoder:
                if not self._encode(context, prompt, claim.rows, idle):
                    return None
                return Start(self.model.decoder_start, 0, None), limit
            sequence = cache.take(prompt[:-1], lambda *part: self._prefill(context, *part))
            if sequence is None:
                return None
            return Start(int(prompt[-1]), len(prompt) - 1, sequence), limit

        def close_prompt(start: Start) -> None:
            if start.sequence is not None:
                cache.give_back(start.sequence)

        return Lane(feed, claim.rows, claim.max_tokens, open_prompt, close_prompt)

    def _holds(self, claim: Claim) -> bool:
        """Whether the context at hand is large enough."""
        context = self._context
        if context is None or context.n_ctx < claim.cells or self._slots < claim.slots or self._long != claim.long:
            return False
        if self.model.has_encoder and context.n_ubatch < max(map(len, claim.prompts)):
            return False
        return context.n_seq_max >= self._slots + claim.rows

    def _reserve(self, claim: Claim) -> Context:
        """A context with room for the claim; the one at hand if it is large enough."""
        old, slots, rows, cells = self._context, claim.slots, claim.rows, claim.cells
        if old is not None and self._cache is not None:
            if self._holds(claim):
                self._cache.fit(claim.prompts, old.n_ctx - claim.decoded)
                return old
            cells, slots = max(cells, old.n_ctx), max(slots, self._slots)
            rows = max(rows, old.n_seq_max - self._slots)
            if slots + rows > MAX_SEQUENCES:
                slots, rows = claim.slots, min(rows, MAX_SEQUENCES - claim.slots)
            self._drop_context()
        cells, n_ubatch = self._check_memory(claim, cells), self._n_ubatch
        if self.model.has_encoder:
            n_ubatch = max(n_ubatch, max(map(len, claim.prompts)))
        elif self._flash_attention is False:
            n_ubatch = min(n_ubatch, max(32, _SCORES_BYTES // (4 * cells * self.model.n_head)))
        context = Context(
            self.model,
            project=lambda z: self.head.project_first(z),
            control=self._control,
            n_ctx=cells,
            n_seq_max=slots + rows,
            n_ubatch=n_ubatch,
            n_threads=self._threads,
            flash_attention=self._flash_attention,
            n_ctx_orig=self._choose_rope(claim.long, cells),
        )
        self._context, self._slots, self._long = context, slots, claim.long
        self._cache = PromptCache(context, slots, self.model.n_swa, cells - claim.decoded)
        return context

    def _drop_context(self) -> None:
        context, self._context, self._cache, self._encoded = self._context, None, None, None
        if context is not None:
            context.close()

    @cached_property
    def _rope_bound(self) -> tuple[int, str]:
        """How many tokens a sequence may have under the short rope factors, 0 without long ones; the metadata's key."""
        scaling = f"{self.model.meta('general.architecture')}.rope.scaling"
        key, kind = f"{scaling}.original_context_length", self.model.meta(f"{scaling}.type")
        bound = int(self.model.meta(key) or (self.n_ctx if kind == "longrope" else 0))
        if bound == 0 or kind in ("linear", "yarn") or not has_tensor(self.model.path, "rope_factors_long.weight"):
            return 0, key
        return bound, key

    def _choose_rope(self, long: bool, cells: int) -> int:
        """See to it that llama.cpp takes these factors in a context of so many cells; the bound for the context."""
        bound, key = self._rope_bound
        if bound and long:
            self.model.reload({})
        elif bound and cells > bound:
            self.model.reload({key: _NO_BOUND})
        return bound

    def _check_memory(self, claim: Claim, cells: int) -> int:
        """How many cells to have: ``cells`` if there is memory for them, else as many as are needed."""
        each, needed, rows, prompts = self.model.kv_bytes_per_token, claim.cells, claim.rows, claim.at_once
        held, max_tokens = 0 if self.model.has_encoder else claim.held, claim.max_tokens
        limit = self._memory_limit if self._memory_limit is not None else available_memory()
        if limit is None or each == 0 or cells * each <= limit:
            return cells
        if needed * each <= limit:
            return needed
        room = limit // each // _CTX_STEP * _CTX_STEP
        fits = max(0, (room - held) // max_tokens)
        some = room // (held // prompts + max_tokens)
        if fits >= prompts:
            advice = f"n = {fits // prompts} {f'for each of {prompts} prompts ' if prompts > 1 else ''}would fit"
        elif some and prompts > 1:
            advice = f"n = 1 and {some} of {prompts} prompts at once (at_once) would fit"
        else:
            advice = f"not even one does: use fewer {'prompts or ' if prompts > 1 else ''}tokens"
        raise CapacityError(
            f"{rows} rollouts of {max_tokens} tokens need {needed * each / 2**20:.0f} MiB of KV cache and "
            f"{limit / 2**20:.0f} MiB are available; {advice}"
        )

    def parts(self, prompt: Prompt) -> list[int]:
        """How many of the prompt's tokens the cache held whenever some were read into it: of a turn of a conversation
        those of earlier turns are there already. What is read together decides how logits are rounded."""
        # Without the lock: who asks must not wait for the run of another thread.
        wanted, cache = self.tokens(prompt)[:-1], self._cache
        found = [] if cache is None else list(zip(cache.tokens, cache.parts, strict=True))
        return next((list(parts) for held, parts in found if np.array_equal(held, wanted)), [])

    def read_in_parts(self, prompt: Prompt, parts: Sequence[int]) -> None:
        """Read this prompt as ``parts`` says of another run, unless some of it is in the cache by then."""
        with self._lock:
            self._parts[self.tokens(prompt)[:-1].tobytes()] = parts

    def _prefill(self, context: Context, sequence: int, tokens: npt.NDArray[np.int32], position: int) -> None:
        ends = [] if position else [end for end in self._parts.get(tokens.tobytes(), ()) if 0 < end < len(tokens)]
        for begin, end in pairwise(sorted({0, *ends, len(tokens)})):
            for start in range(begin, end, context.n_batch):
                part = tokens[start : min(end, start + context.n_batch)]
                positions = np.arange(position + start, position + start + len(part))
                context.decode(part, positions, np.full(len(part), sequence), outputs=False)

    def _encode(self, context: Context, tokens: npt.NDArray[np.int32], rows: int, idle: bool) -> bool:
        """Let the encoder read the prompt for all rows, unless it has; False while rows need another prompt."""
        if self._encoded is not None and self._encoded[1] >= rows and np.array_equal(tokens, self._encoded[0]):
            return True
        if not idle:
            return False
        self._encoded = None
        context.encode(tokens, rows)
        self._encoded = tokens, rows
        return True

    def forget(self) -> None:
        """Drop the prompts that the cache holds."""
        self._check_free()
        with self._lock:
            self._encoded = None
            if self._cache is not None:
                self._cache.clear()

    def close(self) -> None:
        """Free the context and the model, after the run of another thread if there is one."""
        self._check_free()
        with self._lock:
            self._closed = True
            self._drop_context()
            self._head = None
            self.model.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The values that cross the seams, frozen.

Symbols: ``n`` rollouts of an iteration, ``T`` control steps (or generated tokens), ``d`` width of the
pre-logits, ``V`` size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError

FloatArray = npt.NDArray[np.float32]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[Message]
"""Plain text, which the model continues, or messages, which pass through its chat template."""

Want = Literal["kl", "laws", "logprobs", "prelogits"]
"""What a rollout reports only when asked, because it costs: see Rollouts."""

FinishReason = Literal["stop", "length", "incomplete", "paused", "interrupted"]
"""``stop``: end-of-generation token or stop string; ``length``: token limit; ``paused``: see ``Controls.pause``;
``interrupted``: cut short. Under a grammar ``stop`` and ``length`` are of texts of the grammar; ``incomplete``: the
token limit, a stop string, or a place where nothing is allowed came before it was complete."""


_COLDEST = 1e-30
"""A temperature that logits of 32 bits can be divided by."""


@dataclass(frozen=True)
class Sampling:
    """How a rollout picks its tokens from the (perturbed) logits.

    ``temperature == 0`` is greedy decoding. Otherwise the candidates are cut in llama.cpp's order (top-k,
    top-p, min-p, each of them on the untempered law) and the rest is sampled at ``temperature``.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or greater")
        if 0.0 < self.temperature < _COLDEST:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least {_COLDEST}")
        if self.top_k % 1 != 0:
            raise InputError(f"top_k is {self.top_k}; it must be a whole number")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (all tokens) or greater")
        if not (0.0 < self.top_p <= 1.0):
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not (0.0 <= self.min_p < 1.0):
            raise InputError(f"min_p is {self.min_p}; it must be in [0, 1)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = Sampling()


@dataclass(frozen=True)
class Step:
    """One decode step of m rollouts of a job, for a logits processor.

    ``rows``: which of the job's rollouts. ``tokens``: what each has so far. ``logits`` [m, V] (under the control) and
    ``prelogits`` [m, d] (before it; None unless asked for) are views that the next step overwrites.
    """

    rows: npt.NDArray[np.int64]
    tokens: Sequence[npt.NDArray[np.int32]]
    logits: FloatArray
    prelogits: FloatArray | None


class LogitsProcessor(Protocol):
    """Gives other logits to sample from, between two decode steps: what it takes, decoding waits for.

    What it gives a row may depend on that row alone, never on a clock nor on which rows come together.
    """

    @property
    def needs_prelogits(self) -> bool: ...

    def __call__(self, step: Step) -> FloatArray:
        """Logits [m, V]; -inf for a token that must not be drawn."""


@dataclass(frozen=True)
class Controls:
    """What n rollouts are decoded under: ``v[i, t]`` is added to the pre-logits of rollout i at step t.

    ``vectors`` is None (the base model), ``[n, T, d]`` (after step T the base model again) or, with
    ``held``, ``[n, 1, d]``: one vector for all steps. ``prefixes``: n arrays of tokens with which the responses begin
    (empty: with none); the last token of a longest response is never one of them. ``pause``: rollouts that have so many
    tokens, a prefix's among them, end for now ("paused"); what goes on from them is given them as a prefix. ``want``:
    what the rollouts report; steps of a prefix have no laws and no KL. ``shift`` [V]: what a control that all rows hold
    adds to the logits, for the laws' base probabilities. ``processor``: what tokens are sampled from are its logits.
    """

    n: int
    vectors: FloatArray | None = None
    held: bool = False
    sampling: Sampling = GREEDY
    prefixes: Sequence[npt.NDArray[np.int32]] | None = None
    pause: int | None = None
    want: frozenset[Want] = frozenset()
    shift: FloatArray | None = None
    processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"{self.n} rollouts were asked for; at least 1 is needed")
        v = self.vectors
        if v is not None and (v.ndim != 3 or v.shape[0] != self.n or v.shape[1] < 1):
            raise InputError(f"control vectors have the shape {v.shape}; expected ({self.n}, T, d)")
        if v is not None and self.held and v.shape[1] != 1:
            raise InputError(f"a held control is one vector a rollout, not {v.shape[1]}")
        if v is not None and not np.isfinite(v).all():
            raise InputError("control vectors hold values that are not finite")
        if self.prefixes is not None and len(self.prefixes) != self.n:
            raise InputError(f"{len(self.prefixes)} prefixes were given for {self.n} rollouts")
        if self.pause is not None and self.pause <= max((len(prefix) for prefix in self.prefixes or ()), default=0):
            raise InputError(f"rollouts cannot pause at {self.pause} tokens: they begin with as many")


@dataclass(frozen=True)
class Laws:
    """The laws from which n rollouts were sampled: one entry for each step and each token that could be drawn [K].

    A token could be drawn if its probability at temperature 1 is at least ``min_p`` of the likeliest one's (0.001 where
    there is no ``min_p``: what is below is left out, as are all but the 256 likeliest). With ``Controls.shift`` there
    are also the tokens that the base model could draw. Entries of a step lie together; both probabilities sum to 1 over
    a step of a row. Under a grammar both laws are of the tokens that it allows.
    """

    row: npt.NDArray[np.int32]  # of the rollout
    step: npt.NDArray[np.int32]
    token: npt.NDArray[np.int32]
    probability: FloatArray  # 0 for a token that the base model alone could draw
    base: FloatArray  # the base model's at the same temperature, among the step's entries

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Rollouts:
    """n responses to one prompt. Lists are in the order of the controls' rows.

    ``base_logprobs[i]`` has the shape ``[len(tokens[i])]``: log-probability (nats) of each token under the
    base model at temperature 1, without truncation; None when it was not asked for, as is ``kl``:
    sum over the tokens of KL(law sampled from || base law at temperature 1) in nats, for greedy decoding
    KL(softmax(W(z + v)) || softmax(W z)). The base law is not truncated, else it could be infinite: what a temperature,
    top-p, min-p or a grammar makes of the law counts, with a control and without one, so that all methods are measured
    from the same model.
    ``prelogits[i]`` has the shape ``[len(tokens[i]), d]`` (before the control). None when not asked for, as ``laws``.
    """

    tokens: Sequence[npt.NDArray[np.int32]]  # n arrays, with the end-of-generation token where it was drawn
    texts: Sequence[str]  # without it
    finish_reasons: Sequence[FinishReason]
    decode_seconds: float
    n_tokens: int  # decoded in all
    base_logprobs: Sequence[FloatArray] | None = None
    kl: FloatArray | None = None  # [n]
    prelogits: Sequence[FloatArray] | None = None
    laws: Laws | None = None

    def __len__(self) -> int:
        return len(self.texts)


class Head(Protocol):
    """The output head on the host, for methods that follow the score function."""

    @property
    def weight(self) -> FloatArray:
        """The output matrix W [V, d]."""

    def take(self, tokens: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Rows of the output matrix [k, d]."""

    def shift(self, u: FloatArray) -> FloatArray:
        """What u [d] adds to the logits [V]; of soft-capped ones to first order."""

    @property
    def gain(self) -> float:
        """What logits are multiplied with."""

    def logits(self, prelogits: FloatArray) -> FloatArray:
        """Base logits [N, V] of pre-logits [N, d]."""

    def score(self, prelogits: FloatArray, tokens: npt.NDArray[np.int32], temperature: float) -> FloatArray:
        """Gradient of ``log p(token)`` by the pre-logits, ``W^T (e_token - p) / temperature`` [N, d].

        ``prelogits`` [N, d] with their control, ``tokens`` [N]; p is the law at the temperature, without truncation.
        """

    def law(self, prelogits: FloatArray, temperature: float) -> FloatArray:
        """Probabilities [N, V] at the temperature, without truncation."""

    def fisher(self, vectors: FloatArray, law: FloatArray, temperature: float) -> FloatArray:
        """``F u`` [N, d] of vectors u [N, d] under laws p [N, V]: ``W^T (p * y - p (p . y))``, ``y = W u``."""


@dataclass(frozen=True)
class Candidate:
    """A scored response. ``iteration`` and ``row`` count from 1; ``kl`` is in nats, None if not computed."""

    text: str
    reward: float
    iteration: int
    row: int = 1
    n_tokens: int = 0
    n_given: int = 0  # of them were taken over from an earlier rollout
    finish_reason: FinishReason = "stop"
    kl: float | None = None
    logprob: float | None = None  # sum of base_logprobs, None if not computed
    parts: Mapping[str, float] = field(default_factory=dict)  # raw scores of a composite reward's parts
    judge: float | None = None  # what the judge gave, None if it was not asked
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), compare=False, repr=False)


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer: its bytes, its log-probability in nats, and both of the likeliest tokens at its place."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Baseline:
    """The unaligned greedy answer. It is not counted in the budget."""

    text: str
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    judge: float | None = None


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of a composite reward's parts over responses of the base model."""

    rollouts: int  # they are not counted in the budget
    moments: Mapping[str, tuple[float, float]]  # by the name of the part


@dataclass(frozen=True)
class IterationStats:
    """What one iteration did. Rewards are over its finite rewards, ``best_so_far`` over all iterations."""

    iteration: int  # counts from 1
    n: int  # rollouts scored
    best: float
    mean: float
    std: float
    best_so_far: float
    n_tokens: int
    seconds: float  # since the iteration before; rewards are computed while rows decode, so it is not their sum
    decode_seconds: float
    reward_seconds: float
    update_seconds: float
    ess: float | None = None  # effective sample size of the weights, 1 to n
    control_norm: float | None = None  # |U|_2 after the update
    lambda_: float | None = None
    kl: float | None = None  # mean over the rollouts, and of choosing among unfinished ones, nats
    n_nonfinite: int = 0  # and those that are not complete under a grammar
    note: str | None = None  # what a guard against too much steering did
    n_scored: int = 0  # texts that the reward read, unfinished ones among them


@dataclass(frozen=True)
class ControllerInfo:
    """What a controller says of its last update; a field is None where it has no meaning."""

    ess: float | None = None
    control_norm: float | None = None
    lambda_: float | None = None
    kl: float | None = None  # of the law that the iteration was sampled from, nats, mean over its rollouts
    selection_kl: float = 0.0  # the part of it that choosing among unfinished rollouts has
    note: str | None = None  # what a guard did, in a sentence
    n_scored: int = 0  # texts that the method itself had the reward read
    reward_seconds: float = 0.0  # for that


@dataclass(frozen=True)
class Progress:
    """A report of a running search, given to ``on_progress``: after every decode step and every iteration.

    ``settled``: what the answer begins with for sure, as all rollouts do that may still win (see docs/score.md).
    """

    iteration: int  # the one that runs, from 1
    iterations: int  # planned
    rollouts_done: int
    budget: int
    step: int  # decode steps of this iteration so far, as many as its longest rollout has tokens
    rows_active: int
    n_tokens: int  # decoded since the start
    seconds: float
    best: Candidate | None = None
    stats: IterationStats | None = None  # of the iteration that just ended, else None
    candidates: Sequence[Candidate] = ()  # of that iteration
    unfinished: Candidate | None = None  # the best at the last pause of this iteration
    settled: str = ""


@dataclass(frozen=True)
class Result:
    """An aligned answer and how it was found. ``candidates`` are all scored rollouts: the answer's, then best first."""

    answer: str
    reward: float
    method: str
    budget: int
    seed: int
    candidates: Sequence[Candidate]
    iterations: Sequence[IterationStats]
    status: str  # one of RESULT_STATUS's keys
    seconds: float
    n_tokens: int
    baseline: Baseline | None = None
    model: str = ""
    reward_model: str = ""
    judge_model: str = ""
    judge: float | None = None  # the judge's score of the answer; None without one, or where it failed
    calibration: Calibration | None = None  # of a composite reward, if it was measured for this search
    control: FloatArray | None = field(default=None, compare=False)  # [d], held at all steps in the end, if one is
    control_nats: float | None = field(default=None, compare=False)  # of a response under it, if that is known
    versions: Mapping[str, str] = field(default_factory=dict)
    ended_at: int | None = None  # reports to on_progress without ``stats`` until then, if cut short and known
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False)  # prompt and options, for Aligner.trace
    extra: Mapping[str, Any] = field(default_factory=dict)

    def distinct(self, n: int) -> list[Candidate]:
        """The answer and the best n - 1 others that say something else; fewer where there are no more."""
        found: dict[str, Candidate] = {}
        for candidate in self.candidates:
            found.setdefault(candidate.text, candidate)
            if len(found) == n:
                break
        return list(found.values())

    @property
    def rollouts(self) -> int:
        """Rollouts that were scored."""
        return len(self.candidates)


@dataclass(frozen=True)
class Limits:
    """What ends one search before its budget of rollouts is spent; None: nothing does.

    ``target_reward``: once a rollout has it. ``patience``: after so many iterations in a row without a better rollout.
    ``tokens``: as many rollouts are decoded as will fit, judged by the mean length of those before.
    """

    target_reward: float | None = None
    patience: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.target_reward is not None and not math.isfinite(self.target_reward):
            raise InputError(f"the target reward is {self.target_reward}; it must be a finite number")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"the patience is {self.patience} iterations; it must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"the budget is {self.tokens} tokens; it must be at least 1")


RESULT_STATUS = {
    "complete": "The whole budget was spent.",
    "incomplete": "No answer was complete under the grammar within the limit of tokens: this one breaks off.",
    "target": "The target reward was reached.",
    "patience": "No better answer was found in as many iterations as were allowed.",
    "token-limit": "The budget of tokens was spent.",
    "interrupted": "Interrupted: this is the best answer that was found so far.",
    "time-limit": "The time limit was reached: this is the best answer that was found so far.",
}
"""Every way in which a run ends, with the sentence that a person reads."""

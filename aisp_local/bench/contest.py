"""Alignment methods against each other; runs are kept as they come, so that a contest can be stopped and gone on with.

Each method but ``score``, which has one setting for all, is tuned over as many settings as the others, on prompts of
their own at the middle budget, best-of-n in hindsight on the evaluation prompts; a published setting, where there is
one, is a row of its own. All see the same prompts, seeds and numbers of rollouts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local import __version__, controllers
from aisp_local.api import Aligner
from aisp_local.engine import LlamaEngine
from aisp_local.errors import DecodeError, InputError
from aisp_local.jsonl import append, whole_lines
from aisp_local.rewards.base import call
from aisp_local.seeds import RowSeeds
from aisp_local.types import Candidate, Controls, FloatArray, Message, Prompt, Result

Settings = Mapping[str, float]
Say = Callable[[str], None]

_EXACT = 2  # iterations, at the end of which the KL is computed exactly
_WINDOW = 16  # tokens
_GROUP = 4  # prompts in one batch; what is kept at a time
_BEGIN, _NONE = b'{"pair": ', "is no run of a contest; give another file"  # of every line of runs; of another


@dataclass(frozen=True)
class Entry:
    """A method that takes part. ``grid``: the settings that are tried in tuning, none for one that stays as it is.

    ``n``: rollouts an iteration, None for all of them in one. ``most``: rollouts that it gets at most, for one that
    spends the time of many on each. ``hindsight``: all settings play, and the best on the evaluation prompts counts.
    """

    label: str
    method: str
    n: int | None = 16
    most: int | None = None
    settings: Settings = field(default_factory=dict)
    grid: Sequence[Settings] = ()
    hindsight: bool = False


def _grid(**values: Sequence[float]) -> list[Settings]:
    """One setting for each value of the one knob."""
    ((knob, tried),) = values.items()
    return [{knob: value} for value in tried]


_ESS = _grid(ess=(0.05, 0.1, 0.15, 0.25, 0.4, 0.6))
_SIGMA = _grid(sigma=(0.5, 0.7, 1.0, 1.4, 2.0, 2.8))
_WEIGHT = _grid(weight=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0))
_HELD = {"bases": 1, "per_step": 0.5}
PUBLISHED = {"sigma": 0.5**0.5, "lambda_": 0.3, "alpha": 0.999}

ENTRIES = (
    Entry("score", "score", n=32),
    Entry("score, strength 0.2", "score", n=32, settings={"strength": 0.2}),
    Entry("score, strength 0.45", "score", n=32, settings={"strength": 0.45}),
    Entry("score, temperature 0.7", "score", n=32, settings={"temperature": 0.7}),
    Entry("score, temperature 0.7, strength 0.55", "score", n=32, settings={"temperature": 0.7, "strength": 0.55}),
    Entry("score, block by block", "score", n=32, settings={"commit": 1}),
    Entry("score, streamed", "score", n=None, settings={"commit": 1}),
    Entry("score, nothing selected", "score", n=32, settings={"selection": 0.0}),
    Entry("smc", "smc", n=32, grid=_ESS),
    Entry("qalign", "qalign", grid=_ESS),
    Entry(
        "best-of-n",
        "best-of-n",
        grid=[
            {"temperature": 0.6},
            {"temperature": 0.8},
            {"temperature": 1.0},
            {"temperature": 1.0, "min_p": 0.05},
            {"temperature": 1.2, "min_p": 0.1},
            {"temperature": 1.5, "min_p": 0.1},
        ],
        hindsight=True,  # others are measured by it, and tuning on a few prompts is a matter of luck
    ),
    Entry("soft-best-of-n", "soft-best-of-n", grid=_grid(lambda_=(0.03, 0.1, 0.2, 0.3, 0.5, 1.0))),
    Entry("aisp", "aisp", grid=_SIGMA),
    Entry("aisp, published", "aisp", n=32, settings=PUBLISHED),
    Entry("aisp-static", "aisp-static", grid=_SIGMA),
    Entry("aisp-held", "aisp-held", grid=_SIGMA),
    Entry("held and per-step noise", "aisp-bases", settings=_HELD, grid=_SIGMA),
    Entry("aisp-bases", "aisp-bases", settings={"bases": 4}, grid=_SIGMA),
    Entry("cem", "cem", grid=_SIGMA),
    Entry("args", "args", n=2, most=2, grid=_WEIGHT),
    Entry("args, greedy", "args", n=1, most=1, settings={"temperature": 0.0}, grid=_WEIGHT),
    Entry("re-control", "re-control", n=16, grid=_grid(rate=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0))),
    Entry(
        "misvo",
        "misvo",
        grid=[{"eta": eta, **warm} for warm in ({}, {"temperature": 1.0}) for eta in (1.0, 3.0, 10.0)],
    ),
    Entry("misvo, published", "misvo", settings={"eta": 0.1, "temperature": 1.0}),
)


@dataclass(frozen=True)
class Pair:
    """A model, what rewards its answers, prompts for both, and another reward that no search sees."""

    name: str
    model: str
    reward: str
    tuning: Sequence[str]
    evaluation: Sequence[str]
    max_tokens: int = 96
    judge: str | None = None


@dataclass(frozen=True)
class Run:
    """What is kept of one search. ``rewards`` and ``texts`` are in the order of the rollouts, ``clock`` has the seconds
    since the start after each iteration. ``setup``: a hash of the model, the rewards and the limit of tokens. ``kl``:
    as the method counts it, in the last iteration, nats; ``exact_kl``: as the engine computes it against the whole base
    law at temperature 1, in the second iteration (where there is but one, in that), the selection's added. ``logprob``:
    of the answer's tokens under the base model; ``low_logprob``: the mean of the least likely 16 in a row. ``judged``:
    what the judge gives the answer of the first so many rollouts, ``chosen``: its reward, of a method whose answer is
    not the best of them.
    """

    pair: str
    label: str
    prompt: str
    seed: int
    budget: int
    n: int
    settings: Settings
    rewards: list[float]
    answer: str
    seconds: float
    n_tokens: int
    kl: float | None = None
    exact_kl: float | None = None
    logprob: float | None = None
    answer_tokens: int = 0
    low_logprob: float | None = None
    n_scored: int = 0  # texts that the reward read
    clock: list[float] = field(default_factory=list)
    judged: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    setup: str = ""


def prompt_sets() -> dict[str, dict[str, list[str]]]:
    """Prompts by what they are about ("stories", "dialogs"), each for "tuning" and "evaluation"."""
    text = resources.files("aisp_local.bench").joinpath("prompts.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


class Store:
    """Runs in a file of JSON lines, each line whole; a run that is there already is not made again.

    Raises InputError for a file of something else, and where runs cannot be kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Run] = {}
        for number, line in enumerate(whole_lines(path, _BEGIN, _NONE), 1):
            try:
                run = Run(**json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number} {_NONE}") from error
            self._found[_key(run)] = run

    def runs(self) -> list[Run]:
        """All of them."""
        return list(self._found.values())

    def get(self, run: Run) -> Run | None:
        """The kept run with the same question."""
        return self._found.get(_key(run))

    def add(self, runs: Sequence[Run]) -> None:
        append(self._path, "".join(json.dumps(asdict(run)) + "\n" for run in runs).encode())
        self._found |= {_key(run): run for run in runs}


def _key(run: Run) -> str:
    asked = [run.setup, run.pair, run.label, run.prompt, run.seed, run.budget, run.n, sorted(run.settings.items())]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def setup(aligner: Aligner, max_tokens: int) -> str:
    """A hash of what runs of the same question may differ in: the model, the rewards, the limit, the version."""
    origins, judge = aligner.origins, aligner.judge
    told = [
        __version__,
        aligner.engine.fingerprint,
        [aligner.reward.name, origins.reward.fingerprint],
        None if judge is None else [judge.name, origins.judge.fingerprint],
        max_tokens,
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


class Contest:
    """The contest of one pair. ``more``: options by method that no run is told apart by, such as a file."""

    def __init__(
        self,
        pair: Pair,
        aligner: Aligner,
        store: Store,
        *,
        budgets: Sequence[int],
        seed: int,
        say: Say,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.pair, self.aligner, self._store, self._more = pair, aligner, store, more or {}
        self.budgets, self._seed, self._say = sorted(budgets), seed, say
        self._setup = setup(aligner, pair.max_tokens)

    def play(self, entries: Sequence[Entry], exact_kl_prompts: int) -> dict[str, list[Run]]:
        """The runs on the evaluation prompts by the entries' labels."""
        played: dict[str, list[Run]] = {}
        for entry in entries:
            most = -np.inf
            # A setting that was best over few iterations may blow up over many: then the next one.
            for tuned in entry.grid if entry.hindsight else self._tune(entry):
                settings = {**entry.settings, **tuned}
                what = f"{self.pair.name}: {entry.label} {_shown(settings)}"
                try:
                    runs = list(self._runs(entry, settings, self.pair.evaluation, max(self.budgets), exact_kl_prompts))
                except DecodeError as error:
                    self._say(f"{what}: {error}")
                    continue
                mean = _mean(best_at(runs, max(self.budgets)))
                self._say(f"{what}: mean best reward {mean:.3f}")
                if mean > most:
                    played[entry.label], most = runs, mean
                if not entry.hindsight:
                    break
        return played

    def _tune(self, entry: Entry) -> list[Settings]:
        """The settings by their mean best reward on the tuning prompts, the highest first."""
        means, budget = [], self.budgets[(len(self.budgets) - 1) // 2]
        for settings in entry.grid:
            what = f"{self.pair.name}: tuning {entry.label}, {_shown(settings)}"
            try:
                runs = list(self._runs(entry, {**entry.settings, **settings}, self.pair.tuning, budget, 0))
            except DecodeError as error:
                self._say(f"{what}: {error}")
                means.append(-np.inf)
                continue
            means.append(_mean(best_at(runs, budget)))
            self._say(f"{what}: {means[-1]:.3f}")
        order = sorted(range(len(means)), key=lambda i: -means[i])
        return [entry.grid[i] for i in order if np.isfinite(means[i])] if entry.grid else [{}]

    def _runs(
        self, entry: Entry, settings: Settings, prompts: Sequence[str], budget: int, exact_kl_prompts: int
    ) -> Iterator[Run]:
        budget = min(budget, entry.most or budget)
        n = budget if entry.n is None else entry.n
        for start in range(0, len(prompts), _GROUP):
            group = prompts[start : start + _GROUP]
            asked = [
                Run(
                    self.pair.name, entry.label, text, self._seed + start, budget, n, dict(settings),
                    [], "", 0.0, 0, setup=self._setup,
                )
                for text in group
            ]  # fmt: skip
            found = [self._store.get(run) for run in asked]
            if any(run is None for run in found):
                made = self._search(entry, settings, group, asked, exact_kl_prompts - start)
                self._store.add(made)
                found = list(made)
            yield from (run for run in found if run is not None)

    def _search(
        self, entry: Entry, settings: Settings, group: Sequence[str], asked: Sequence[Run], exact_kl_prompts: int
    ) -> list[Run]:
        messages: list[list[Message]] = [[{"role": "user", "content": text}] for text in group]
        common: dict[str, Any] = {
            "method": entry.method,
            "n": asked[0].n,
            "max_tokens": self.pair.max_tokens,
            "seed": asked[0].seed,
            "at_once": 1 if entry.n is None else None,  # together they would have no rows to themselves
            **settings,
            **self._more.get(entry.method, {}),
        }
        began = time.perf_counter()
        results = self.aligner.generate_many(messages, budget=asked[0].budget, **common)
        seconds = (time.perf_counter() - began) / len(group)
        exact: list[float | None] = [None] * len(group)
        if exact_kl_prompts > 0:
            # Again, since the second output product would be in the seconds; the control is at its length by then.
            budget = min(asked[0].budget, _EXACT * asked[0].n)
            again = self.aligner.generate_many(messages[:exact_kl_prompts], budget=budget, kl=True, **common)
            exact[: len(again)] = [_last_kl(result) if isinstance(result, Result) else None for result in again]
        runs = []
        for i, (run, prompt, result, kl) in enumerate(zip(asked, messages, results, exact, strict=True)):
            if not isinstance(result, Result):
                raise result
            rollouts = sorted(result.candidates, key=lambda c: (c.iteration, c.row))
            answers, chosen = self._answers(entry.method, run, i, rollouts)
            engine = self.aligner.engine
            logprobs = answer_logprobs(engine, prompt, result.answer) if isinstance(engine, LlamaEngine) else None
            runs.append(
                Run(
                    **{
                        **asdict(run),
                        "rewards": [c.reward for c in rollouts],
                        "answer": result.answer,
                        "seconds": seconds,
                        "n_tokens": result.n_tokens,
                        "kl": result.iterations[-1].kl,
                        "exact_kl": kl,
                        "logprob": None if logprobs is None else float(logprobs.sum()),
                        "low_logprob": None if logprobs is None else _lowest(logprobs),
                        "answer_tokens": 0 if logprobs is None else len(logprobs),
                        "n_scored": sum(s.n_scored for s in result.iterations),
                        "clock": (np.cumsum([s.seconds for s in result.iterations]) / len(group)).tolist(),
                        "judged": self._judged(prompt, answers),
                        "chosen": {str(budget): c.reward for budget, c in answers.items()} if chosen else {},
                        "texts": [c.text for c in rollouts],
                    }
                )
            )
        return runs

    def _answers(
        self, method: str, run: Run, prompt_index: int, rollouts: Sequence[Candidate]
    ) -> tuple[dict[int, Candidate], bool]:
        """What a search of each budget would have answered; whether the method chooses it, or it is the best."""
        choosing: Any = None
        if hasattr(controllers.builder(method), "choose"):
            common: dict[str, Any] = {"seed": run.seed, "prompt_index": prompt_index, **run.settings}
            choosing = controllers.create(method, d=1, max_tokens=1, **common)
        found = {}
        for budget in self.budgets:
            rewards = np.array([c.reward for c in rollouts[:budget]])
            best = int(np.where(np.isfinite(rewards), rewards, -np.inf).argmax())
            found[budget] = rollouts[best if choosing is None else choosing.choose(rewards)]
        return found, choosing is not None

    def _judged(self, prompt: list[Message], answers: Mapping[int, Candidate]) -> dict[str, float]:
        judge = self.aligner.judge
        if judge is None:
            return {}
        scores = call(judge.name, judge.score, prompt, [answer.text for answer in answers.values()])
        return dict(zip(map(str, answers), scores.tolist(), strict=True))


def best_at(runs: Sequence[Run], budget: int) -> npt.NDArray[np.float64]:
    """Reward of the answer among each run's first ``budget`` rollouts; nan where one iteration has more."""
    return np.array(
        [
            run.chosen.get(str(budget), best_so_far(run)[:budget][-1]) if min(run.n, run.budget) <= budget else np.nan
            for run in runs
        ]
    )


def best_so_far(run: Run) -> npt.NDArray[np.float64]:
    """The best reward [rollouts] up to each rollout; nan until one is finite."""
    rewards = np.array(run.rewards, np.float64)
    return np.fmax.accumulate(np.where(np.isfinite(rewards), rewards, np.nan))


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Without those that are not finite; -inf of none."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else -np.inf


def answer_logprobs(engine: LlamaEngine, prompt: Prompt, answer: str) -> FloatArray | None:
    """Log-probabilities of an answer's tokens under the engine's model at temperature 1; None for an empty one."""
    tokens = engine.model.tokenize(answer, add_special=False, parse_special=False)
    if not len(tokens):
        return None
    rollouts = engine.rollout(
        prompt,
        Controls(n=1, prefixes=[tokens]),
        max_tokens=len(tokens) + 1,
        seeds=RowSeeds(0),
        want=frozenset({"logprobs"}),
    )
    assert rollouts.base_logprobs is not None
    return rollouts.base_logprobs[0][: len(tokens)]


def _lowest(logprobs: FloatArray) -> float:
    """The least mean of so many in a row."""
    size = min(_WINDOW, len(logprobs))
    return float(np.convolve(logprobs, np.full(size, 1 / size), "valid").min())


def _last_kl(result: Result) -> float | None:
    """Of the law that the last iteration was sampled from."""
    return result.iterations[-1].kl


def _shown(settings: Settings) -> str:
    return ", ".join(f"{name.rstrip('_')} {value:.3g}" for name, value in settings.items()) or "as it is"

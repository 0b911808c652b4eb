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
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import aisp_local
from aisp_local import controllers
from aisp_local.api import Aligner
from aisp_local.bench.machine import describe
from aisp_local.engine import LlamaEngine
from aisp_local.errors import AispError, DecodeError, InputError
from aisp_local.jsonl import append, whole_lines
from aisp_local.rewards.base import call
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray, Message, Prompt, Result

Settings = Mapping[str, float]
Say = Callable[[str], None]

EXACT = 2  # the iteration whose law the exact KL is of, besides the last
_WINDOW = 16  # tokens
_GROUP = 4  # prompts in one batch; what is kept at a time
_CHAINED = ("qalign",)  # methods whose iterations go on from earlier ones
_NO_MATTER = ("bench", "cli", "server")  # parts of the package from which no run follows
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
    since the start after each iteration. ``setup``: a hash of what else the run follows from (see ``setup``). ``kl``:
    as the method counts it, in the last iteration, nats; ``exact_kl`` and ``late_kl``: as the engine computes it
    against the whole base law at temperature 1, in the second iteration (where there is but one, in that) and in the
    last, the selection's added; None for a method whose iterations go on from earlier ones, of which it is but a part.
    ``logprob``: of the answer's tokens under the base model; ``low_logprob``: the mean of the least likely 16 in a row.
    ``judged``: what the judge gives the answer of the first so many rollouts, ``chosen``: its reward, of a method whose
    answer is not the best of them.
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
    late_kl: float | None = None
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


class StoreError(AispError):
    """Runs cannot be kept."""


class Store:
    """Runs in a file of JSON lines, each line whole; a run that is there already is not made again.

    Raises InputError for a file of something else or that cannot be written, StoreError where that fails later.
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
        append(path, b"")  # what cannot be written is said before anything is played

    def runs(self) -> list[Run]:
        """All of them."""
        return list(self._found.values())

    def get(self, run: Run) -> Run | None:
        """The kept run with the same question."""
        return self._found.get(_key(run))

    def add(self, runs: Sequence[Run]) -> None:
        try:
            append(self._path, "".join(json.dumps(asdict(run)) + "\n" for run in runs).encode())
        except InputError as error:  # of which a contest leaves rows out
            raise StoreError(str(error)) from error
        self._found |= {_key(run): run for run in runs}


def _key(run: Run) -> str:
    asked = [run.setup, run.pair, run.label, run.prompt, run.seed, run.budget, run.n, sorted(run.settings.items())]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def setup(aligner: Aligner, max_tokens: int) -> str:
    """A hash of what runs of the same question may differ in: the model, the rewards, the limit, the code, the machine
    and its threads."""
    origins, judge = aligner.origins, aligner.judge
    told = [
        aligner.engine.fingerprint,
        [aligner.reward.name, origins.reward.fingerprint],
        None if judge is None else [judge.name, origins.judge.fingerprint],
        max_tokens,
        _code(),
        describe(),
        aligner.engine.settings["threads"] if isinstance(aligner.engine, LlamaEngine) else None,
    ]
    return _digest(told)


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@cache
def _code() -> str:
    """A hash of the package's code, but for that of its interfaces and that which only looks at runs."""
    root, hashed = Path(aisp_local.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in _NO_MATTER:
            hashed.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


class Contest:
    """The contest of one pair. ``more``: options by method that are no numbers, such as a file, told by its name."""

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
        """The runs on the evaluation prompts by the entries' labels.

        A row that cannot be played with this model or reward is left out, but for the one that others are measured by.
        """
        played: dict[str, list[Run]] = {}
        for entry in entries:
            try:
                runs = self._with_kl(entry, self._played(entry), exact_kl_prompts)
            except InputError as error:
                if entry.hindsight:
                    raise
                self._say(f"{self.pair.name}: {entry.label} is left out; {error}")
                continue
            if runs:
                played[entry.label] = runs
        return played

    def _played(self, entry: Entry) -> list[Run]:
        """One row's, with the settings that count; none where all of them blow up."""
        played, most = list[Run](), -np.inf
        # A setting that was best over few iterations may blow up over many: then the next one.
        for tuned in entry.grid if entry.hindsight else self._tune(entry):
            settings = {**entry.settings, **tuned}
            what = f"{self.pair.name}: {entry.label} {_shown(settings)}"
            try:
                runs = list(self._runs(entry, settings, self.pair.evaluation, max(self.budgets)))
            except DecodeError as error:
                self._say(f"{what}: {error}")
                continue
            mean = _mean(best_at(runs, max(self.budgets)))
            self._say(f"{what}: mean best reward {mean:.3f}")
            if mean > most:
                played, most = runs, mean
            if not entry.hindsight:
                break
        return played

    def _tune(self, entry: Entry) -> list[Settings]:
        """The settings by their mean best reward on the tuning prompts, the highest first."""
        means, budget = [], self.budgets[(len(self.budgets) - 1) // 2]
        for settings in entry.grid:
            what = f"{self.pair.name}: tuning {entry.label}, {_shown(settings)}"
            try:
                runs = list(self._runs(entry, {**entry.settings, **settings}, self.pair.tuning, budget))
            except DecodeError as error:
                self._say(f"{what}: {error}")
                means.append(-np.inf)
                continue
            means.append(_mean(best_at(runs, budget)))
            self._say(f"{what}: {means[-1]:.3f}")
        order = sorted(range(len(means)), key=lambda i: -means[i])
        return [entry.grid[i] for i in order if np.isfinite(means[i])] if entry.grid else [{}]

    def _runs(self, entry: Entry, settings: Settings, prompts: Sequence[str], budget: int) -> Iterator[Run]:
        budget = min(budget, entry.most or budget)
        n = budget if entry.n is None else entry.n
        made_for = self._setup
        if entry.method in self._more:
            made_for = _digest([made_for, sorted((k, Path(v).name) for k, v in self._more[entry.method].items())])
        for start in range(0, len(prompts), _GROUP):
            group = prompts[start : start + _GROUP]
            asked = [
                Run(
                    self.pair.name, entry.label, text, self._seed + start, budget, n, dict(settings),
                    [], "", 0.0, 0, setup=made_for,
                )
                for text in group
            ]  # fmt: skip
            found = [run for run in map(self._store.get, asked) if run is not None]
            missing = len(found) < len(group)
            if missing:
                found = self._search(entry, asked)
            # Those that were kept may be of other budgets than are asked for now.
            found = [self._answered(entry.method, run, i) for i, run in enumerate(found)]
            if missing:
                self._store.add(found)
            yield from found

    def _with_kl(self, entry: Entry, runs: Sequence[Run], prompts: int) -> list[Run]:
        """The first so many runs searched again for their exact KL, whose second output product would be in the times
        of all."""
        found = list(runs)
        for start in range(0, 0 if entry.method in _CHAINED else min(prompts, len(found)), _GROUP):
            group = found[start : min(start + _GROUP, prompts)]
            if all(run.late_kl is not None for run in group):
                continue
            try:
                results = self._answer_all(entry, group, kl=True)
            except DecodeError as error:
                self._say(f"{self.pair.name}: {entry.label} has no exact KL: {error}")
                break
            for i, (run, result) in enumerate(zip(group, results, strict=True), start):
                early = result.iterations[min(EXACT, len(result.iterations)) - 1]
                found[i] = replace(run, exact_kl=early.kl, late_kl=result.iterations[-1].kl)
            self._store.add(found[start : start + len(group)])
        return found

    def _answer_all(self, entry: Entry, asked: Sequence[Run], *, kl: bool = False) -> list[Result]:
        messages: list[list[Message]] = [[{"role": "user", "content": run.prompt}] for run in asked]
        common: dict[str, Any] = {
            "method": entry.method,
            "budget": asked[0].budget,
            "n": asked[0].n,
            "max_tokens": self.pair.max_tokens,
            "seed": asked[0].seed,
            "at_once": _at_once(entry),
            **asked[0].settings,
            **self._more.get(entry.method, {}),
        }
        return list(map(whole, self.aligner.generate_many(messages, kl=kl, **common)))

    def _search(self, entry: Entry, asked: Sequence[Run]) -> list[Run]:
        began = time.perf_counter()
        results = self._answer_all(entry, asked)
        seconds = (time.perf_counter() - began) / len(asked)
        clocks, begun = [], 0.0
        for result in results:
            at = np.cumsum([s.seconds for s in result.iterations])
            # Together they share the time; one after the other each waits for those before it.
            clocks.append(at / len(asked) if _at_once(entry) is None else at - begun)
            begun = at[-1]
        runs = []
        for run, result, clock in zip(asked, results, clocks, strict=True):
            rollouts = sorted(result.candidates, key=lambda c: (c.iteration, c.row))
            engine = self.aligner.engine
            prompt: list[Message] = [{"role": "user", "content": run.prompt}]
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
                        "logprob": None if logprobs is None else float(logprobs.sum()),
                        "low_logprob": None if logprobs is None else _lowest(logprobs),
                        "answer_tokens": 0 if logprobs is None else len(logprobs),
                        "n_scored": sum(s.n_scored for s in result.iterations),
                        "clock": clock.tolist(),
                        "texts": [c.text for c in rollouts],
                    }
                )
            )
        return runs

    def _answered(self, method: str, run: Run, prompt_index: int) -> Run:
        """With what it would have answered after each budget, of a method that chooses it, and what the judge says."""
        choosing: Any = None
        if hasattr(controllers.builder(method), "choose"):
            common: dict[str, Any] = {"seed": run.seed, "prompt_index": prompt_index, **run.settings}
            choosing = controllers.create(method, d=1, max_tokens=1, **common)
        answers: dict[str, int] = {}
        for budget in map(str, self.budgets):
            rewards = np.array(run.rewards[: int(budget)], np.float64)
            best = int(np.where(np.isfinite(rewards), rewards, -np.inf).argmax())
            answers[budget] = best if choosing is None else choosing.choose(rewards)
        chosen = {} if choosing is None else {budget: run.rewards[i] for budget, i in answers.items()}
        judge, judged = self.aligner.judge, dict(run.judged)
        missing = [budget for budget in answers if budget not in judged]
        if judge is not None and missing:
            prompt: list[Message] = [{"role": "user", "content": run.prompt}]
            scores = call(judge.name, judge.score, prompt, [run.texts[answers[budget]] for budget in missing])
            judged |= zip(missing, scores.tolist(), strict=True)
        return replace(run, judged=judged, chosen=chosen)


def _at_once(entry: Entry) -> int | None:
    """Prompts in one batch: of one iteration of all rollouts, together they would have no rows to themselves."""
    return 1 if entry.n is None else None


def whole(result: Result | BaseException) -> Result:
    """What was asked for: an interrupt ends the whole contest, and what there is of a search then is not kept.

    Raises what a search ended with, and KeyboardInterrupt.
    """
    if not isinstance(result, Result):
        raise result
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return result


def best_at(runs: Sequence[Run], budget: int) -> npt.NDArray[np.float64]:
    """Reward of the answer among each run's first ``budget`` rollouts, in whole iterations; nan where one has more."""
    return np.array([_at(run, budget) for run in runs])


def _at(run: Run, budget: int) -> float:
    ended = len(run.rewards) if budget >= len(run.rewards) else budget // run.n * run.n
    return float(run.chosen.get(str(budget), best_so_far(run)[ended - 1])) if ended else float("nan")


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


def _shown(settings: Settings) -> str:
    return ", ".join(f"{name.rstrip('_')} {value:.3g}" for name, value in settings.items()) or "as it is"

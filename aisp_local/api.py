"""The Python interface: load a model and a reward once, ask for aligned answers."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aisp_local import controllers, shipped
from aisp_local.background import Work, aevents, events
from aisp_local.defaults import (
    DEFAULT_EFFORT,
    DEFAULT_MAX_TOKENS,
    DEFAULT_METHOD,
    DEFAULT_SEED,
    budget_of,
    check_search,
    rollouts_an_iteration,
)
from aisp_local.engine import Engine, LlamaEngine, SharedEngine
from aisp_local.engine.base import as_strings
from aisp_local.engine.prompts import check_prompts
from aisp_local.errors import AispError, DecodeError, InputError
from aisp_local.files import check_output
from aisp_local.grammar import Grammar
from aisp_local.likelihood import token_logprobs
from aisp_local.loop import Task, search_many
from aisp_local.measure import calibrated, calibration_of, judged
from aisp_local.models import find_model
from aisp_local.native import Lora, check_model_file, versions
from aisp_local.origins import SHIPPED, Origins, about
from aisp_local.rewards import Reward, load_reward
from aisp_local.rewards.base import Calibrates, call_parts, call_prefixes
from aisp_local.rewards.identity import Origin
from aisp_local.rewards.interruption import AbandonedError, Interruption, interruptible
from aisp_local.seeds import RowSeeds
from aisp_local.steering import Steering
from aisp_local.timeline import Timeline, recording
from aisp_local.trace import Trace
from aisp_local.types import (
    Baseline,
    Calibration,
    Candidate,
    Controls,
    Limits,
    Message,
    Progress,
    Prompt,
    Result,
    TokenLogprob,
    Want,
)


class Aligner:
    """A frozen language model and a reward that aligns it while it answers.

    ``judge``: another reward, whose score of the answer is shown and never optimised.

    >>> from aisp_local import Aligner
    >>> aligner = Aligner.load()  # the shipped models
    >>> aligner.chat([{"role": "user", "content": "Tell me a story about a fox."}]).answer
    """

    def __init__(self, engine: Engine, reward: Reward, *, judge: Reward | None = None, model_name: str = "") -> None:
        self.engine = engine
        self.reward = reward
        self.judge = judge
        self.model_name = model_name
        self.origins = Origins()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        reward: str | os.PathLike[str] | Reward | Callable[..., Any] | None = None,
        *,
        judge: str | os.PathLike[str] | Reward | Callable[..., Any] | None = None,
        n_gpu_layers: int | None = None,
        threads: int | None = None,
        loras: Sequence[str | os.PathLike[str] | Lora] = (),
        together: int = 1,
    ) -> Aligner:
        """Load a GGUF ``model``, by path or name (``aisp-local models list``), and a ``reward``: a folder, a TOML file,
        the name of a recipe, a Reward, or ``(prompt, responses) -> scores``. A ``judge`` is any of these; without one,
        the reward's own, if it names one.

        What is left out is the shipped one. ``n_gpu_layers``: layers on the GPU, as in llama.cpp. ``loras``: adapters,
        GGUF files, which make the model that is aligned: nats are measured from the model with them. ``together``:
        so many calls from different threads decode in one batch (see engine.shared); else they queue.
        Raises ModelError, RewardError, BindingError.
        """
        path = shipped.model() if model is None else find_model(model)
        # What is checked sooner comes first: a large model is loaded last.
        check_model_file(path)
        scorer = load_reward(shipped.reward() if reward is None else reward)
        judging = getattr(scorer, "judge", None) if judge is None else load_reward(judge)
        make = LlamaEngine if together == 1 else partial(SharedEngine, together=together)
        engine = make(path, n_gpu_layers=n_gpu_layers, threads=threads, loras=loras)
        aligner = cls(engine, scorer, judge=judging, model_name=str(path))
        aligner.origins = Origins(
            SHIPPED if model is None else str(path.absolute()),
            replace(Origin.of(shipped.reward()), source=SHIPPED) if reward is None else Origin.of(reward),
            Origin.of(judge),
            n_gpu_layers,
        )
        return aligner

    def generate(
        self,
        prompt: Prompt,
        *,
        method: str = DEFAULT_METHOD,
        budget: int | None = None,
        effort: str = DEFAULT_EFFORT,
        n: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        seed: int = DEFAULT_SEED,
        prompt_index: int = 0,
        stop_strings: Sequence[str] = (),
        grammar: Grammar | str | Mapping[str, Any] | None = None,
        time_limit: float | None = None,
        kl: bool = False,
        logprobs: bool = False,
        baseline: bool = False,
        judge_all: bool = False,
        timeline: str | os.PathLike[str] | None = None,
        target_reward: float | None = None,
        patience: int | None = None,
        budget_tokens: int | None = None,
        steering: Steering | str | os.PathLike[str] | None = None,
        stop: Callable[[], bool] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Result:
        """The best of ``budget`` rollouts of ``method``, in iterations of ``n``.

        ``prompt``: a string, which the model continues as plain text, or messages, which pass through its
        chat template. ``budget`` overrides ``effort`` (low 32, medium 128, high 512). Without an ``n`` it is 32, or 16
        with a reward that is asked at the end of responses only, or a quarter of the budget (4 to 16) of a method that
        learns only from one iteration to the next. ``seed`` and ``prompt_index`` together name the random numbers.
        ``time_limit`` is in seconds; ``target_reward``, ``patience`` (iterations without a better answer) and
        ``budget_tokens`` end the search sooner as well (see types.Limits). ``kl`` and
        ``logprobs`` need a second output product a step; ``baseline`` adds the unaligned greedy answer, which does not
        count (None if it was interrupted); ``judge_all``: the judge scores every candidate, not the answer alone.
        ``steering``: what an earlier search with this model learnt (see ``steering``), or its file, to start with.
        ``grammar``: what the answer must be, in llama.cpp's notation (GBNF) or a JSON schema as a mapping; an answer
        that is not complete under it is given only if none was (then ``Result.status`` is "incomplete").
        ``timeline``: a file for where the time went, which Chrome and Perfetto draw. ``stop()`` true, or Ctrl-C, ends
        the search with the best answer so far. ``options`` go to the method (strength, sigma, temperature, ...; see its
        docstring).

        A composite reward with parts that were not measured yet is first calibrated on rollouts of the base model to
        this prompt, which ``budget`` does not count and ``time_limit`` does (see Result.calibration).
        Raises InputError and its kinds, DecodeError, ScoreError.
        """
        (result,) = self._generate(
            [prompt],
            [prompt_index],
            None,
            None if on_progress is None else lambda _, progress: on_progress(progress),
            method=method,
            budget=budget,
            effort=effort,
            n=n,
            max_tokens=max_tokens,
            seed=seed,
            stop_strings=stop_strings,
            grammar=grammar,
            time_limit=time_limit,
            kl=kl,
            logprobs=logprobs,
            baseline=baseline,
            judge_all=judge_all,
            timeline=timeline,
            limits=Limits(target_reward, patience, budget_tokens),
            steering=steering,
            stop=stop,
            options=options,
        )
        if isinstance(result, BaseException):
            raise result
        return result

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        method: str = DEFAULT_METHOD,
        budget: int | None = None,
        effort: str = DEFAULT_EFFORT,
        n: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        seed: int = DEFAULT_SEED,
        at_once: int | None = None,
        prompt_indices: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        grammar: Grammar | str | Mapping[str, Any] | None = None,
        time_limit: float | None = None,
        kl: bool = False,
        logprobs: bool = False,
        baseline: bool = False,
        judge_all: bool = False,
        timeline: str | os.PathLike[str] | None = None,
        target_reward: float | None = None,
        patience: int | None = None,
        budget_tokens: int | None = None,
        steering: Steering | str | os.PathLike[str] | None = None,
        stop: Callable[[], bool] | None = None,
        on_progress: Callable[[int, Progress], None] | None = None,
        **options: Any,
    ) -> list[Result | BaseException]:
        """``generate`` for many prompts in one batch of rows, which is faster than one after the other.

        Each prompt has a search of its own, of ``budget`` rollouts in iterations of ``n``; that of ``prompts[i]`` draws
        the random numbers of ``generate(prompts[i], prompt_index=i)``, whatever the others are, and differs from it by
        rounding only; ``prompt_indices``: others in the place of i. ``at_once`` of them share the rows (default: all),
        and none gets two turns while another waits.
        ``time_limit`` and ``stop`` are for all together; ``on_progress(i, progress)`` is of ``prompts[i]``.

        Gives for each prompt, in their order, its result, or instead the exception that ``generate`` would have raised:
        a prompt that does not fit, or on which its reward, its method or ``on_progress`` raises, leaves the others
        alone; one that was interrupted before it had an answer has KeyboardInterrupt. What is wrong with all of them is
        raised, as DecodeError is, and what ``stop`` raises.
        """
        return self._generate(
            prompts,
            range(len(prompts)) if prompt_indices is None else prompt_indices,
            at_once,
            on_progress,
            method=method,
            budget=budget,
            effort=effort,
            n=n,
            max_tokens=max_tokens,
            seed=seed,
            stop_strings=stop_strings,
            grammar=grammar,
            time_limit=time_limit,
            kl=kl,
            logprobs=logprobs,
            baseline=baseline,
            judge_all=judge_all,
            timeline=timeline,
            limits=Limits(target_reward, patience, budget_tokens),
            steering=steering,
            stop=stop,
            options=options,
        )

    def _generate(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        at_once: int | None,
        on_progress: Callable[[int, Progress], None] | None,
        *,
        method: str,
        budget: int | None,
        effort: str,
        n: int | None,
        max_tokens: int,
        seed: int,
        stop_strings: Sequence[str],
        grammar: Grammar | str | Mapping[str, Any] | None,
        time_limit: float | None,
        kl: bool,
        logprobs: bool,
        baseline: bool,
        judge_all: bool,
        timeline: str | os.PathLike[str] | None,
        limits: Limits,
        steering: Steering | str | os.PathLike[str] | None,
        stop: Callable[[], bool] | None,
        options: dict[str, Any],
    ) -> list[Result | BaseException]:
        check_prompts(prompts)
        if at_once is not None and at_once < 1:
            raise InputError(f"at_once is {at_once} prompts; it must be at least 1")
        if len(indices) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts and {len(indices)} prompt indices; give one for each")
        stop_strings = as_strings(stop_strings)
        if grammar is not None:
            grammar = Grammar.of(grammar)
            self.engine.check_grammar(grammar)
        budget = budget_of(budget, effort)
        unfinished = getattr(self.reward, "unfinished", True)
        if n is None:
            n = rollouts_an_iteration(method, budget, unfinished)
        check_search(
            method=method, budget=budget, n=n, max_tokens=max_tokens, seed=seed, time_limit=time_limit, **options
        )
        for index in indices:
            RowSeeds(seed, index)
        if steering is not None:
            kept = self.check_steering(steering)
            options = options | {"steering": kept.u}
            if kept.nats is not None and "steering_nats" in controllers.options_of(method):
                options["steering_nats"] = kept.nats
        wants: dict[Want, bool] = {"kl": kl, "logprobs": logprobs}
        # No response is longer than the context, so that no control needs to be.
        common: dict[str, Any] = {"d": self.engine.d, "max_tokens": min(max_tokens, self.engine.n_ctx), "seed": seed}
        asked = {
            "method": method,
            "options": controllers.defaults_of(method) | options,
            "budget": budget,
            "n": min(n, budget),
            "max_tokens": max_tokens,
            "seed": seed,
            "stop_strings": list(stop_strings),
            "grammar": None if grammar is None else grammar.gbnf,
            "time_limit": time_limit,
            "target_reward": limits.target_reward,
            "patience": limits.patience,
            "budget_tokens": limits.tokens,
            "kl": kl,
            "logprobs": logprobs,
            "judge_all": judge_all,
            "beside": len(prompts) - 1,
        }
        common |= {"head": lambda: self.engine.head, "text": self.engine.text, "unfinished": unfinished} | options
        began = time.perf_counter()
        results: list[Result | BaseException] = []
        with self._recorded(timeline, results):
            # A prompt that its reward cannot be calibrated on leaves the others alone.
            errors: dict[int, BaseException] = {}
            tasks: list[Task] = []
            for i, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
                reward = self._calibrated(
                    prompt, index, seed, max_tokens, stop_strings, grammar, stop, began, time_limit
                )
                if isinstance(reward, BaseException):
                    errors[i] = reward
                else:
                    score = partial(call_prefixes, reward or self.reward, prompt)
                    controller = controllers.create(method, prompt_index=index, score=score, **common)
                    tasks.append(Task(prompt, controller, index, reward))
            left = time_limit
            if time_limit is not None and isinstance(self.reward, Calibrates) and tasks:
                left = time_limit - (time.perf_counter() - began)
                if left <= 0 < time_limit:
                    raise _time_passed(time_limit)
            numbers = [i for i in range(len(prompts)) if i not in errors]
            found = search_many(
                self.engine,
                tasks,
                self.reward,
                method=method,
                budget=budget,
                n=min(n, budget),
                max_tokens=max_tokens,
                seed=seed,
                at_once=at_once,
                stop_strings=stop_strings,
                grammar=grammar,
                time_limit=left,
                limits=limits,
                stop=stop,
                on_progress=None if on_progress is None else lambda i, progress: on_progress(numbers[i], progress),
                want=frozenset(want for want, asked in wants.items() if asked),
            )
            rest = iter(zip(tasks, found, strict=True))
            for i in range(len(prompts)):
                if i in errors:
                    results.append(errors[i])
                    continue
                task, result = next(rest)
                if isinstance(result, Result):
                    result = replace(result, calibration=calibration_of(task.reward or self.reward))
                results.append(result)
            # The answers are there already.
            with suppress(KeyboardInterrupt, AbandonedError), interruptible(Interruption(stop)):
                for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
                    if baseline and isinstance(result, Result):
                        unaligned = self.baseline(
                            prompt,
                            max_tokens=max_tokens,
                            stop_strings=stop_strings,
                            grammar=grammar,
                            calibration=result.calibration,
                            stop=stop,
                        )
                        results[i] = replace(result, baseline=unaligned)
                if self.judge is not None:
                    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
                        if isinstance(result, Result):
                            results[i] = self._judged(result, self.judge, prompt, judge_all, max_tokens)
        named: dict[str, Any] = {
            "model": self.model_name,
            "reward_model": self.reward.name,
            "judge_model": "" if self.judge is None else self.judge.name,
            "versions": versions(),
        }
        return [
            replace(result, **named, asked={**asked, **self._asked(prompt), "prompt_index": index})
            if isinstance(result, Result)
            else result
            for prompt, index, result in zip(prompts, indices, results, strict=True)
        ]

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt, in a copy, since a caller goes on with its list of messages; and how it was read."""
        parts: list[int] = []
        with suppress(InputError):  # another thread closed the engine meanwhile: the answer is there
            parts = self.engine.parts(prompt) if isinstance(self.engine, LlamaEngine) else []
        return {
            "prompt": prompt if isinstance(prompt, str) else [message.copy() for message in prompt],
            "prompt_parts": parts,
        }

    def trace(self, result: Result, *, paths: bool = True) -> Trace:
        """A search of this aligner written down: ``trace(result).save("fox.json")``; see docs/traces.md.

        ``paths``: say in which folders model and rewards lie, so that they are found again. Raises InputError for a
        result of something else, or of a method with an option that is no JSON value.
        """
        told = about(result, self.engine, self.reward, self.judge, self.origins, paths=paths)
        return Trace.of(result, told, paths=paths)

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Progress | Result, None, None]:
        """``generate``, a report at a time: every Progress, then the Result.

        The search runs in a thread of its own, from the first ``next`` on; closing the iterator, or leaving the loop
        that it is in, stops it. ``options`` are those of ``generate``.
        """
        return events(self._reporting(prompt, options, progress=True))

    async def agenerate(self, prompt: Prompt, **options: Any) -> Result:
        """``generate`` for a coroutine: in a thread of its own, stopped where the task is cancelled.

        Searches wait for each other, or share the rows (``load(together=4)``). ``stop`` and ``on_progress`` are called
        in that thread.
        """
        async with aclosing(aevents(self._reporting(prompt, options, progress=False))) as reports:
            async for result in reports:
                if isinstance(result, Result):
                    return result
        raise AssertionError("a search ends with a result or an error")

    def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Progress | Result, None]:
        """``stream`` for ``async for``; where the loop is left early, ``contextlib.aclosing`` stops it at once."""
        return aevents(self._reporting(prompt, options, progress=True))

    def _reporting(self, prompt: Prompt, options: dict[str, Any], *, progress: bool) -> Work[Progress | Result]:
        stop: Callable[[], bool] | None = options.pop("stop", None)
        on_progress: Callable[[Progress], None] | None = options.pop("on_progress", None)

        def work(put: Callable[[Progress | Result], None], closed: Callable[[], bool]) -> None:
            def report(now: Progress) -> None:
                if on_progress is not None:
                    on_progress(now)
                if progress:
                    put(now)

            result = self.generate(
                prompt, stop=lambda: closed() or (stop is not None and stop()), on_progress=report, **options
            )
            put(result)

        return work

    def steering(self, result: Result) -> Steering:
        """What the search of a result learnt, for another one with this model: ``steering(result).save("u.json")``.

        Raises InputError for a method that holds no control.
        """
        if result.control is None:
            raise InputError(f"the method {result.method!r} holds no control that could be kept; use score")
        return Steering(result.control, self.engine.fingerprint, self.reward.name, result.control_nats)

    def check_steering(self, steering: Steering | str | os.PathLike[str]) -> Steering:
        """What ``steering`` is or holds. Raises InputError for one that was learnt with another model."""
        kept = steering if isinstance(steering, Steering) else Steering.load(steering)
        if kept.model != self.engine.fingerprint:
            where = "the steering" if isinstance(steering, Steering) else f"the steering in {steering}"
            raise InputError(f"{where} was learnt with another model; it means nothing to this one")
        return kept

    def _calibrated(
        self,
        prompt: Prompt,
        index: int,
        seed: int,
        max_tokens: int,
        stop_strings: Sequence[str],
        grammar: Grammar | None,
        stop: Callable[[], bool] | None,
        began: float,
        time_limit: float | None,
    ) -> Reward | BaseException:
        """The reward of one prompt's search, or the error that stands for its result."""

        def late() -> bool:
            return time_limit is not None and time.perf_counter() - began >= time_limit

        try:
            return calibrated(
                self.engine,
                self.reward,
                prompt,
                max_tokens=max_tokens,
                seed=seed,
                prompt_index=index,
                stop_strings=stop_strings,
                grammar=grammar,
                stop=lambda: late() or (stop is not None and stop()),
            )
        except DecodeError:
            raise
        except AispError as error:
            return error
        except KeyboardInterrupt as interrupt:
            return _time_passed(time_limit) if late() else interrupt

    def _judged(self, result: Result, judge: Reward, prompt: Prompt, every: bool, max_tokens: int) -> Result:
        """After the search, which knows nothing of it; so is the judge calibrated, if it has to be."""
        try:
            judge = calibrated(self.engine, judge, prompt, max_tokens=max_tokens, seed=result.seed)
        except DecodeError:
            raise
        except AispError as error:
            warnings.warn(f"the judge {judge.name!r} gave no scores: {error}", stacklevel=2)
            return result
        return judged(result, judge, prompt, every)

    @contextmanager
    def _recorded(self, path: str | os.PathLike[str] | None, results: list[Result | BaseException]) -> Iterator[None]:
        """Write the timeline of the block to a file, unless it raises or leaves no result in ``results``."""
        if path is None:
            yield
            return
        check_output(Path(path))
        timeline = Timeline()
        with recording(timeline):
            yield
        if any(isinstance(result, Result) for result in results):
            timeline.write(path)

    def token_logprobs(self, prompt: Prompt, candidate: Candidate, top: int = 0) -> list[TokenLogprob]:
        """Of each token of a result's candidate (``result.candidates[0]`` is the answer) under the base model, in nats.

        ``top``: the likeliest tokens at each place as well. See likelihood.token_logprobs.
        """
        return token_logprobs(self.engine, prompt, candidate, top)

    def chat(self, messages: Sequence[Message], **options: Any) -> Result:
        """``generate`` for a conversation: the aligned next turn of the assistant."""
        return self.generate(messages, **options)

    def baseline(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop_strings: Sequence[str] = (),
        grammar: Grammar | str | Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Baseline:
        """The unaligned greedy answer and its reward, under the same grammar if there is one.

        ``calibration``: that of the result that it is compared with; else a reward that needs one is calibrated here.
        Raises KeyboardInterrupt where ``stop()`` cut it short.
        """
        reward = self.reward
        if isinstance(reward, Calibrates) and reward.uncalibrated and calibration is not None:
            reward = reward.with_calibration(calibration)
        grammar = None if grammar is None else Grammar.of(grammar)
        reward = calibrated(
            self.engine,
            reward,
            prompt,
            max_tokens=max_tokens,
            seed=DEFAULT_SEED,
            stop_strings=stop_strings,
            grammar=grammar,
        )
        rollouts = self.engine.rollout(
            prompt,
            Controls(n=1),
            max_tokens=max_tokens,
            seeds=RowSeeds(seed=0),
            stop_strings=stop_strings,
            should_stop=stop,
            grammar=grammar,
        )
        if "interrupted" in rollouts.finish_reasons:
            raise KeyboardInterrupt
        text = rollouts.texts[0]
        scores, parts = call_parts(reward, prompt, [text])
        return Baseline(
            text=text, reward=float(scores[0]), parts={name: float(values[0]) for name, values in parts.items()}
        )

    def close(self) -> None:
        """Free the model."""
        close = getattr(self.engine, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Aligner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _time_passed(time_limit: float | None) -> InputError:
    return InputError(
        f"the time limit of {time_limit} seconds passed while the reward was calibrated on the base model; "
        "allow more time, or give the mean and std of its parts"
    )

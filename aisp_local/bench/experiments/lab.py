"""What experiments work with: a model, a reward, prompts, and how much of everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.api import Aligner
from aisp_local.bench.contest import whole
from aisp_local.bench.contest_report import titled
from aisp_local.bench.machine import describe
from aisp_local.bench.tables import Table
from aisp_local.files import write_output
from aisp_local.finite import finite
from aisp_local.rewards import Reward
from aisp_local.rewards.identity import Origin
from aisp_local.types import Candidate, Message, Result

Array = npt.NDArray[np.float64]

SETTINGS: Mapping[str, Mapping[str, Any]] = {"best-of-n": {"temperature": 1.0, "min_p": 0.05}}
"""Options of methods whose own defaults are not among the best in the contest on the pair stories (RESULTS.md)."""

WORDS = Path(__file__).parent.with_name("words.toml")
"""The rule of the pair stories-words, whose optimum, 0, is known."""

_GROUP = 4  # prompts in one batch


@dataclass(frozen=True)
class Lab:
    """``small``: sizes that only show that it runs. ``lora``: an adapter of the model, for the experiment with one."""

    aligner: Aligner
    prompts: Sequence[list[Message]]
    max_tokens: int = 96
    seed: int = 0
    small: bool = False
    say: Callable[[str], None] = lambda line: None
    lora: Path | None = None

    def on(self, aligner: Aligner) -> Lab:
        """The same with another model or reward."""
        return replace(self, aligner=aligner)

    def rewarded_by(self, path: Path) -> bool:
        """Whether the reward is the one that lies there, by what its files hold."""
        return self.aligner.origins.reward.fingerprint == Origin.of(path).fingerprint

    def size(self, usual: int, small: int) -> int:
        return small if self.small else usual

    def some(self, values: Sequence[float]) -> Sequence[float]:
        """All values of a sweep, or its ends."""
        return [values[0], values[-1]] if self.small and len(values) > 2 else values

    def search(
        self,
        method: str,
        budget: int,
        n: int | None,
        *,
        reward: Reward | None = None,
        seed: int = 0,
        at_once: int | None = None,
        **options: Any,
    ) -> list[Result]:
        """One search for each prompt, several in a batch. Raises what one ended with, and KeyboardInterrupt."""
        aligner = self.aligner if reward is None else Aligner(self.aligner.engine, reward)
        found: list[Result] = []
        for start in range(0, len(self.prompts), _GROUP):
            results = aligner.generate_many(
                self.prompts[start : start + _GROUP],
                method=method,
                budget=budget,
                n=n,
                max_tokens=self.max_tokens,
                seed=self.seed + 1000 * seed + start,
                at_once=at_once,
                **options,
            )
            found += map(whole, results)
        shown = ", ".join(f"{key.rstrip('_')} {value}" for key, value in options.items())
        self.say(f"{method} {shown}".strip())
        return found


@dataclass(frozen=True)
class Finding:
    """Tables for people, plots (SVG by name), and what a machine reads."""

    tables: Sequence[Table]
    plots: Mapping[str, str] = field(default_factory=dict)
    data: Any = None


@dataclass(frozen=True)
class Experiment:
    """``expected``: the shape that a reader should see, and why; written before looking.

    ``prompts``: how many it takes where nobody says how many, and ``least`` those without which it says nothing.
    ``adapter``: it needs a LoRA adapter of the model, which only the shipped one has of its own.
    """

    name: str
    question: str
    expected: str
    run: Callable[[Lab], Finding]
    pair: str = "stories"  # the shipped pair it runs on by default
    prompts: int = 4
    least: int = 1
    adapter: bool = False


def row(method: str) -> str:
    """A method with the settings that experiments give it, as the first cell of a row."""
    return titled(method, SETTINGS.get(method, {}))


def in_order(result: Result) -> list[Candidate]:
    """The rollouts as they were drawn."""
    return sorted(result.candidates, key=lambda c: (c.iteration, c.row))


def rewards(results: Sequence[Result]) -> Array:
    """[prompts, rollouts] in the order in which they were drawn; nan for those that are not finite, which never win."""
    found = np.array([[c.reward for c in in_order(result)] for result in results])
    return np.where(np.isfinite(found), found, np.nan)


def best_of(found: Array) -> Array:
    """The highest reward of each prompt, of ``rewards`` [prompts, rollouts]."""
    return np.asarray(np.fmax.reduce(found, axis=1))


def mean(found: Array, axis: int | None = None) -> Any:
    """Of the rewards that there are; nan of none."""
    there = np.isfinite(found)
    total, count = np.where(there, found, 0.0).sum(axis=axis), np.asarray(there.sum(axis=axis))
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def spread_of(found: Array) -> Array:
    """Standard deviation of each prompt's rewards, of those that there are."""
    return np.asarray(np.sqrt(mean((found - mean(found, 1)[:, None]) ** 2, 1)))


def last(results: Sequence[Result], of: Callable[[Any], float | None]) -> float:
    """Mean over prompts of a figure of the last iteration's statistics; nan where none has it."""
    values = [of(result.iterations[-1]) for result in results]
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else float("nan")


def variety(results: Sequence[Result]) -> float:
    """Share of the trigrams of words that are different among the last iteration's rollouts, mean over prompts."""
    shares = []
    for result in results:
        grams: list[tuple[str, ...]] = []
        for candidate in result.candidates:
            if candidate.iteration == len(result.iterations):
                words = candidate.text.split()
                grams += zip(words, words[1:], words[2:], strict=False)
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return float(np.mean(shares))


def write(out: Path, experiment: Experiment, finding: Finding, about: str, command: str) -> str:
    """NAME.md, NAME.json and the plots in a folder, each whole; gives the Markdown. ``command`` makes them again."""
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    lines = [f"# {experiment.name}", "", experiment.question, "", f"Expected: {experiment.expected}", ""]
    lines += [f"{about}. {machine}.", "", f"Made again by `{command}`.", ""]
    for name, svg in finding.plots.items():
        write_output(out / f"{experiment.name}-{name}.svg", svg)
        lines += [f"![{name}]({experiment.name}-{name}.svg)", ""]
    lines += [table.markdown() for table in finding.tables]
    text = "\n".join(lines)
    write_output(out / f"{experiment.name}.md", text)
    content = {"experiment": experiment.name, "command": command, "machine": describe(), "about": about}
    data = json.loads(json.dumps(finding.data, default=float))  # numpy's numbers as Python's
    written = json.dumps(finite({**content, "data": data}), indent=1)
    write_output(out / f"{experiment.name}.json", written + "\n")
    return text

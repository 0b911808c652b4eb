"""Plots of one search that was written down, as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aisp_local.reward_kit.statistics import spearman
from aisp_local.svg import Axes

_LARGEST = 1e30  # what is beyond is no place in a plot
_DOTS = 2000  # at most: a file stays small
_PARTS = 6

Found = Mapping[str, Any]
Point = tuple[float, float]


def plots(found: Found) -> Iterator[tuple[str, str]]:
    """What each plot shows in words, and its SVG; of a trace's result."""
    for make in (rewards, ranked, _parts, judged, _kl, _ess, times):
        yield from make(found)


def rewards(found: Found) -> Iterator[tuple[str, str]]:
    """Every candidate's reward by iteration, the best so far and the mean."""
    dots = [(c["iteration"], c["row"], c["reward"]) for c in found["candidates"] if _drawn(c["reward"])]
    curves = {"best so far": _series(found, "best_so_far"), "mean": _series(found, "mean")}
    base = _base(found)
    values = [reward for *_, reward in dots] + [y for points in curves.values() for _, y in points] + base
    if not values:
        return
    axes = _by_iteration(found, "reward of every candidate", values, "reward")
    # Side by side within their iteration, in the order of their rows.
    rows = max((row for _, row, _ in dots), default=1)
    for i in _some(len(dots)):
        iteration, row, reward = dots[i]
        axes.dot(iteration + 0.6 * (row - 0.5) / rows - 0.3, reward, 3, 0.4)
    for level in base:
        axes.line((axes.x[0], level), (axes.x[1], level), "chance")
    for i, points in enumerate(curves.values()):
        axes.curve(_seen(points), i)
    axes.legend(list(curves))
    yield "Rewards by iteration: dots are candidates" + (", dashes the unaligned answer" if base else ""), axes.svg()


def ranked(found: Found) -> Iterator[tuple[str, str]]:
    """Candidates sorted by reward; those above the unaligned answer stand out."""
    values = sorted((c["reward"] for c in found["candidates"] if _drawn(c["reward"])), reverse=True)
    base = _base(found)
    if not values:
        return
    axes = Axes("candidates, best first", (1, len(values), "rank"), _range(values + base, "reward"), counts=True)
    for i in _some(len(values)):
        axes.dot(i + 1, values[i], 3, 0.7, best=bool(base) and values[i] > base[0])
    for level in base:
        axes.line((axes.x[0], level), (axes.x[1], level), "chance")
    said = "Candidates sorted by reward"
    if base:
        above = sum(value > base[0] for value in values)
        said += f": {above} of {len(values)} are above the unaligned answer (dashes)"
    yield said, axes.svg()


def judged(found: Found) -> Iterator[tuple[str, str]]:
    """What the judge thinks of what the reward likes."""
    pairs = [(c["reward"], c["judge"]) for c in found["candidates"] if _drawn(c["reward"]) and _drawn(c["judge"])]
    if len(pairs) < 2:
        return
    axes = Axes("judge and reward", _range([x for x, _ in pairs], "reward"), _range([y for _, y in pairs], "judge"))
    answer = (found["reward"], found["judge"])
    for i in _some(len(pairs)):
        axes.dot(*pairs[i], 3, 0.5)
    if _drawn(answer[1]):
        axes.dot(*answer, 5, best=True)
    yield f"{agreement(pairs)} (the large dot is the answer)", axes.svg()


def agreement(pairs: Sequence[Point]) -> str:
    """Whether the judge ranks candidates as the reward does, in a sentence. ``pairs``: reward and judge."""
    values = np.array(pairs, np.float64)
    rank = spearman(values[:, 0], values[:, 1])
    if not np.isfinite(rank):
        return "The judge, or the reward, thinks the same of all candidates"
    how = "ranks candidates as the reward does" if rank > 0.5 else "partly agrees" if rank > 0.1 else "does not agree"
    how = "disagrees" if rank < -0.1 else how
    return f"The judge {how}: rank correlation {rank:.2f} over {len(pairs)} candidates"


def times(found: Found) -> Iterator[tuple[str, str]]:
    """Where the seconds of each iteration went."""
    kinds = {"in all": "seconds", "decoding": "decode_seconds", "rewards": "reward_seconds", "update": "update_seconds"}
    curves = {name: _series(found, key) for name, key in kinds.items()}
    values = [y for points in curves.values() for _, y in points]
    axes = _by_iteration(found, "seconds of an iteration", [0.0, *values], "seconds")
    for i, points in enumerate(curves.values()):
        axes.curve(_seen(points), i)
    axes.legend(list(curves))
    yield "Rewards are computed while rollouts decode, so that the parts are no sum", axes.svg()


def _parts(found: Found) -> Iterator[tuple[str, str]]:
    """Each part of a composite reward against the whole."""
    names = list(dict.fromkeys(name for c in found["candidates"] for name in c["parts"]))
    for name in names[:_PARTS]:
        pairs = [
            (c["parts"][name], c["reward"])
            for c in found["candidates"]
            if _drawn(c["reward"]) and _drawn(c["parts"].get(name))
        ]
        if not pairs:
            continue
        across, up = _range([x for x, _ in pairs], f"the part's own score: {name[:40]}"), [y for _, y in pairs]
        axes = Axes(f"part: {name[:40]}", across, _range(up, "reward"))
        for i in _some(len(pairs)):
            axes.dot(*pairs[i], 3, 0.5)
        yield f"The part {name!r} and the whole reward", axes.svg()


def _curve(key: str, title: str, unit: str) -> Callable[[Found], Iterator[tuple[str, str]]]:
    def make(found: Found) -> Iterator[tuple[str, str]]:
        points = _series(found, key)
        if points:
            axes = _by_iteration(found, title, [0.0, *(y for _, y in points)], unit)
            axes.curve(_seen(points), 0)
            yield title[0].upper() + title[1:], axes.svg()

    return make


_kl = _curve("kl", "how far from the model: KL", "nats over a response")
_ess = _curve("ess", "effective sample size of the weights", "rollouts")


def _drawn(value: float | None) -> bool:
    return value is not None and abs(value) < _LARGEST


def _series(found: Found, key: str) -> list[Point]:
    return [(i["iteration"], i[key]) for i in found["iterations"] if _drawn(i[key])]


def _seen(points: list[Point]) -> list[Point]:
    """A single point as a short line."""
    return [(points[0][0] - 0.3, points[0][1]), (points[0][0] + 0.3, points[0][1])] if len(points) == 1 else points


def _base(found: Found) -> list[float]:
    base = found["baseline"]
    return [base["reward"]] if base is not None and _drawn(base["reward"]) else []


def _range(values: Sequence[float], name: str) -> tuple[float, float, str]:
    return min(values), max(values), name


def _by_iteration(found: Found, title: str, values: Sequence[float], name: str) -> Axes:
    last = max(i["iteration"] for i in found["iterations"])
    return Axes(title, (0.6, last + 0.4, "iteration"), _range(values, name), counts=True)


def _some(n: int) -> Sequence[int]:
    """At most so many of n, evenly taken."""
    return range(n) if n <= _DOTS else [int(i) for i in np.linspace(0, n - 1, _DOTS)]

"""A search that was written down, run again, and what is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import controllers
from aisp_local.api import Aligner
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.finite import finite
from aisp_local.native import Lora, versions
from aisp_local.origins import SHIPPED, machine
from aisp_local.steering import Steering
from aisp_local.trace import Trace, as_json
from aisp_local.types import Progress, Result

_SECONDS = {"seconds", "decode_seconds", "reward_seconds", "update_seconds"}
_COMPARED = ("answer", "reward", "judge", "baseline", "calibration", "status", "n_tokens", "iterations", "candidates")


@dataclass(frozen=True)
class Field:
    """One field of a result: how many values in it were compared, and the first that differs, if one does."""

    name: str
    values: int
    difference: str | None = None


def load(
    trace: Trace,
    *,
    model: Path | None = None,
    reward: Path | None = None,
    judge: Path | None = None,
    threads: int | None = None,
) -> Aligner:
    """The aligner that a trace names, or with what is given in its place.

    Raises InputError where the trace does not say where to find it, and what ``Aligner.load`` raises.
    """
    wanted, at = trace["model"], trace["machine"]
    if model is None and wanted["source"] is None:
        raise InputError(f"the trace does not say where the model {wanted['name']!r} lies; give it with -m")
    if reward is None and trace["reward"]["source"] is None:
        name = trace["reward"]["name"]
        raise InputError(f"the trace does not say where the reward {name!r} lies; give it with -r")
    named = None if trace["judge"] is None else trace["judge"]["source"]
    return Aligner.load(
        model or _named(wanted["source"]),
        reward or _named(trace["reward"]["source"]),
        judge=judge or named,
        n_gpu_layers=_whole(at["n_gpu_layers"]),
        threads=_whole(at["threads"]) if threads is None else threads,
        loras=[Lora(Path(lora["source"]), lora["scale"]) for lora in wanted["loras"]],
    )


def _named(source: str | None) -> str | None:
    """What is shipped is what is loaded where nothing is named."""
    return None if source == SHIPPED else source


def _whole(number: float | None) -> int | None:
    """JSON may write a whole number as 5.0."""
    return None if number is None else int(number)


def check(trace: Trace, aligner: Aligner) -> None:
    """Refuse, with an InputError, another model than the trace's, and what nothing can repeat."""
    wanted = trace["model"]
    if aligner.engine.fingerprint != wanted["fingerprint"]:
        raise InputError(
            f"{aligner.model_name or 'this'} is another model than the trace's ({wanted['name']}): "
            f"its fingerprint begins with {aligner.engine.fingerprint[:12]}, that of the trace with "
            f"{wanted['fingerprint'][:12]}; give the trace's model with -m"
        )
    if trace["result"]["status"] in ("interrupted", "time-limit") and trace["result"]["ended_at"] is None:
        raise InputError(
            "the search was broken off within an iteration, nobody knows where: no second run can repeat it"
        )


def unlike(trace: Trace, aligner: Aligner) -> list[str]:
    """In what this is not what the trace was made with, and why bits may differ therefore; one sentence each."""
    told = [
        f"the {what} was {trace[what]['name']!r} of the fingerprint {str(trace[what]['fingerprint'])[:12]}, and is "
        f"{there.name!r} of {str(origin.fingerprint)[:12]}"
        for what, there, origin in (
            ("reward", aligner.reward, aligner.origins.reward),
            ("judge", aligner.judge, aligner.origins.judge),
        )
        if trace[what] is not None and there is not None and trace[what]["fingerprint"] != origin.fingerprint
    ]
    if trace["judge"] is not None and aligner.judge is None:
        told.append(f"the judge {trace['judge']['name']!r} is not here: its scores are not compared")
    was = trace["machine"]
    told += [
        f"{name.replace('_', ' ')}: {was.get(name)} then, {now} now"
        for name, now in machine(aligner.engine, aligner.origins).items()
        if was.get(name) != now
    ]
    told += [
        f"{name} {was['versions'].get(name)} then, {now} now"
        for name, now in versions().items()
        if was["versions"].get(name) != now
    ]
    if beside := trace["search"]["beside"]:
        told.append(f"the search ran in one batch with {beside} others, this one runs alone: bits may differ")
    if (together := was.get("together", 1)) > 1:
        told.append(f"up to {together} searches shared a batch then, this one runs alone: bits may differ")
    return told


def run(
    trace: Trace,
    aligner: Aligner,
    *,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The trace's search once more, and no further: without its time limit, to the decode step at which it ended."""
    search, found = trace["search"], trace["result"]
    options: dict[str, Any] = dict(search["options"])
    unknown = sorted(set(options) - controllers.options_of(search["method"]))
    if unknown:
        raise InputError(f"the trace's method {search['method']!r} has no option {unknown[0]!r} in this version")
    if search["steering"] is not None:
        u = np.array(search["steering"], np.float32)
        options["steering"] = Steering(u, aligner.engine.fingerprint)
    if isinstance(aligner.engine, LlamaEngine):
        aligner.engine.read_in_parts(trace["prompt"], [int(part) for part in search["prompt_parts"]])
    end = found["ended_at"]
    steps = 0

    def progress(now: Progress) -> None:
        nonlocal steps
        steps += now.stats is None
        if on_progress is not None:
            on_progress(now)

    whole = ("budget", "n", "max_tokens", "seed", "prompt_index", "patience", "budget_tokens")
    asked: dict[str, Any] = {name: _whole(search[name]) for name in whole}
    same = ("method", "stop_strings", "grammar", "kl", "logprobs", "target_reward", "judge_all")
    asked |= {name: search[name] for name in same}
    return aligner.generate(
        trace["prompt"],
        **asked,
        baseline=found["baseline"] is not None,
        stop=lambda: (end is not None and steps >= end) or (stop is not None and stop()),
        on_progress=progress,
        **options,
    )


def compare(trace: Trace, result: Result, *, judge: bool = True) -> list[Field]:
    """Field by field, to the bit, but for seconds. ``judge``: its scores as well."""
    old = trace["result"]
    new = json.loads(json.dumps(finite(as_json(result))))
    if not judge:
        old, new = _without_judge(old), _without_judge(new)
    compared = [name for name in _COMPARED if name != "status" or old["ended_at"] is None]
    return [_field(name, old[name], new[name]) for name in compared]


def _field(name: str, old: Any, new: Any) -> Field:
    counted = [0]
    difference = next(_differences(old, new, name, counted), None)
    return Field(name, counted[0], difference)


def _differences(old: Any, new: Any, where: str, counted: list[int]) -> Iterator[str]:
    """Where and how; of what the trace has, but for times and for what the judge did not say then."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if key in _SECONDS or (key == "judge" and value is None):
                continue
            yield from _differences(value, new.get(key), f"{where}.{key}", counted)
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from _differences(a, b, f"{where}[{i}]", counted)
        if len(old) != len(new):
            yield f"{where}: {len(old)} then, {len(new)} now"
    else:
        counted[0] += 1
        if old != new and not (where == "judge" and old is None):
            yield f"{where}: {_shown(old, new)} then, {_shown(new, old)} now"


def _shown(value: Any, other: Any = None) -> str:
    """A value in one line; of a long text what begins to differ from the other."""
    if isinstance(value, str) and isinstance(other, str):
        common = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
        value = ("..." if common > 20 else "") + value[max(0, common - 20) if common > 20 else 0 :]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_judge(found: Mapping[str, Any]) -> dict[str, Any]:
    """With no score of a judge."""
    base = found["baseline"]
    return {
        **found,
        "judge": None,
        "baseline": base and {**base, "judge": None},
        "candidates": [{**c, "judge": None} for c in found["candidates"]],
    }

"""Weights that were trained against controls that are found while answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench.contest import answer_logprobs
from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import Experiment, Finding, Lab, best_of, in_order, last, mean, rewards
from aisp_local.bench.tables import Table
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.types import Result

_N = 32
_SCORED = 8  # rollouts of a prompt whose likelihood under both models is computed


def _away(lab: Lab, results: Sequence[Result], base: LlamaEngine, adapted: LlamaEngine) -> float:
    """Mean of log p_adapted(y) - log p_base(y) over the last iteration's rollouts, in nats."""
    found = []
    for prompt, result in zip(lab.prompts, results, strict=True):
        of_last = [c for c in in_order(result) if c.iteration == len(result.iterations)]
        for candidate in of_last[: lab.size(_SCORED, 2)]:
            under = [answer_logprobs(engine, prompt, candidate.text) for engine in (adapted, base)]
            sums = [0.0 if logprobs is None else float(logprobs.sum(dtype=np.float64)) for logprobs in under]
            found.append(sums[0] - sums[1])
    return float(np.mean(found))


def _lora(lab: Lab) -> Finding:
    base = lab.aligner.engine
    if not isinstance(base, LlamaEngine):
        raise InputError("this experiment needs a GGUF model")
    path = lab.lora or shipped.adapter()
    budget = lab.size(128, 32)
    made = Table(
        "lora",
        f"{budget} rollouts, {len(lab.prompts)} prompts; best-of-n samples as score does, at temperature 1 and min-p "
        "0.02; nats from the base model, of the last iteration's rollouts",
        [
            "model",
            "method",
            "mean reward of the first iteration",
            "best reward",
            "over the base's best-of-n [95%]",
            "nats",
        ],
    )
    data, reference = [], None
    with LlamaEngine(base.model.path, threads=base.settings["threads"], loras=[path]) as adapted:
        for name, engine in (("base", base), ("with the adapter", adapted)):
            aligner = Aligner(engine, lab.aligner.reward)
            for method in ("best-of-n", "score"):
                sampling: dict[str, Any] = (
                    {"temperature": 1.0, "min_p": 0.02} if method == "best-of-n" else {}
                )  # as score's
                results = lab.on(aligner).search(method, budget, _N, kl=True, **sampling)
                found = rewards(results)
                best = best_of(found)
                reference = best if reference is None else reference
                control = last(results, lambda s: s.kl)
                nats = (0.0 if np.isnan(control) else control) + (
                    _away(lab, results, base, adapted) if engine is adapted else 0.0
                )
                ahead = interval(best - reference)
                over = shown(ahead, sign=True)
                first = float(mean(found[:, :_N]))
                made.rows.append([name, method, number(first), number(mean(best)), over, f"{nats:.1f}"])
                data.append(
                    {
                        "model": name,
                        "method": method,
                        "first": first,
                        "best": float(mean(best)),
                        "ahead": ahead,
                        "nats": nats,
                    }
                )
    return Finding([made], data=data)


LORA = Experiment(
    "lora",
    "An adapter that was trained for the reward, controls that are found while answering, or both?",
    "the adapter raises the mean of every sample, and best-of-n with it is above best-of-n without; score without it "
    "reaches more, at more nats, since it learns for this prompt; both together are best, as their gains add up in "
    "part.",
    _lora,
    prompts=8,
    adapter=True,
)

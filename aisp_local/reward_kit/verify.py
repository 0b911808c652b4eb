"""Checks that tell whether a reward folder does what it should, on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local.errors import AispError
from aisp_local.reward_kit import tokens
from aisp_local.reward_kit.evaluate import score_pairs
from aisp_local.reward_kit.good_bad import PAIRS
from aisp_local.reward_kit.pairs import Pair
from aisp_local.reward_kit.speed import Measured, builtin_scores, measure, text_of
from aisp_local.reward_kit.statistics import share_right, wilson
from aisp_local.rewards.base import Reward
from aisp_local.rewards.manifest import check_files, read_manifest
from aisp_local.rewards.onnx import OnnxReward

HARD = ("", " ", "a", "\ud800 and \udfff", "\x00", "🦊" * 50, "word " * 50_000)
"""Responses that a reward must survive."""
DRIFT = 0.01
"""Share of the scores' spread by which company in a batch may move a score."""


@dataclass(frozen=True)
class Check:
    """One question about a reward: the answer, and what to do if it is no."""

    name: str
    passed: bool
    says: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def verify(
    folder: Path, pairs: Sequence[Pair] | None = None, on_check: Callable[[Check], None] | None = None
) -> list[Check]:
    """All checks, ``on_check`` called after each. A folder that does not load has only the check that says so.

    ``pairs``: preferences to rank besides the built-in ones.
    """
    return told(_checks(folder, pairs), on_check)


def told(checks: Iterable[Check], on_check: Callable[[Check], None] | None) -> list[Check]:
    """All of them, ``on_check`` called after each."""
    found = []
    for check in checks:
        found.append(check)
        if on_check is not None:
            on_check(check)
    return found


def not_loaded(name: str, error: AispError) -> Check:
    """The failed check of what does not load; the error's sentence ends with what to do."""
    what, _, advice = str(error).rpartition("; ")
    return Check(name, False, what or advice, advice if what else "restore the folder")


def _checks(folder: Path, pairs: Sequence[Pair] | None) -> Iterator[Check]:
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        yield Check("files", True, f"{len(manifest.files)} files match their sha256")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reward = OnnxReward.load(folder, golden=False)
    except AispError as error:
        yield not_loaded("load", error)
        return
    yield _provider(reward, [str(w.message) for w in said])
    yield _guarded(_golden, reward, "golden")
    finite = _guarded(_finite, reward, "finite")
    yield finite
    if finite.passed:  # else there is nothing to compare
        yield _guarded(_company, reward, "batch")
        yield _guarded(_padding, reward, "padding")
    yield _guarded(lambda r: _tokens(r, folder), reward, "tokens")
    try:
        measured = measure(folder)
    except AispError as error:
        yield Check("speed", False, str(error), "run: aisp-local reward score FOLDER, and see what it says")
        yield _guarded(lambda r: _determinism(r, None), reward, "determinism")
    else:
        yield _guarded(lambda r: _determinism(r, measured), reward, "determinism")
        yield _speed(measured)
    yield _guarded(lambda r: ranking("ranking", r, PAIRS), reward, "ranking")
    if pairs is not None:
        yield _guarded(lambda r: ranking("given pairs", r, pairs), reward, "given pairs")


def _guarded(check: Callable[[OnnxReward], Check], reward: OnnxReward, name: str) -> Check:
    """The check, failed where the reward itself fails."""
    try:
        return check(reward)
    except AispError as error:
        return Check(name, False, str(error), "export the model again")


def _provider(reward: OnnxReward, said: Sequence[str]) -> Check:
    return Check(
        "provider",
        not said,
        "; ".join([f"runs on {reward.provider}", *said]),
        "install what is missing, or pass over this where the CPU will do" if said else "",
        {"provider": reward.provider},
    )


def _golden(reward: OnnxReward) -> Check:
    manifest = reward.manifest
    apart = [abs(float(reward.score(g.prompt, [g.response])[0]) - g.score) for g in manifest.golden]
    if not apart:
        return Check("golden", True, "no golden scores in reward.json: another model would go unnoticed")
    worst = max(apart) if all(np.isfinite(apart)) else float("inf")
    return Check(
        "golden",
        worst <= manifest.tolerance,
        f"{len(apart)} golden scores, the furthest off by {worst:.2g} (tolerance {manifest.tolerance:g})",
        "model and tokenizer do not belong together, or ONNX Runtime differs: restore both, or update onnxruntime",
        {"pairs": len(apart), "largest_difference": worst},
    )


def _finite(reward: OnnxReward) -> Check:
    scores = np.concatenate([reward.score("", HARD), builtin_scores(reward)])
    bad = int((~np.isfinite(scores)).sum())
    return Check(
        "finite",
        bad == 0,
        f"{len(scores)} scores, {bad or 'all'} of them {'not ' if bad else ''}finite",
        "float16 overflows: export the model in float32 or bfloat16",
        {"scores": len(scores), "not_finite": bad},
    )


def _spread(reward: OnnxReward) -> float:
    return float(np.std(builtin_scores(reward)))


def _drift(name: str, reward: OnnxReward, apart: float, what: str, advice: str) -> Check:
    spread = _spread(reward)
    if not spread > 0:
        return Check(name, False, "all built-in responses get the same score", "name another output or index")
    return Check(
        name,
        apart <= DRIFT * spread,
        f"{what} moves a score by {apart:.2g} at most, {apart / spread:.2g} of the scores' spread",
        advice,
        {"largest_difference": apart, "spread": spread, "relative": apart / spread},
    )


_QUANTISED = (
    "the activations are quantised over the whole batch, most likely: use float32, float16 or weight-only quantisation"
)


def _company(reward: OnnxReward) -> Check:
    texts = [text for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    prompt = "Tell me a story."
    alone = np.array([reward.score_together(prompt, [text])[0] for text in texts])
    apart = 0.0
    for order in (texts, [*texts, "!?" * 40, "zzz zzz"]):
        apart = max(apart, float(np.abs(reward.score_together(prompt, order)[: len(texts)] - alone).max()))
    return _drift("batch", reward, apart, "company in a batch", _QUANTISED)


def _padding(reward: OnnxReward) -> Check:
    long = text_of(reward, min(512, reward.manifest.max_length))
    prompt, short = "Tell me a story.", ["Once.", "A fox ran home.", PAIRS[0].chosen]
    apart = max(
        abs(float(reward.score_together(prompt, [text, long])[0] - reward.score_together(prompt, [text])[0]))
        for text in short
    )
    advice = f"the model reads its padding: feed 'attention_mask', or pool over it; or {_QUANTISED}"
    return _drift("padding", reward, apart, "a long neighbour", advice)


def _tokens(reward: OnnxReward, folder: Path) -> Check:
    wrong = tokens.problems(reward, folder)
    return Check(
        "tokens",
        not wrong,
        "; ".join(wrong) or f"{reward.tokenizer.get_vocab_size()} tokens, all of which the model knows",
        "take the tokenizer.json that came with the model, and its chat template",
    )


def _determinism(reward: OnnxReward, measured: Measured | None) -> Check:
    return determinism(reward, measured, "a random operator (dropout?) is left in the graph: export in evaluation mode")


def determinism(reward: Reward, measured: Measured | None, advice: str) -> Check:
    """Whether built-in responses get the same bits twice, and in the process that measured."""
    first = builtin_scores(reward)
    again = builtin_scores(reward)
    elsewhere = list(measured.scores) if measured else first
    same = all(np.array_equal(first, other, equal_nan=True) for other in (again, elsewhere))
    apart = max(abs(a - b) for other in (again, elsewhere) for a, b in zip(first, other, strict=True))
    return Check(
        "determinism",
        same,
        "the same bits twice" + (", and in another process" if measured else "")
        if same
        else f"scores of the same responses differ by {apart:.2g}",
        advice,
        {"largest_difference": apart},
    )


def _speed(measured: Measured) -> Check:
    parts = []
    for size in measured.sizes:
        capped = f" (all that it reads of {size.asked})" if size.tokens < size.asked else ""
        memory = "" if size.peak_bytes is None else f", peak {size.peak_bytes / 2**20:.0f} MiB"
        parts.append(f"{size.tokens} tokens{capped}: {size.scores_per_s:.3g} scores/s{memory}")
    return Check("speed", True, "; ".join(parts), figures={"sizes": [vars(size) for size in measured.sizes]})


_FED = (
    "look at input.kind, template, index and sign in reward.json; or it was made for other texts than these",
    "it prefers the worse answers: turn graph.sign in reward.json",
)


def ranking(name: str, reward: Reward, pairs: Sequence[Pair], advice: tuple[str, str] = _FED) -> Check:
    """Passed where the share of pairs ranked right is above one half beyond chance.

    ``advice``: for a reward that ranks by chance, and for one that ranks the wrong way round.
    """
    scores = score_pairs(reward, pairs)
    scores[~np.isfinite(scores).all(axis=1)] = (0, 1)  # no ranking at all is a wrong one
    share = share_right(scores)
    low, high = wilson(share * len(pairs), len(pairs))
    groups = sorted({pair.source for pair in pairs})
    detail = {group: share_right(scores[[pair.source == group for pair in pairs]]) for group in groups}
    shown = ", ".join(f"{group} {value:.2f}" for group, value in detail.items()) if 1 < len(groups) <= 4 else ""
    return Check(
        name,
        low > 0.5,
        f"{share:.3f} ({low:.3f} to {high:.3f}) of {len(pairs)} pairs ranked right" + (f": {shown}" if shown else ""),
        advice[high < 0.5],
        {"pairs": len(pairs), "share": share, "low": low, "high": high, "by_source": detail},
    )

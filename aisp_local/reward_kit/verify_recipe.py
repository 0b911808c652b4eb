"""Checks of a recipe: a TOML file of rules, models and servers (docs/reward-rules.md)."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aisp_local.errors import AispError
from aisp_local.reward_kit import speed
from aisp_local.reward_kit.good_bad import PAIRS
from aisp_local.reward_kit.pairs import Pair
from aisp_local.reward_kit.speed import Measured, Size
from aisp_local.reward_kit.verify import HARD, Check, determinism, not_loaded, ranking, told, verify
from aisp_local.rewards import Composite
from aisp_local.rewards.recipe import Recipe, read_recipe

_WORDS = (50, 200, 800)
_PROMPT = "Tell me a story."
_WEIGHED = (
    "the weights do not prefer what these pairs prefer: `aisp-local reward score` shows the whole, and --json of "
    "`aisp-local generate` each part",
    "it prefers the worse answers: turn the sign of a weight, or of a range",
)


def verify_recipe(
    path: Path, pairs: Sequence[Pair] | None = None, on_check: Callable[[Check], None] | None = None
) -> list[Check]:
    """All checks, ``on_check`` called after each. A recipe that does not load has only the check that says so.

    ``pairs``: preferences that it must rank right. Parts without mean and std are normalised on built-in answers.
    """
    return told(_checks(path, pairs), on_check)


def _checks(path: Path, pairs: Sequence[Pair] | None) -> Iterator[Check]:
    try:
        recipe = read_recipe(path)
    except AispError as error:
        yield not_loaded("recipe", error)
        return
    yield _loaded(recipe)
    for folder, ranks in _folders(recipe).items():
        yield _model(folder, ranks)
    for part, ingredient in zip(recipe.reward.parts, recipe.ingredients, strict=True):
        if ingredient.kind == "server":
            yield _server(part.label, Composite([part.reward]))
    try:
        local = _without_servers(recipe)
        if local is not None:
            yield from _local(local, path)
        if pairs is not None:
            yield ranking("given pairs", _measured(recipe.reward), pairs, _WEIGHED)
    except AispError as error:  # a model or a server that fails
        yield Check("scores", False, str(error), "see the checks above")


def _loaded(recipe: Recipe) -> Check:
    kinds = Counter(ingredient.kind for ingredient in recipe.ingredients)
    names = {"reward": "model", "rule": "rule", "server": "server"}
    parts = ", ".join(f"{n} {names[kind]}{'s' if n > 1 else ''}" for kind, n in kinds.items())
    patterns = sum(len(i.keys.get("patterns", ())) for i in recipe.ingredients if i.kind == "rule")
    compiled = f"; {patterns} regular expression{'s compile' if patterns > 1 else ' compiles'}" if patterns else ""
    judge = "" if recipe.judge is None else f"; judge {recipe.judge.name}"
    return Check(
        "recipe",
        True,
        parts + compiled + judge,
        figures={"parts": len(recipe.ingredients), "patterns": patterns},
    )


def _folders(recipe: Recipe) -> dict[Path, bool]:
    """The reward folders of parts and judge, and whether each has to rank good answers above bad ones."""
    found: dict[Path, bool] = {}
    for part, ingredient in zip(recipe.reward.parts, recipe.ingredients, strict=True):
        if ingredient.folder is not None:
            wanted = ingredient.kind == "reward" and part.weight > 0
            found[ingredient.folder] = found.get(ingredient.folder, False) or wanted
    if recipe.judge is not None:
        of_toml = recipe.judge.suffix == ".toml"
        found = (_folders(read_recipe(recipe.judge, judge=False)) if of_toml else {recipe.judge: True}) | found
    return found


def _model(folder: Path, ranks: bool) -> Check:
    checks = [check for check in verify(folder) if ranks or check.name != "ranking"]
    failed = [check for check in checks if not check.passed]
    return Check(
        "model",
        not failed,
        f"{folder.name}: "
        + ("; ".join(f"{c.name}: {c.says}" for c in failed) or f"{len(checks)} checks of `reward verify` passed"),
        f"aisp-local reward verify {folder}",
        {"folder": str(folder), "checks": [c.name for c in checks], "failed": [c.name for c in failed]},
    )


def _server(label: str, server: Composite) -> Check:
    pair = PAIRS[0]
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:  # where a failure costs the worst score and no more
        warnings.simplefilter("always")
        try:
            good, bad = map(float, server.score(pair.prompt, [pair.chosen, pair.rejected]))
            failed = "; ".join(str(w.message) for w in said)
        except AispError as error:
            failed = str(error)
    if failed:
        return Check("server", False, f"{label}: {failed}", "start it, or look at the part's address, prompt and scale")
    seconds = time.perf_counter() - began
    return Check(
        "server",
        True,
        f"{label}: {good:.2g} for a good answer and {bad:.2g} for a bad one, in {seconds:.1f} s",
        figures={"good": good, "bad": bad, "seconds": seconds},
    )


def _without_servers(recipe: Recipe) -> Composite | None:
    """What is computed here, with every scale measured."""
    whole = recipe.reward
    both = zip(whole.parts, recipe.ingredients, strict=True)
    parts = [part for part, ingredient in both if ingredient.kind != "server"]
    return _measured(Composite(parts, combine=whole.combine, k=whole.k, name=whole.name)) if parts else None


def _measured(reward: Composite) -> Composite:
    texts = [text for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    return reward.calibrate(_PROMPT, texts) if reward.uncalibrated else reward


def _local(reward: Composite, path: Path) -> Iterator[Check]:
    finite = _finite(reward)
    yield finite
    if not finite.passed:
        return
    yield _shares(reward)
    measured: Measured | None = None
    slow = ""
    try:
        measured = speed.measure(path, "verify_recipe")
    except AispError as error:
        slow = str(error)
    yield determinism(reward, measured, "a part is not a function of the text alone: verify the models")
    if measured is None:
        yield Check("speed", False, slow, "run: aisp-local reward score FILE TEXT, and see what it says")
        return
    shown = "; ".join(f"{size.tokens} words: {size.scores_per_s:.3g} scores/s" for size in measured.sizes)
    memory = measured.sizes[-1].peak_bytes
    shown += "" if memory is None else f"; peak {memory / 2**20:.0f} MiB"
    sizes = [{"words": s.tokens, "scores_per_s": s.scores_per_s, "peak_bytes": s.peak_bytes} for s in measured.sizes]
    yield Check("speed", True, shown, figures={"sizes": sizes})


def _finite(reward: Composite) -> Check:
    bad = set()
    for prompt, texts in (("", HARD), *((pair.prompt, (pair.chosen, pair.rejected)) for pair in PAIRS)):
        scores, parts = reward.score_parts(prompt, texts)
        bad |= {name for name, values in parts.items() if not np.isfinite(values).all()}
        bad |= {reward.name} if not np.isfinite(scores).all() else set()
    return Check(
        "finite",
        not bad,
        f"{len(HARD) + 2 * len(PAIRS)} scores of every part, "
        + (f"some of {', '.join(sorted(bad))} not finite" if bad else "all of them finite"),
        "look at the weights and at 'mean' and 'std'; verify the models",
    )


def _shares(reward: Composite) -> Check:
    """How much each part has to say: the standard deviation of what it adds, over the built-in answers."""
    values: dict[str, list[float]] = {part.label: [] for part in reward.parts}
    for pair in PAIRS:
        _, parts = reward.score_parts(pair.prompt, [pair.chosen, pair.rejected])
        for part in reward.parts:
            weight = part.weight if reward.combine == "sum" else 1.0
            values[part.label] += (weight * part.scaled(parts[part.label])).tolist()
    spreads = {name: float(np.std(found)) for name, found in values.items()}
    shown = ", ".join(f"{name} {spread:.2g}" for name, spread in spreads.items())
    return Check("spread", True, f"standard deviation over built-in answers: {shown}", figures={"spreads": spreads})


def child() -> None:
    """What the process that measures does."""
    reward = _without_servers(read_recipe(Path(sys.argv[1]), judge=False))
    assert reward is not None
    speeds = [(n, speed.speed_of(reward, speed.words(n))) for n in _WORDS]
    speed.report(reward, [Size(n, n, per_second, speed.peak()) for n, per_second in speeds])

"""The contests of several pairs, and the files that are left of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench import quality, value
from aisp_local.bench.contest import ENTRIES, Contest, Entry, Pair, Run, Store, prompt_sets, setup
from aisp_local.bench.contest_plot import curves
from aisp_local.bench.contest_report import BASE, LEGEND, summary, table
from aisp_local.bench.machine import describe
from aisp_local.errors import InputError
from aisp_local.files import read_text, write_output
from aisp_local.finite import finite


def shipped_pairs() -> list[Pair]:
    """The pairs that come with the project."""
    sets, model = prompt_sets(), str(shipped.model())
    reward, judge = str(shipped.reward()), str(shipped.judge())
    rewards = {
        "stories": (reward, judge),
        "stories-judge": (judge, reward),
        "stories-words": (str(Path(__file__).with_name("words.toml")), reward),
    }
    stories, dialogs = sets["stories"], sets["dialogs"]
    pairs = [
        Pair(name, model, scored, stories["tuning"], stories["evaluation"], judge=judged)
        for name, (scored, judged) in rewards.items()
    ]
    talker, cheer, cheered = map(str, (shipped.talker(), shipped.talker_reward(), shipped.talker_judge()))
    return [*pairs, Pair("dialogs", talker, cheer, dialogs["tuning"], dialogs["evaluation"], judge=cheered)]


def chosen_pairs(
    model: Path | None,
    reward: Path | None,
    judge: Path | None,
    prompts: Path | None,
    names: Sequence[str],
    max_prompts: int | None,
    max_tokens: int,
) -> list[Pair]:
    """The pairs of a command line. Raises InputError for what does not fit together."""
    if model is None and reward is None and prompts is None:
        if judge is not None:
            raise InputError("--judge goes with -m or -r; the shipped pairs have their own")
        pairs = shipped_pairs()
        unknown = sorted(set(names) - {pair.name for pair in pairs})
        if unknown:
            raise InputError(f"the pair {unknown[0]!r} is unknown; use {', '.join(pair.name for pair in pairs)}")
        pairs = [pair for pair in pairs if not names or pair.name in names]
    else:
        if names:
            raise InputError("--pair names a shipped pair; leave it out, or -m, -r and --prompts")
        lists = prompt_sets()["stories"] if prompts is None else _read_prompts(prompts)
        path = shipped.model() if model is None else model
        scorer = shipped.reward() if reward is None else reward
        judging = None if judge is None else str(judge)
        pairs = [Pair(Path(path).stem, str(path), str(scorer), lists["tuning"], lists["evaluation"], judge=judging)]
    return [
        replace(pair, tuning=pair.tuning[:max_prompts], evaluation=pair.evaluation[:max_prompts], max_tokens=max_tokens)
        for pair in pairs
    ]


def _read_prompts(path: Path) -> dict[str, list[str]]:
    text = read_text(path)
    try:
        lists = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); give a file of prompts") from error
    for name in ("tuning", "evaluation"):
        found = lists.get(name) if isinstance(lists, dict) else None
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(text, str) and text.strip() for text in found)
        ):
            raise InputError(f"{path} has no list of prompts {name!r}; give an object with tuning and evaluation")
        if twice := [text for i, text in enumerate(found) if text in found[:i]]:
            raise InputError(f"{path} has the prompt {twice[0]!r} twice in {name!r}; it would count as two")
    return {name: lists[name] for name in ("tuning", "evaluation")}


def chosen_entries(labels: Sequence[str]) -> list[Entry]:
    """The rows of a command line, best-of-n among them. Raises InputError for an unknown one."""
    unknown = sorted(set(labels) - {entry.label for entry in ENTRIES})
    if unknown:
        raise InputError(f"the row {unknown[0]!r} is unknown; use {'; '.join(entry.label for entry in ENTRIES)}")
    return [entry for entry in ENTRIES if not labels or entry.label in labels or entry.label == BASE]


def play(
    pairs: Sequence[Pair],
    entries: Sequence[Entry],
    out: Path,
    *,
    budgets: Sequence[int],
    exact_kl: int,
    seed: int,
    threads: int | None,
    say: Callable[[str], None],
) -> Iterator[tuple[Pair, dict[str, list[Run]]]]:
    """The contests, pair by pair; their runs are kept in OUT. Raises InputError when it cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); give another folder") from error
    store = Store(out / "runs.jsonl")
    for pair in pairs:
        with Aligner.load(pair.model, pair.reward, judge=pair.judge, threads=threads) as aligner:
            more, playing = {}, list(entries)
            if any(entry.method == _LEARNT for entry in entries):
                path = _value(pair, aligner, out, seed, say)
                more = {_LEARNT: {"value": path}}
                playing = [entry for entry in entries if entry.method != _LEARNT or path is not None]
            contest = Contest(pair, aligner, store, budgets=budgets, seed=seed, say=say, more=more)
            played = contest.play(playing, exact_kl)
        yield pair, played


def _value(pair: Pair, aligner: Aligner, out: Path, seed: int, say: Callable[[str], None]) -> Path | None:
    """The file of a value function that was trained on the tuning prompts, now if it is missing; None without torch."""
    asked = hashlib.sha256(json.dumps([setup(aligner, pair.max_tokens), seed, *pair.tuning]).encode()).hexdigest()
    path = out / f"{pair.name}-{asked[:16]}.value.safetensors"
    if path.exists():
        return path
    if find_spec("torch") is None:
        say(f"{pair.name}: {_LEARNT} is left out; it needs torch: pip install 'aisp-local[train]'")
        return None
    episodes = value.collect(aligner, pair.tuning, n=64, max_tokens=pair.max_tokens, seed=seed, say=lambda line: None)
    found, figures = value.train(episodes, seed=seed)
    found.save(path)
    say(f"{pair.name}: a value function whose last value correlates with the reward by {figures['last']:.2f}")
    return path


def run(
    pairs: Sequence[Pair],
    entries: Sequence[Entry],
    out: Path,
    *,
    budgets: Sequence[int],
    exact_kl: int,
    seed: int,
    threads: int | None,
    say: Callable[[str], None],
    show: Callable[[str], None],
    command: str,
) -> None:
    """Play the contests and write report.md and report.json. ``command`` makes them again.

    Raises InputError when OUT cannot be used.
    """
    machine = describe()
    text = [", ".join(f"{name} {value}" for name, value in machine.items()), "", f"Made again by `{command}`.", ""]
    text += [LEGEND, ""]
    reports = []
    for pair, played in play(
        pairs, entries, out, budgets=budgets, exact_kl=exact_kl, seed=seed, threads=threads, say=say
    ):
        rows = summary(played, budgets)
        made = table(pair.name, rows, budgets, len(pair.evaluation)).markdown()
        show(made)
        text.append(made)
        reports.append(
            {"pair": pair.name, "model": Path(pair.model).name, "reward": Path(pair.reward).name, "rows": rows}
        )
        write_output(out / f"{pair.name}.svg", curves(pair.name, played))
        # Whole after every pair: a contest that is stopped has a report of what it finished.
        content = {"machine": machine, "command": command, "pairs": reports}
        write_output(out / "report.md", "\n".join(text))
        write_output(out / "report.json", json.dumps(finite(content), indent=1) + "\n")


_LEARNT = "re-control"
QUALITY_PAIRS = ("stories-words", "dialogs")
QUALITY = ("score", "smc", "qalign", "args", "re-control", "best-of-n", "aisp", "misvo")
"""The pairs and the rows of `bench quality` where none are named."""


def run_quality(
    pairs: Sequence[Pair],
    entries: Sequence[Entry],
    out: Path,
    *,
    budgets: Sequence[int],
    exact_kl: int,
    seed: int,
    threads: int | None,
    say: Callable[[str], None],
    command: str,
) -> str:
    """Play the contests and write what they say of quality (see ``quality.write``), anew after every pair.

    ``command`` makes it again.
    """
    machine, reports, text = describe(), list[quality.Report](), ""
    asked = {"budgets": list(budgets), "seed": seed, "prompts with exact KL": exact_kl}
    for pair, played in play(
        pairs, entries, out, budgets=budgets, exact_kl=exact_kl, seed=seed, threads=threads, say=say
    ):
        reports.append(quality.report(pair, played, budgets))
        text = quality.write(out, asked, machine, reports, command)
    return text

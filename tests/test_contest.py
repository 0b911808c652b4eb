"""The contest of methods: played small, stopped and gone on with, and what its figures mean."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local import Aligner
from aisp_local.bench import contest, contest_run
from aisp_local.bench.contest import Contest, Entry, Pair, Run, Store, best_at
from aisp_local.bench.contest_plot import curves
from aisp_local.bench.contest_report import diversity, interval, last_mean, needed, shown, student, summary, table
from aisp_local.cli.main import main
from aisp_local.errors import DecodeError, InputError
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Result

SMALL = ["--max-prompts", "2", "--max-tokens", "12", "--exact-kl", "1", "--threads", "1"]


def play(out: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["bench", "controllers", "-o", str(out), *SMALL, *arguments])
    return done.exit_code, done.output


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--pair", "stories-words"], id="every method"),
        pytest.param(["--method", "score"], id="every pair"),
        pytest.param([], id="every method on every pair", marks=pytest.mark.slow),
    ],
)
def test_shipped_pairs_and_methods(tmp_path: Path, arguments: list[str]) -> None:
    code, output = play(tmp_path / "out", "--budget", "8", "--budget", "16", *arguments)
    assert code == 0, output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    pairs = [pair.name for pair in contest_run.shipped_pairs()]
    assert [pair["pair"] for pair in report["pairs"]] == (["stories-words"] if "--pair" in arguments else pairs)
    labels = [entry.label for entry in contest.ENTRIES if entry.label != "re-control" or find_spec("torch")]
    for pair in report["pairs"]:
        assert [row["method"] for row in pair["rows"]] == (
            ["score", "best-of-n"] if "--method" in arguments else labels
        )
        for row in pair["rows"]:
            mean, low, high = row["best_16"]
            assert low <= mean <= high and mean >= (row["best_8"][0] or mean)
            assert row["logprob"] < 0 < row["diversity"] <= 1
            if row["method"] == "qalign":  # whose later iterations are ends of responses
                assert row["exact_kl"] is row["late_kl"] is None
            elif row["method"] != "best-of-n":
                assert row["exact_kl"] >= 0 and row["late_kl"] >= 0
        assert [row["difference_16"] for row in pair["rows"] if row["method"] == "best-of-n"] == [[0.0, 0.0, 0.0]]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    again = shlex.split(re.findall("Made again by `(.*)`", text)[0])
    told = [*SMALL[:6], "--budget", "8", "--budget", "16", *arguments]
    assert again[:5] == ["aisp-local", "bench", "controllers", "-o", "results"] and sorted(again[5:]) == sorted(told)
    assert text.count("| best-of-n (temperature") == len(report["pairs"])


@pytest.mark.native
def test_a_contest_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--pair", "stories-words", "--method", "score", "--budget", "8", "--budget", "16"]
    assert play(tmp_path / "whole", *arguments)[0] == 0
    whole = (tmp_path / "whole" / "runs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "cut").mkdir()
    lines = whole.splitlines(keepends=True)
    # As an interrupt leaves it: some runs, and a part of a line.
    (tmp_path / "cut" / "runs.jsonl").write_text("".join(lines[:4]) + lines[4][:30], encoding="utf-8")
    searched: list[str] = []
    real = contest.Contest._search

    def search(self: contest.Contest, entry: contest.Entry, *rest: object) -> list[Run]:
        searched.append(entry.label)
        return real(self, entry, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(contest.Contest, "_search", search)
    assert play(tmp_path / "cut", *arguments)[0] == 0
    assert 0 < len(searched) < len(lines) // 2

    def kept(folder: str) -> dict[str, tuple[list[float], float | None]]:
        runs = Store(tmp_path / folder / "runs.jsonl").runs()
        return {f"{run.label} {run.settings} {run.prompt}": (run.rewards, run.late_kl) for run in runs}

    assert kept("cut") == kept("whole")
    searched.clear()
    assert play(tmp_path / "cut", *arguments)[0] == 0
    assert searched == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "nothing"], "the pair 'nothing' is unknown; use stories"),
        (["--method", "magic"], "the row 'magic' is unknown; use score"),
        (["--pair", "stories", "-m", "storyteller"], "--pair names a shipped pair"),
        (["--prompts", "prompts.json"], "has no list of prompts 'evaluation'"),
        (["--prompts", "twice.json"], "twice.json has the prompt 'b' twice in 'evaluation'; it would count as two"),
        (["--prompts", "none.json"], "none.json cannot be read (No such file or directory); check the path"),
    ],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.json").write_text('{"tuning": ["a"], "evaluation": [""]}', encoding="utf-8")
    Path("twice.json").write_text('{"tuning": ["a"], "evaluation": ["b", "c", "b"]}', encoding="utf-8")
    code, output = play(tmp_path / "out", *arguments)
    assert code == 2 and message in output


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is no run of a contest"):
        Store(tmp_path / "runs.jsonl")


def test_a_setting_that_blows_up_is_passed_over(tmp_path: Path) -> None:
    """Best in tuning, over few iterations, and no law left over many: the next best one plays."""
    best = {0.5: 1.0, 1.0: 3.0, 2.0: 2.0, 4.0: 0.0}
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, responses: [float(len(r)) for r in responses]))
    real, played = aligner.generate_many, []

    def generate_many(prompts: Any, *, temperature: float, budget: int, **options: Any) -> Any:
        if (temperature, budget) == (1.0, 8) or temperature == 4.0:
            raise DecodeError("logits that are not finite")
        if budget == 8:
            played.append(temperature)
        results = real(prompts, budget=budget, temperature=temperature, **options)
        return [replace(r, candidates=[replace(c, reward=best[temperature]) for c in r.candidates]) for r in results]

    aligner.generate_many = generate_many  # type: ignore[method-assign]
    entry = Entry("best-of-n", "best-of-n", n=4, grid=[{"temperature": value} for value in best])
    said: list[str] = []
    pair = Pair("p", "m", "r", ["a"], ["b", "c"], max_tokens=6)
    game = Contest(pair, aligner, Store(tmp_path / "runs.jsonl"), budgets=[4, 8], seed=0, say=said.append)
    assert [run.settings for run in game.play([entry], 0)["best-of-n"]] == [{"temperature": 2.0}] * 2
    assert set(played) == {2.0} and sum("not finite" in line for line in said) == 2


def test_a_row_is_tuned_with_the_settings_that_it_plays_with(tmp_path: Path) -> None:
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, responses: [float(len(r)) for r in responses]))
    entry = Entry("cold", "best-of-n", n=4, settings={"min_p": 0.1}, grid=[{"temperature": t} for t in (0.5, 1.0)])
    store = Store(tmp_path / "runs.jsonl")
    pair = Pair("p", "m", "r", ["a"], ["b"], max_tokens=6)
    Contest(pair, aligner, store, budgets=[4], seed=0, say=lambda line: None).play([entry], 0)
    tuned = [run.settings for run in store.runs() if run.prompt == "a"]
    assert tuned == [{"min_p": 0.1, "temperature": 0.5}, {"min_p": 0.1, "temperature": 1.0}]
    assert all(run.settings["min_p"] == 0.1 for run in store.runs() if run.prompt == "b")


def test_a_method_of_hindsight_plays_all_its_settings(tmp_path: Path) -> None:
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, responses: [float(len(r)) for r in responses]))
    real = aligner.generate_many

    def generate_many(prompts: Any, *, temperature: float, **options: Any) -> Any:
        results = real(prompts, temperature=temperature, **options)
        return [replace(r, candidates=[replace(c, reward=temperature % 3) for c in r.candidates]) for r in results]

    aligner.generate_many = generate_many  # type: ignore[method-assign]
    entry = Entry("best-of-n", "best-of-n", n=4, grid=[{"temperature": t} for t in (1.0, 2.0, 4.0)], hindsight=True)
    pair = Pair("p", "m", "r", ["never asked"], ["b", "c"], max_tokens=6)
    store = Store(tmp_path / "runs.jsonl")
    game = Contest(pair, aligner, store, budgets=[4], seed=0, say=lambda line: None)
    assert [run.settings for run in game.play([entry], 0)["best-of-n"]] == [{"temperature": 2.0}] * 2
    assert {run.prompt for run in store.runs()} == {"b", "c"} and len(store.runs()) == 6


def run(rewards: list[float], n: int = 2, answer: str = "a b") -> Run:
    return Run("p", "x", "q", 0, len(rewards), n, {}, rewards, answer, 1.0, 10)


def test_an_answer_may_be_another_than_the_best() -> None:
    """soft-best-of-n is judged and counted by what it chose at each budget, best-of-n by the best."""
    aligner = Aligner(
        FakeEngine(),
        FakeReward(lambda prompt, texts: [float(len(t)) for t in texts]),
        judge=FakeReward(lambda prompt, texts: [-float(len(t)) for t in texts]),
    )
    pair = Pair("p", "m", "r", ["a"], ["b", "c"], max_tokens=9)
    with tempfile.TemporaryDirectory() as folder:
        game = Contest(pair, aligner, Store(Path(folder) / "runs.jsonl"), budgets=[4, 8], seed=0, say=lambda line: None)
        soft = Entry("soft", "soft-best-of-n", n=4, settings={"lambda_": 1e9, "temperature": 3.0})
        best = Entry("best-of-n", "best-of-n", n=4, settings={"temperature": 3.0})
        played = game.play([soft, best], 0)
        again = game.play([soft], 0)["soft"]
    for i, (one, other) in enumerate(zip(played["soft"], played["best-of-n"], strict=True)):
        assert one.rewards == other.rewards and other.chosen == {}
        found = aligner.generate_many(
            ["b", "c"], method="soft-best-of-n", budget=4, n=4, max_tokens=9, seed=0, lambda_=1e9, temperature=3.0
        )[i]
        assert isinstance(found, Result) and found.reward == one.chosen["4"]
        assert one.judged == {budget: -reward for budget, reward in one.chosen.items()}
        assert other.judged == {"4": -max(other.rewards[:4]), "8": -max(other.rewards)}
    assert best_at(played["soft"], 4).tolist() == [run.chosen["4"] for run in played["soft"]]
    assert (best_at(played["soft"], 8) < best_at(played["best-of-n"], 8)).any()
    assert needed(played["soft"], 0.0) is None and again == played["soft"]
    drawn = curves("p", played)
    assert drawn.count("<polyline") == 2 and "soft" not in drawn, "a curve and its name"


@pytest.mark.parametrize(
    ("freedom", "known"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (11, 2.201), (23, 2.069)]
)
def test_quantiles_of_t(freedom: int, known: float) -> None:
    assert student(freedom) == pytest.approx(known, abs=0.004)


def test_intervals_hold_what_they_promise() -> None:
    """Of few prompts too: 19 times in 20 the mean lies within."""
    rng = np.random.default_rng(0)
    for size in (3, 4, 12):
        found = [interval(rng.standard_normal(size)) for _ in range(2000)]
        assert np.mean([low < 0 < high for _, low, high in found]) == pytest.approx(0.95, abs=0.015)
    assert shown(interval([1.5])) == "1.50" and shown(interval([float("nan"), 2.0, 2.0])) == "2.00 [2.00, 2.00]"
    assert shown(interval([])) == "-"


def test_runs_of_another_model_or_reward_are_not_taken(tmp_path: Path) -> None:
    """Nor those with another judge or limit; the same question is asked once."""
    asked: list[str] = []

    def reward(name: str, sign: float) -> FakeReward:
        made = FakeReward(lambda prompt, texts: [sign * len(text) for text in texts])
        made.name = name
        return made

    def play(made: FakeReward, max_tokens: int = 6, judge: FakeReward | None = None, vocabulary: int = 30) -> Run:
        aligner = Aligner(FakeEngine(vocabulary=vocabulary), made, judge=judge)
        real = aligner.generate_many

        def generate_many(*args: Any, **options: Any) -> Any:
            asked.append(made.name)
            return real(*args, **options)

        aligner.generate_many = generate_many  # type: ignore[method-assign]
        store = Store(tmp_path / "runs.jsonl")
        game = Contest(
            Pair("p", "m", "r", ["a"], ["b"], max_tokens), aligner, store, budgets=[4], seed=0, say=lambda line: None
        )
        (run,) = game.play([Entry("best-of-n", "best-of-n", n=4, settings={"temperature": 1.0})], 0)["best-of-n"]
        return run

    first, second = play(reward("long", 1)), play(reward("short", -1))
    assert min(first.rewards) > 0 > max(second.rewards) and len(asked) == 2
    assert play(reward("long", 1)) == first and len(asked) == 2
    play(reward("long", 1), max_tokens=5)
    play(reward("long", 1), judge=reward("short", -1))
    play(reward("long", 1), vocabulary=20)
    assert len(asked) == 5


def test_runs_with_other_code_threads_or_machine_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, texts: [0.0 for _ in texts]))
    first = contest.setup(aligner, 6)
    assert contest.setup(aligner, 6) == first
    with monkeypatch.context() as changed:
        changed.setattr(contest, "_code", lambda: "other")
        assert contest.setup(aligner, 6) != first
    monkeypatch.setattr(contest, "describe", lambda: {"processor": "other"})
    assert contest.setup(aligner, 6) != first


def test_exact_kl_is_of_the_second_iteration_and_the_last(tmp_path: Path) -> None:
    """Of the prompts that it is asked for, and afterwards: runs that are kept without it are not made again."""
    aligner = Aligner(FakeEngine(vocabulary=30), FakeReward(lambda prompt, texts: [float(len(t)) for t in texts]))
    asked: list[bool] = []
    real = aligner.generate_many

    def generate_many(*args: Any, kl: bool = False, **options: Any) -> Any:
        asked.append(kl)
        results = real(*args, kl=kl, **options)
        if not kl:
            return results
        told = [r for r in results if isinstance(r, Result)]
        return [replace(r, iterations=tuple(replace(s, kl=float(s.iteration)) for s in r.iterations)) for r in told]

    aligner.generate_many = generate_many  # type: ignore[method-assign]
    pair = Pair("p", "m", "r", ["a"], ["b", "c", "d"], max_tokens=9)
    entries = [Entry("x", "best-of-n", n=4), Entry("one", "best-of-n", n=None), Entry("chained", "qalign", n=4)]

    def play(exact: int) -> list[list[tuple[float | None, float | None]]]:
        store = Store(tmp_path / "runs.jsonl")
        contest = Contest(pair, aligner, store, budgets=[32], seed=0, say=lambda line: None)
        return [[(run.exact_kl, run.late_kl) for run in runs] for runs in contest.play(entries, exact).values()]

    none = (None, None)
    assert play(0) == [[none] * 3] * 3 and asked == [False] * 3
    asked.clear()
    found = [[(2.0, 8.0), (2.0, 8.0), none], [(1.0, 1.0), (1.0, 1.0), none], [none] * 3]
    assert play(2) == found and asked == [True, True]
    asked.clear()
    assert play(2) == found and asked == []


def test_a_contest_whose_runs_cannot_be_kept_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no method that this model cannot be used with."""
    aligner = Aligner(FakeEngine(vocabulary=30), FakeReward(lambda prompt, texts: [0.0 for _ in texts]))
    store = Store(tmp_path / "runs.jsonl")

    def append(path: Path, data: bytes) -> None:
        raise InputError("it is full")

    monkeypatch.setattr(contest, "append", append)
    pair = Pair("p", "m", "r", ["a"], ["b"], max_tokens=9)
    with pytest.raises(contest.StoreError, match="it is full"):
        Contest(pair, aligner, store, budgets=[8], seed=0, say=lambda line: None).play([Entry("x", "aisp", n=4)], 0)
    with pytest.raises(InputError, match="it is full"):
        Store(tmp_path / "runs.jsonl")


def test_an_interrupt_ends_the_contest_and_half_a_search_is_not_kept(tmp_path: Path) -> None:
    asked = []

    def stopped(prompt: object, texts: Sequence[str]) -> list[float]:
        asked.append(len(texts))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return [float(len(text)) for text in texts]

    aligner = Aligner(FakeEngine(vocabulary=30), FakeReward(stopped))
    store = Store(tmp_path / "runs.jsonl")
    pair = Pair("p", "m", "r", ["a"], ["b", "c"], max_tokens=9)
    entry = Entry("best-of-n", "best-of-n", n=4, settings={"temperature": 3.0})
    with pytest.raises(KeyboardInterrupt):
        Contest(pair, aligner, store, budgets=[32], seed=0, say=lambda line: None).play([entry], 0)
    assert store.runs() == []
    played = Contest(pair, aligner, store, budgets=[32], seed=0, say=lambda line: None).play([entry], 0)
    assert [len(run.rewards) for run in played["best-of-n"]] == [32, 32]


@pytest.mark.parametrize("method", ["best-of-n", "soft-best-of-n"])
def test_kept_runs_say_what_was_chosen_at_other_budgets(tmp_path: Path, method: str) -> None:
    def play(folder: str, budgets: Sequence[int]) -> list[Run]:
        reward = FakeReward(lambda prompt, texts: [float(len(text)) for text in texts])
        aligner = Aligner(FakeEngine(vocabulary=30), reward, judge=FakeReward(lambda p, texts: [1.0 for _ in texts]))
        (tmp_path / folder).mkdir(exist_ok=True)
        store = Store(tmp_path / folder / "runs.jsonl")
        pair = Pair("p", "m", "r", ["a"], ["b", "c"], max_tokens=9)
        entry = Entry("x", method, n=4, settings={"temperature": 3.0})
        return Contest(pair, aligner, store, budgets=budgets, seed=0, say=lambda line: None).play([entry], 0)["x"]

    play("kept", [8, 16])
    again, fresh = play("kept", [4, 16]), play("new", [4, 16])
    for at in (4, 16):
        np.testing.assert_array_equal(best_at(again, at), best_at(fresh, at))
        assert [run.judged[str(at)] for run in again] == [run.judged[str(at)] for run in fresh] == [1.0, 1.0]


def test_a_search_that_waits_for_others_has_a_clock_of_its_own(tmp_path: Path) -> None:
    """All rollouts in one iteration: prompts are searched one after the other."""

    def slowly(prompt: object, texts: Sequence[str]) -> list[float]:
        time.sleep(0.05)
        return [float(len(text)) for text in texts]

    aligner = Aligner(FakeEngine(vocabulary=30), FakeReward(slowly))
    pair = Pair("p", "m", "r", [], ["a", "b", "c", "d"], max_tokens=9)
    game = Contest(pair, aligner, Store(tmp_path / "runs.jsonl"), budgets=[8], seed=0, say=lambda line: None)
    (runs,) = game.play([Entry("one", "best-of-n", n=None, settings={"temperature": 3.0})], 0).values()
    times = [run.clock[-1] for run in runs]
    assert min(times) >= 0.05
    assert sum(times) == pytest.approx(sum(run.seconds for run in runs), rel=0.3)


def test_all_in_one_iteration_say_nothing_of_fewer() -> None:
    runs = [run([1.0, 3.0, 2.0, 5.0], n=4), run([0.0, 1.0, 4.0, 2.0], n=4)]
    assert np.isnan(best_at(runs, 2)).all() and best_at(runs, 4).tolist() == [5.0, 4.0]
    base = [run([1.0, 3.0, 2.0, 5.0]), run([0.0, 1.0, 4.0, 2.0])]
    made = table("p", summary({"best-of-n": base, "streamed": runs}, [2, 4]), [2, 4], 2).markdown()
    assert "| streamed | - | 4.50 [-1.85, 10.85] | - | +0.00 [" in made
    (base_row, streamed) = summary({"best-of-n": base, "streamed": runs}, [2, 4])
    assert np.isnan(streamed["ahead_of_base_best"][2][0]) and streamed["ahead_of_base_best"][4][0] == 0.0
    assert base_row["ahead_of_base_best"][2] == pytest.approx(interval([-2.0, -3.0]))
    sd = np.mean([np.std(one.rewards) for one in base])  # of the last two rollouts, over those of all four
    ends = [(3.5 - 2.75) / sd, (3.0 - 1.75) / sd]
    assert base_row["last_mean_sd"] == pytest.approx(interval(ends)) and base_row["base_mean"] == 2.25


def test_of_many_curves_those_are_drawn_that_count() -> None:
    labels = ["score", "smc", "qalign", "re-control", "best-of-n", "cem", "aisp", "aisp-static", "aisp-held", "misvo"]
    drawn = curves("p", {label: [run([1.0, 2.0])] for label in labels})
    assert [label for label in labels if f">{label}<" in drawn] == [
        label for label in labels if label not in ("qalign", "re-control")
    ]


def test_a_row_that_cannot_be_played_is_left_out() -> None:
    class AtTheEnd(FakeReward):
        unfinished = False

    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        aligner = Aligner(FakeEngine(), AtTheEnd(lambda prompt, texts: [float(len(t)) for t in texts]))
        pair = Pair("p", "m", "r", ["a"], ["b"], max_tokens=9)
        store = Store(Path(folder) / "runs.jsonl")
        game = Contest(pair, aligner, store, budgets=[4], seed=0, say=said.append)
        base = Entry("best-of-n", "best-of-n", n=4, grid=[{"temperature": 1.0}], hindsight=True)
        played = game.play([Entry("args", "args", n=2, most=2), base], 0)
        assert list(played) == ["best-of-n"]
        assert any("args is left out; args needs scores of unfinished responses" in line for line in said)
        with pytest.raises(InputError, match="temperature"):
            game.play([Entry("best-of-n", "best-of-n", n=4, grid=[{"temperature": -1.0}], hindsight=True)], 0)


def test_the_curves_of_a_contest() -> None:
    """Means over prompts of the best so far, after each iteration."""
    played = {
        "best-of-n": [run([1.0, 3.0, 2.0, 5.0, 6.0, 5.0]), run([0.0, 1.0, 4.0, 2.0, 4.0, 7.0])],
        "other": [run([2.0] * 6)] * 2,
        "other, varied": [run([9.0] * 6)] * 2,
    }
    drawn = curves("p", played)
    assert "p: best reward so far" in drawn and "varied" not in drawn
    places = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(r'<polyline class="series-\d" points="([^"]*)"/>', drawn)
    ]
    rising, flat = places[:2]
    assert len(rising) == len(flat) == 3 and len({y for _, y in flat}) == 1
    # 2, 4.5 and 6.5 after whole iterations, on an axis that has 2 where the flat one is.
    ups = [flat[0][1] - y for _, y in rising]
    assert ups[0] == 0 and ups[1] / ups[2] == pytest.approx(2.5 / 4.5, abs=0.01)
    assert curves("p", {"best-of-n": [run([1.0, 2.0], n=2)]}), "a single iteration"


def test_figures() -> None:
    runs = [run([1.0, 3.0, 2.0, 5.0]), run([0.0, 1.0, 4.0, 2.0])]
    np.testing.assert_array_equal(best_at(runs, 2), [3, 1])
    assert needed(runs, 3.5) == 4  # mean of 3 and 4, in the second iteration
    assert needed(runs, 5.0) is None
    assert last_mean(runs[0]) == 3.5 and last_mean(runs[1]) == 3.0
    assert diversity("a b c d") == 1.0
    assert diversity("a b a b a b") == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)
    rows = summary({"best-of-n": runs, "other": [run([2.0, 4.0, 6.0, 6.0]), run([5.0, 0.0, 4.0, 8.0])]}, [2, 4])
    assert rows[1]["difference_4"][0] == pytest.approx(7 - 4.5)
    assert rows[1]["rollouts_to_base_best"] == 2
    sd = np.mean([np.std(r.rewards) for r in runs])
    assert rows[1]["best_sd_over_base"] == pytest.approx((7 - 4.5) / sd)
    made = table("p", rows, [2, 4], 2).markdown()
    assert "| other | 4.50 [-1.85, 10.85] |" in made and "+2.50 [" in made and "over best-of-n at 4" in made
    leads = summary({"score": [run([9.0] * 4)] * 2, "best-of-n": runs}, [2, 4])
    assert leads[1]["lead_4"][0] == pytest.approx(4.5) and leads[0]["lead_4"] == (0.0, 0.0, 0.0)
    assert "score's lead over it at 2 [95%]" in table("p", leads, [2, 4], 2).markdown()

"""The report of methods: its statistics, its tables, and a page of real runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from aisp_local.bench import quality, rating
from aisp_local.bench.contest import Pair, Run, Store
from aisp_local.bench.quality import best_by, holm, p_value, win_rate
from aisp_local.cli.main import main
from aisp_local.errors import InputError

PAIR = Pair("pair", "model.gguf", "reward", [], ["first <b>prompt</b>", "second"], judge="judge")


def run(label: str, rewards: list[float], n: int = 2, prompt: str = "p", **more: object) -> Run:
    clock = [0.5 * (i + 1) for i in range(len(rewards) // n)]
    made = {"clock": clock, "judged": {"4": 1.0}, "logprob": -3.0, "answer_tokens": 3, "low_logprob": -2.0, "kl": 1.0}
    return Run("pair", label, prompt, 0, len(rewards), n, {}, rewards, f"<i>{label}</i>", 1.0, 9, **(made | more))


def test_p_values_are_shares_of_sign_patterns() -> None:
    d = [0.3, -0.1, 0.8, 0.2, 0.5]
    patterns = list(itertools.product((1, -1), repeat=5))
    extreme = sum(abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= abs(sum(d)) - 1e-12 for signs in patterns)
    assert p_value(d) == pytest.approx(extreme / len(patterns))
    assert p_value([1.0] * 10) == pytest.approx(2 / 2**10)
    assert p_value([0.0] * 4) == 1.0 and p_value([1.0, -1.0]) == 1.0
    # More than can be gone through: drawn, and as small as it should be, but never 0.
    assert 0 < p_value([1.0] * 30) < 1e-3 < 0.5 < p_value([1.0, -1.0] * 15)
    assert p_value([float("nan"), 1.0, 1.0]) == p_value([1.0, 1.0]) == 0.5 and np.isnan(p_value([float("nan")]))


def test_corrected_p_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_correcting_keeps_order_and_never_makes_smaller(p: list[float]) -> None:
    corrected = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, corrected, strict=True))
    assert all((corrected[i] <= corrected[j]) for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


def test_wins_and_times() -> None:
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])) == 0.625
    runs = [run("a", [1.0, 2.0, 5.0, 3.0, 9.0, 0.0])]
    assert [best_by(runs, [seconds])[0] for seconds in (0.5, 0.99, 1.0, 1.5, 9.0)] == [2, 2, 5, 9, 9]
    assert np.isnan(best_by(runs, [0.49])[0]), "its first iteration was not there yet"
    assert best_by([runs[0], runs[0]], [1.0, 0.5]).tolist() == [5, 2], "each prompt has its own time"


def test_figures_of_a_report() -> None:
    prompts = PAIR.evaluation
    played = {
        "best-of-n": [run("best-of-n", [0.0, 1.0, 2.0, 1.0], prompt=p) for p in prompts],
        "slow": [run("slow", [0.0, 3.0, 4.0, 1.0], prompt=p, clock=[0.8, 4.0], judged={"4": 0.5}) for p in prompts],
    }
    made = quality.report(PAIR, played, [2, 4])
    base, slow = made.rows
    for row in made.rows:  # best-of-n's time is its own
        assert row["method"] != "best-of-n" or row["by_time"] == row["best"]
    assert base["p"] is None and base["wins"] == 0.5 and slow["wins"] == 1.0 and slow["judge_wins"] == 0.0
    assert slow["p"] == slow["p_holm"] == 0.5  # two prompts
    # In the second that best-of-n's four rollouts take it has finished one iteration, and in half of it none.
    assert slow["by_time"][4][0] == 3.0 and slow["ahead_by_time"][4][0] == 1.0 and slow["best"][4][0] == 4.0
    assert np.isnan(slow["by_time"][2][0]) and np.isnan(slow["ahead_by_time"][2][0])
    assert made.tables[1].rows[1][1] == "-" and made.tables[1].rows[1][2].startswith("3.00")
    assert slow["logprob"] == -1.0 and slow["low_logprob"] == -2.0 and slow["seconds"] == 4.0
    assert [table.name for table in made.tables] == ["pair-rollouts", "pair-time", "pair-needed", "pair-price"]
    for table in made.tables:
        assert all(len(row) == len(table.columns) for row in table.rows) and len(table.rows) == 2
    page = quality.page("title", "about", [made], "bench quality -r '<b>'")
    assert "Made again by <code>bench quality -r &#x27;&lt;b&gt;&#x27;</code>" in page and "Coherence: the mean" in page
    assert "&lt;b&gt;prompt" in page and "&lt;i&gt;slow" in page and "<b>" not in page and "<i>" not in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_prompt_without_an_iteration_in_time_leaves_the_cell_empty() -> None:
    """The others would be a choice of prompts."""
    played = {
        "best-of-n": [run("best-of-n", [0.0, 1.0], prompt=p, clock=[t]) for p, t in zip("ab", (1.0, 3.0), strict=True)],
        "slow": [run("slow", [0.0, 3.0], prompt=p, clock=[2.0]) for p in "ab"],
    }
    base, slow = quality.report(PAIR, played, [2]).rows
    assert base["by_time"][2][0] == 1.0 and np.isnan(slow["by_time"][2][0])


def test_rewards_that_are_not_finite_are_passed_over() -> None:
    nan = float("nan")
    played = {
        "best-of-n": [run("best-of-n", [nan, 1.0, 2.0, nan], prompt=p) for p in PAIR.evaluation],
        "other": [run("other", [nan, nan, nan, 3.0], prompt=p) for p in PAIR.evaluation],
        "none": [run("none", [nan] * 4, prompt=p) for p in PAIR.evaluation],
    }
    base, other, none = (made := quality.report(PAIR, played, [2, 4])).rows
    assert base["best"][2][0] == 1.0 and base["best"][4][0] == 2.0 and base["mean_last"] == 2.0
    assert other["best"][4][0] == 3.0 and np.isnan(other["best"][2][0]) and other["rollouts_to"] == {}
    assert other["p"] == 0.5 and np.isnan(none["p"]) and none["p_holm"] is None
    assert "nan" not in quality.page("title", "about", [made], "bench").split("<h3>first")[0]
    assert all("nan" not in table.markdown() for table in made.tables)


def test_too_few_rollouts_are_said_by_their_number() -> None:
    played = {
        "best-of-n": [run("best-of-n", [float(i) for i in range(32)], n=16, prompt=p) for p in PAIR.evaluation],
        "two": [run("two", [0.0, 1.0], prompt=p) for p in PAIR.evaluation],
    }
    made = quality.report(PAIR, played, [16, 32])
    rewards, time, needs, _ = made.tables
    assert needs.rows[1][1:] == ["more than 2", "more than 2"] and needs.rows[0][1:] == ["16", "32"]
    # What it had in less time, it had by then too.
    assert rewards.rows[1][0] == time.rows[1][0] == "two, 2 rollouts"
    assert time.rows[1][1:5] == ["1.00 [1.00, 1.00]"] * 2 + ["-14.00 [-14.00, -14.00]", "-30.00 [-30.00, -30.00]"]
    assert made.rows[1]["p"] is None and rewards.rows[1][5] == "-" and made.rows[1]["ahead"][32][0] == -30.0


def test_runs_without_times_are_refused() -> None:
    played = {"best-of-n": [run("best-of-n", [0.0, 1.0], clock=[])]}
    with pytest.raises(InputError, match="older version"):
        quality.report(PAIR, played, [2])


@pytest.mark.native
def test_the_command_on_shipped_models(tmp_path: Path) -> None:
    small = ["--max-prompts", "2", "--max-tokens", "12", "--exact-kl", "1", "--threads", "1", "--budget", "8"]
    arguments = ["bench", "quality", "-o", str(tmp_path / "out"), *small, "--budget", "16", "--pair", "stories"]
    done = CliRunner().invoke(main, [*arguments, "--method", "score", "--method", "qalign"])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    (pair,) = content["pairs"]
    assert (pair["name"], pair["model"], pair["max_tokens"]) == ("stories", "storyteller.gguf", 12)
    assert content["asked"] == {"budgets": [8, 16], "seed": 0, "prompts with exact KL": 1}
    for row in pair["rows"]:  # from the answers: the means that the table shows
        told = [answer for answer in pair["answers"] if answer["method"] == row["method"]]
        assert len(told) == 2 and np.mean([a["rewards"]["16"] for a in told]) == pytest.approx(row["best"]["16"][0])
        if row["method"] == "qalign":  # whose later iterations are ends of responses
            assert row["kl"] is None
        else:
            assert row["kl"] > 0 or row["settings"] == {"temperature": 1.0}, (
                "min-p and temperatures are not the model's"
            )
    (rows,) = [rating.questions(rating.read_answers(tmp_path / "out"), ["score", "best-of-n"], 0)]
    assert {text for question in rows for text in question.texts} <= {answer["answer"] for answer in pair["answers"]}
    assert [row["method"] for row in pair["rows"]] == ["score", "qalign", "best-of-n"]
    for row in pair["rows"]:
        assert row["judge"] is not None and row["low_logprob"] <= row["logprob"] + 1e-5 < 0 < row["seconds"]
        best, fewer = row["best"]["16"][0], row["best"]["8"][0]
        assert fewer is None if row["n"] > 8 else best >= fewer, "of one iteration of 16 eight say nothing"
    text = (tmp_path / "out" / "quality.md").read_text(encoding="utf-8")
    assert text in done.output and "in the time that best-of-n takes" in text
    assert "<svg" in (tmp_path / "out" / "quality.html").read_text(encoding="utf-8")
    # Every response is kept, with its reward.
    Store(tmp_path / "out" / "runs.jsonl")
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(len(r["texts"]) == len(r["rewards"]) == r["budget"] for r in runs)
    assert all(r["answer"] == r["texts"][int(np.argmax(r["rewards"]))] for r in runs)


def test_a_judge_needs_a_pair_of_its_own(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "quality", "-o", str(tmp_path), "--judge", "x"])
    assert done.exit_code == 2 and "--judge goes with -m or -r" in done.output

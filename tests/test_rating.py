"""Blind ratings: what is asked, what is kept, what is counted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from aisp_local.bench.contest import Run, Store
from aisp_local.bench.rating import Question, Rating, Ratings, questions, table
from aisp_local.cli.main import main
from aisp_local.errors import InputError

PROMPTS = ("one", "two", "three")


def stored(folder: Path, labels: tuple[str, ...] = ("a", "b")) -> Store:
    runs = [
        Run("pair", label, prompt, 0, budget, 2, {}, [0.0, float(ord(label[0]))], f"{label} {prompt} {budget}", 1.0, 1)
        for label in labels
        for prompt in PROMPTS
        for budget in (4, 8)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs), encoding="utf-8")
    return Store(folder / "runs.jsonl")


def test_every_two_answers_of_the_largest_budget_in_a_drawn_order(tmp_path: Path) -> None:
    asked = questions(stored(tmp_path, ("a", "b", "c")), [], 0)
    assert len({question.key for question in asked}) == len(asked) == 9
    for question in asked:
        assert question.texts == (f"{question.first} {question.prompt} 8", f"{question.second} {question.prompt} 8")
    orders = {
        question.first < question.second for seed in range(5) for question in questions(stored(tmp_path), [], seed)
    }
    assert orders == {True, False}
    assert [q.key for q in questions(stored(tmp_path), [], 3)] == [q.key for q in questions(stored(tmp_path), [], 3)]
    with pytest.raises(InputError, match="no runs of 'x'"):
        questions(stored(tmp_path), ["x"], 0)
    with pytest.raises(InputError, match="no two different answers"):
        questions(stored(tmp_path), ["a"], 0)


def test_a_rating_counts_for_whoever_was_shown() -> None:
    ratings = [
        Rating("pair", "one", "a", "b", 1.0),
        Rating("pair", "two", "b", "a", 1.0),  # b was better
        Rating("pair", "three", "b", "a", 0.0),  # a was
        Rating("pair", "four", "a", "b", 0.5),
    ]
    rewards = {("pair", prompt, label): value for prompt in PROMPTS for label, value in (("a", 2.0), ("b", 1.0))}
    (row,) = table(ratings, rewards).rows
    assert row[:4] == ["pair", "a", "b", 4] and str(row[4]).startswith("62% [") and row[5] == "100%" and row[6] == "67%"


def test_the_command_keeps_what_was_said_and_goes_on(tmp_path: Path) -> None:
    stored(tmp_path)
    first = CliRunner().invoke(main, ["bench", "rate", str(tmp_path)], input="1\nwhat\n2\nq\n")
    assert first.exit_code == 0 and "please say 1, 2, = or q" in first.output and "2 ratings" in first.output
    # Nothing tells whose answers are shown before they are rated.
    assert "score" not in first.output and "best-of-n" not in first.output
    kept = Ratings(tmp_path / "ratings.jsonl").all
    assert [rating.score for rating in kept] == [1.0, 0.0]
    rest = CliRunner().invoke(main, ["bench", "rate", str(tmp_path)], input="=\n")
    assert rest.exit_code == 0 and "3 of 3" in rest.output and "3 ratings" in rest.output
    done = CliRunner().invoke(main, ["bench", "rate", str(tmp_path)], input="")
    assert done.exit_code == 0 and "of 3 ---" not in done.output
    assert len(Ratings(tmp_path / "ratings.jsonl").all) == 3


def test_the_end_of_the_input_is_enough(tmp_path: Path) -> None:
    stored(tmp_path)
    done = CliRunner().invoke(main, ["bench", "rate", str(tmp_path)], input="1\n")
    assert done.exit_code == 0 and "1 ratings" in done.output


def test_what_is_no_folder_of_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "rate", str(tmp_path)])
    assert done.exit_code == 2 and "holds no runs.jsonl" in done.output
    (tmp_path / "ratings.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is no rating"):
        Ratings(tmp_path / "ratings.jsonl")


def test_keys_do_not_depend_on_the_order() -> None:
    texts = ("x", "y")
    assert Question("p", "q", "a", "b", texts).key == Question("p", "q", "b", "a", texts).key

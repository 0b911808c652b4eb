"""Blind ratings: what is asked, what is kept, what is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click.testing
import pytest
from click.testing import CliRunner

from aisp_local.bench.contest import Run
from aisp_local.bench.rating import Answer, Question, Rating, Ratings, questions, read_answers, table
from aisp_local.cli.main import main
from aisp_local.errors import InputError

PROMPTS = ("one", "two", "three")


def counted(*labels: str) -> list[Answer]:
    return [
        Answer("pair", prompt, label, f"{label} {prompt}", float(ord(label[0])))
        for label in labels
        for prompt in PROMPTS
    ]


def report(answers: Sequence[Answer]) -> dict[str, Any]:
    """What bench quality writes, as far as it is read."""
    told = [
        {"prompt": a.prompt, "method": a.label, "answer": a.text, "reward": a.reward, "judge": None} for a in answers
    ]
    return {"machine": {}, "pairs": [{"name": "pair", "rows": [], "answers": told}]}


def stored(folder: Path, *labels: str) -> Path:
    (folder / "quality.json").write_text(json.dumps(report(counted(*(labels or ("a", "b"))))), encoding="utf-8")
    return folder


def rated(folder: Path, given: str = "", *more: str) -> click.testing.Result:
    return CliRunner().invoke(main, ["bench", "rate", str(folder), *more], input=given)


def refused(done: click.testing.Result) -> bool:
    """With one sentence, before anything was asked or shown."""
    sentence = done.stderr.startswith("aisp-local: error: ") and done.stderr.count("\n") == 1
    return done.exit_code == 2 and isinstance(done.exception, SystemExit) and sentence and not done.stdout


def test_every_two_answers_in_a_drawn_order() -> None:
    asked = questions(counted("a", "b", "c"), [], 0)
    assert len({question.key for question in asked}) == len(asked) == 9
    for question in asked:
        assert question.texts == (f"{question.first} {question.prompt}", f"{question.second} {question.prompt}")
    two = counted("a", "b")
    assert {q.first < q.second for seed in range(5) for q in questions(two, [], seed)} == {True, False}
    assert questions(two, [], 3) == questions(two, [], 3)
    assert {q.first + q.second for q in questions(counted("a", "b", "c"), ["a", "c"], 0)} <= {"ac", "ca"}
    with pytest.raises(InputError, match="no answers of 'x'; there are a, b"):
        questions(two, ["x"], 0)
    alike = [Answer("pair", "one", label, "the same", 0.0) for label in "ab"]
    for answers, labels in ((two, ["a"]), (alike, [])):
        with pytest.raises(InputError, match="no two different answers"):
            questions(answers, labels, 0)


def test_answers_are_those_that_the_report_counts(tmp_path: Path) -> None:
    """Not those of other settings, of tuning prompts or of the last run, which are kept beside it."""
    stored(tmp_path)
    runs = [
        Run("pair", label, prompt, 0, 256, 2, {"knob": knob}, [9.0], f"not counted, {knob} {label}", 1.0, 1)
        for knob in (0.5, 2.0)
        for label in "ab"
        for prompt in (*PROMPTS, "of tuning")
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs), encoding="utf-8")
    done = rated(tmp_path, "=\n" * 3)
    assert done.exit_code == 0 and "not counted" not in done.output and "of tuning" not in done.output
    assert all(f"] {label} {prompt}\n" in done.output for label in "ab" for prompt in PROMPTS)
    # The reward too: b's is the higher one, not alike.
    assert "| pair | a | b | 3 | 50% [13, 87] | 0% | - |" in done.output


def test_what_a_report_says_of_each_answer(tmp_path: Path) -> None:
    answers = [*counted("a"), Answer("pair", "one", "b", "", None), Answer("pair", "two", "b", "x", -1.5)]
    (tmp_path / "quality.json").write_text(json.dumps(report(answers)), encoding="utf-8")
    assert read_answers(tmp_path) == answers


def test_a_rating_counts_for_whoever_was_shown() -> None:
    ratings = [
        Rating("pair", "one", "a", "b", 1.0),
        Rating("pair", "two", "b", "a", 1.0),  # b was better
        Rating("pair", "three", "b", "a", 0.0),  # a was
        Rating("pair", "four", "a", "b", 0.5),
    ]
    answers = [Answer("pair", prompt, label, "", value) for prompt in PROMPTS for label, value in (("a", 2), ("b", 1))]
    (row,) = table(ratings, answers).rows
    assert row[:4] == ["pair", "a", "b", 4] and str(row[4]).startswith("62% [") and row[5] == "100%" and row[6] == "67%"
    (row,) = table(ratings, [Answer("pair", "one", "a", "", None), Answer("pair", "one", "b", "", 1.0)]).rows
    assert row[5:] == ["-", "-"]


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        # Examples of R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        ([1.0] * 81 + [0.0] * 182, "31% [26, 37]"),
        ([1.0] * 15 + [0.0] * 133, "10% [6, 16]"),
        ([1.0] + [0.0] * 28, "3% [1, 17]"),
        ([0.0] * 20, "0% [0, 16]"),
        # Of n alike, the far end is z^2 / (n + z^2) away.
        ([1.0] * 3, "100% [44, 100]"),
        ([0.0] * 5, "0% [0, 43]"),
        ([1.0], "100% [21, 100]"),
        # A half is half a win.
        ([0.5] * 4, "50% [15, 85]"),
        ([1.0, 1.0, 0.0, 0.0], "50% [15, 85]"),
    ],
)
def test_intervals_are_wilsons(scores: list[float], shown: str) -> None:
    ratings = [Rating("pair", str(i), "a", "b", score) for i, score in enumerate(scores)]
    assert table(ratings, []).rows[0][4] == shown


def test_the_command_keeps_what_was_said_and_goes_on(tmp_path: Path) -> None:
    stored(tmp_path)
    first = rated(tmp_path, "1\nwhat\n2\nq\n")
    assert first.exit_code == 0 and "please say 1, 2, = or q" in first.output
    # A table would tell whose the last two answers are.
    assert "1 of 3 are left" in first.stderr and "ratings" not in first.stdout
    assert "2 ratings" in rated(tmp_path, "", "--results").stdout
    kept = Ratings(tmp_path / "ratings.jsonl").all
    assert [rating.score for rating in kept] == [1.0, 0.0]
    rest = rated(tmp_path, "=\n")
    assert rest.exit_code == 0 and "3 of 3" in rest.output and "3 ratings" in rest.output
    done = rated(tmp_path)
    assert done.exit_code == 0 and "of 3 ---" not in done.output
    assert len(Ratings(tmp_path / "ratings.jsonl").all) == 3


def test_nothing_tells_whose_answers_are_shown(tmp_path: Path) -> None:
    answers = [Answer("pair", prompt, label, f"{len(label)}", 7.25) for prompt in PROMPTS for label in ("Me", "You")]
    (tmp_path / "quality.json").write_text(json.dumps(report(answers)), encoding="utf-8")
    shown = rated(tmp_path, "1\n2\nq\n").output.partition("###")[0]
    assert "3 of 3" in shown and not any(word in shown for word in ("Me", "You", "7.25"))


def test_the_end_of_the_input_is_enough(tmp_path: Path) -> None:
    done = rated(stored(tmp_path), "1\n")
    assert done.exit_code == 0 and "2 of 3 are left" in done.output


def test_half_of_a_surrogate_pair_is_shown_and_rated(tmp_path: Path) -> None:
    answers = [Answer("pair", "one \ud800", label, f"{label} \ud800", 0.0) for label in "ab"]
    (tmp_path / "quality.json").write_text(json.dumps(report(answers)), encoding="utf-8")
    assert rated(tmp_path, "1\n").exit_code == 0 and "1 of 1" not in rated(tmp_path, "1\n").output


def test_what_an_interrupt_left_of_a_line_is_dropped(tmp_path: Path) -> None:
    path = stored(tmp_path) / "ratings.jsonl"
    rated(tmp_path, "1\n2\nq\n")
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    for size in range(end, len(whole)):
        path.write_bytes(whole[:size])
        assert len(Ratings(path).all) == 1 and path.read_bytes() == whole[:end]
    path.write_bytes(whole[:-5])
    done = rated(tmp_path, "=\n")
    assert done.exit_code == 0 and "1 of 3 are left" in done.output
    assert [rating.score for rating in Ratings(path).all] == [1.0, 0.5]


def test_a_rating_is_on_the_disk_before_the_next_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    path = tmp_path / "ratings.jsonl"
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.stat().st_size))
    ratings = Ratings(path)
    for question in questions(counted("a", "b"), [], 0):
        ratings.add(question, 1.0)
        assert synced[-1] == path.stat().st_size
    assert len(set(synced)) == 3 and Ratings(path).all == ratings.all


def test_a_rating_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = rated(stored(tmp_path), "1\n")
    assert done.exit_code == 2 and "cannot be written (No space left on device)" in done.stderr


def entry(**changed: object) -> dict[str, Any]:
    return {"pairs": [{"name": "pair", "answers": [{**report(counted("a"))["pairs"][0]["answers"][0], **changed}]}]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"no JSON",
        b"[" * 100_000,
        b"9" * 5000,
        *(
            json.dumps(content).encode()
            for content in (
                None,
                7,
                [],
                {},
                {"pairs": None},
                {"pairs": []},
                {"pairs": "pair"},
                {"pairs": [7]},
                {"pairs": [{"pair": "stories", "rows": []}]},  # of an older version
                {"pairs": [{"name": "pair"}]},
                {"pairs": [{"name": "pair", "answers": None}]},
                {"pairs": [{"name": "pair", "answers": []}]},
                {"pairs": [{"name": "pair", "answers": {"prompt": "one"}}]},
                {"pairs": [{"name": "pair", "answers": [{"prompt": "one"}]}]},
                {"pairs": [{"name": 7, "answers": entry()["pairs"][0]["answers"]}]},
                entry(prompt=None),
                entry(prompt=["one"]),
                entry(method=7),
                entry(answer=None),
                entry(answer=["a"]),
                entry(reward="7"),
                entry(reward=True),
                entry(reward=10**400),
            )
        ),
    ],
)
def test_what_is_no_report(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "quality.json").write_bytes(content)
    done = rated(tmp_path)
    assert refused(done) and "holds no answers as bench quality writes them" in done.stderr


def test_what_is_no_folder_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text("", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "runs.jsonl"):
        done = rated(folder)
        assert refused(done) and "holds no quality.json; run bench quality with this folder first" in done.stderr


RATING = asdict(Rating("pair", "one", "a", "b", 1.0))


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b"\xff",
        b"\n",
        b"{}\n",
        b"notes of mine",  # without an end, but not the beginning of a rating either
        b"[" * 100_000 + b"\n",
        *(
            json.dumps(content).encode() + b"\n"
            for content in (
                7,
                [1, 2, 3, 4, 5],
                {**RATING, "more": 1},
                {name: value for name, value in RATING.items() if name != "pair"},
                {**RATING, "pair": 7},
                {**RATING, "prompt": ["one"]},
                {**RATING, "first": None},
                {**RATING, "second": {}},
                {**RATING, "score": "1"},
                {**RATING, "score": None},
                {**RATING, "score": True},
                {**RATING, "score": 0.7},
                {**RATING, "score": float("nan")},
            )
        ),
    ],
)
def test_what_is_no_rating(tmp_path: Path, line: bytes) -> None:
    path = stored(tmp_path) / "ratings.jsonl"
    for before, number in ((b"", 1), (json.dumps(RATING).encode() + b"\n", 2)):
        path.write_bytes(before + line)
        done = rated(tmp_path, "1\n")
        assert refused(done) and f"line {number} is no rating; give another folder" in done.stderr
        assert path.read_bytes() == before + line


def test_keys_do_not_depend_on_the_order() -> None:
    assert Question("p", "q", "a", "b", ("x", "y")).key == Question("p", "q", "b", "a", ("y", "x")).key


def test_answers_that_have_changed_are_asked_about_again(tmp_path: Path) -> None:
    stored(tmp_path)
    assert "3 ratings" in rated(tmp_path, "1\n1\n1\n").output
    quality = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    changed = next(entry for entry in quality["pairs"][0]["answers"] if entry["method"] == "b")
    changed["answer"] += " And then some more."
    (tmp_path / "quality.json").write_text(json.dumps(quality), encoding="utf-8")
    again = rated(tmp_path, "2\n")
    assert "--- 3 of 3 ---" in again.output and "3 ratings" in again.output
    assert "1 ratings of answers that are no longer there do not count" in again.stderr
    assert len(Ratings(tmp_path / "ratings.jsonl").all) == 4

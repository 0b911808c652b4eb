"""Answers that are printed block by block, as they settle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from test_cli import STORY, aisp

from aisp_local import Aligner, controllers
from aisp_local.cli.live import Streamed
from aisp_local.loop import search
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Progress, Result


def vowels(prompt: Any, responses: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def run(budget: int, stop_strings: Sequence[str] = (), **options: Any) -> tuple[Result, list[Progress]]:
    engine, seen = FakeEngine(d=8, vocabulary=30), list[Progress]()
    controller = controllers.create(
        "score", d=8, max_tokens=40, seed=4, head=lambda: engine.head, temperature=2.0, min_p=0.0, **options
    )
    return search(
        engine, controller, FakeReward(vowels), "", method="score",
        budget=budget, n=16, max_tokens=40, seed=1, on_progress=seen.append, stop_strings=stop_strings,
    ), seen  # fmt: skip


@pytest.mark.parametrize("commit", [False, True])
def test_what_has_settled_stays(commit: bool) -> None:
    result, seen = run(16, commit=commit)
    settled = [progress.settled for progress in seen]
    assert all(after.startswith(before) for before, after in zip(settled, settled[1:], strict=False))
    assert result.answer.startswith(settled[-1])
    if commit:
        assert len(set(settled)) > 3, "a block at a time"
    assert [progress.step for progress in seen if progress.stats is None] == sorted(
        progress.step for progress in seen if progress.stats is None
    )
    best = [progress.unfinished.reward for progress in seen if progress.unfinished is not None]
    assert best, "there is something to show before the first rollout has finished"


def test_nothing_settles_before_the_last_iteration() -> None:
    result, seen = run(32, commit=True)
    assert {progress.settled for progress in seen if progress.iteration == 1} == {""}
    assert result.answer.startswith(seen[-1].settled)


def progress(settled: str, **options: Any) -> Progress:
    return Progress(1, 1, 0, 8, 1, 8, 8, 1.0, settled=settled, **options)


def test_the_answer_is_printed_once_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    line = Streamed(enabled=True)
    for settled in ("", " On", " Once up", " Once up"):
        line(progress(settled))
    assert capsys.readouterr().out == "Once up"
    line.finish(" Once upon a time")
    out, err = capsys.readouterr()
    assert out == "on a time\n" and "iteration" not in err
    line = Streamed(enabled=False)
    line(progress("The end.\n"))
    line.finish("The end.")
    assert capsys.readouterr().out == "The end.\n"


def test_what_may_become_a_stop_string_has_not_settled() -> None:
    whole, _ = run(16, commit=True)
    for at in range(4, 12):
        stop = whole.answer[at : at + 3]
        result, seen = run(16, commit=True, stop_strings=[stop])
        assert all(result.answer.startswith(progress.settled) for progress in seen)


def test_an_interrupt_prints_another_answer_anew(capsys: pytest.CaptureFixture[str]) -> None:
    line = Streamed(enabled=False)
    line(progress("A fox"))
    line.finish("A dog")
    assert capsys.readouterr().out == "A fox\n\nA dog\n"


@pytest.mark.native
def test_the_command_streams_the_answer_of_python() -> None:
    arguments = ("generate", STORY, "--budget", "8", "--max-tokens", "24", "--seed", "3", "--stream")
    out = aisp(*arguments)
    assert out.returncode == 0, out.stderr.decode()
    with Aligner.load() as aligner:
        result = aligner.generate(
            [{"role": "user", "content": STORY}], budget=8, n=8, max_tokens=24, seed=3, commit=True
        )
    assert out.stdout.decode() == result.answer.lstrip() + "\n"


@pytest.mark.native
def test_a_conversation_streams() -> None:
    out = aisp("chat", "--stream", "--max-tokens", "24", stdin=STORY.encode() + b"\n/why\n")
    assert out.returncode == 0, out.stderr.decode()
    lines = out.stdout.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("[reward "))
    assert " ".join(lines[:at]).strip() and re.search(r"32 rollouts", lines[at])


@pytest.mark.native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "leave out --json and -o"),
        (["-o", "answer.txt"], "leave out --json and -o"),
        (["--method", "aisp"], "'aisp' chooses at the end"),
        (["--budget-tokens", "50"], "in one iteration; leave out --rows, --budget-tokens"),
        (["--rows", "8"], "in one iteration; leave out --rows"),
        (["--patience", "1"], "in one iteration; leave out"),
        (["--target-reward", "1"], "--target-reward and --patience"),
    ],
)
def test_what_does_not_stream(arguments: list[str], message: str) -> None:
    out = aisp("generate", STORY, "--stream", *arguments)
    assert out.returncode == 2 and message in out.stderr.decode()

"""`generate --input`: a file of prompts, killed and gone on with, on the shipped models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_cli import STORY, aisp

from aisp_local import Aligner, shipped
from aisp_local.cli.batch import Batch
from aisp_local.cli.batch.questions import read_questions
from aisp_local.cli.generate import as_json, generate
from aisp_local.cli.live import BatchLine
from aisp_local.cli.main import main
from aisp_local.errors import CapacityError, InputError
from aisp_local.files import hold
from aisp_local.types import Progress

pytestmark = pytest.mark.native

FAST = ["--method", "best-of-n", "--budget", "4", "--rows", "4", "--max-tokens", "6"]
LINES = [
    {"id": "fox", "prompt": STORY},
    {"id": 7, "messages": [{"role": "user", "content": "Tell me a story about a bear."}]},
    "Tell me a story about a hen.",
    {"prompt": "Tell me a story about a cat.", "seed": 5, "max_tokens": 4, "colour": "grey"},
    {"prompt": STORY},
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(LINES)
    return tmp_path


def write(lines: Sequence[object]) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(*arguments: str, source: str = "in.jsonl", output: str | None = "out.jsonl") -> Result:
    where = [] if output is None else ["-o", output]
    return CliRunner().invoke(generate, ["--input", source, *where, *FAST, *arguments])


def entries(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_each_line_gets_the_answer_that_generate_alone_gives(place: Path) -> None:
    out = run()
    assert (out.exit_code, out.output) == (0, "")
    found = entries()
    assert [(e["line"], e["id"]) for e in found] == [(1, "fox"), (2, 7), (3, None), (4, None), (5, None)]
    assert found[0]["answer"] == found[4]["answer"]
    with Aligner.load() as aligner:
        for entry, line in zip(found, LINES, strict=True):
            row: dict[str, Any] = line if isinstance(line, dict) else {"prompt": line}
            alone = aligner.chat(
                row.get("messages") or [{"role": "user", "content": row["prompt"]}],
                method="best-of-n", budget=4, n=4, max_tokens=row.get("max_tokens", 6), seed=row.get("seed", 0),
                baseline=True,
            )  # fmt: skip
            expected = as_json(alone)
            assert set(entry) == {"line", "id", "key", "prompt", *expected}
            assert entry["prompt"] == (row.get("messages") or [{"role": "user", "content": row["prompt"]}])
            assert (entry["answer"], entry["reward"]) == (alone.answer, pytest.approx(alone.reward, abs=1e-4))
            assert entry["baseline"]["text"] == expected["baseline"]["text"]
            assert [c["text"] for c in entry["candidates"]] == [c.text for c in alone.candidates]
    before = Path("out.jsonl").read_bytes()
    assert run().exit_code == 0 and Path("out.jsonl").read_bytes() == before, "nothing is asked again"
    scored = CliRunner().invoke(main, ["reward", "score", str(shipped.reward()), "-i", "out.jsonl"])
    np.testing.assert_allclose([float(x) for x in scored.output.split()], [e["reward"] for e in found], atol=1e-3)


def test_kills_lose_and_repeat_nothing(place: Path) -> None:
    write([{"id": i, "prompt": f"Tell me a story about {animal}."} for i, animal in enumerate(6 * ["a fox", "a hen"])])
    command = [sys.executable, "-m", "aisp_local", "generate", "-i", "in.jsonl", "--at-once", "2", *FAST]
    kept = b""
    for wanted in (2, 6):
        process = subprocess.Popen([*command, "-o", "out.jsonl"])
        end = time.monotonic() + 120
        while process.poll() is None and kept.count(b"\n") < wanted:
            assert time.monotonic() < end
            time.sleep(0.002)
            kept = Path("out.jsonl").read_bytes() if Path("out.jsonl").exists() else b""
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = Path("out.jsonl").read_bytes()
        assert kept.count(b"\n") >= wanted
    if kept.count(b"\n") < 12:
        with open("out.jsonl", "ab") as file:
            file.write(b'{"line": 12, "id": 11, "ke')  # what a kill may leave
    assert run("--at-once", "2").exit_code == 0
    assert Path("out.jsonl").read_bytes().startswith(kept)
    assert [entry["id"] for entry in entries()] == list(range(12))
    assert run(output="whole.jsonl").exit_code == 0
    same = [[(e["key"], e["answer"], e["candidates"]) for e in entries(name)] for name in ("out.jsonl", "whole.jsonl")]
    assert same[0] == same[1], "neither kills nor groups change an answer"
    assert sorted(path.name for path in place.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_lines_that_cannot_be_answered_have_errors_and_are_tried_again(place: Path) -> None:
    lines = [
        json.dumps({"id": "fox", "prompt": STORY}),
        "",
        '{"prompt": "unfinished',
        '{"id": 3, "prompt": ""}',
        '{"id": 4}',
        '{"prompt": "a", "messages": []}',
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"prompt": "a", "seed": "x"}',
        '{"prompt": "a", "budget": 0}',
        '{"prompt": "\\ud800"}',
        json.dumps({"id": "long", "prompt": "word " * 900}),
        "[1]",
        json.dumps({"prompt": STORY, "seed": 1}),
    ]
    Path("in.jsonl").write_text("\n".join(lines))
    out = run()
    assert out.exit_code == 1
    assert out.stderr == '10 of 12 prompts failed; see "error" of lines 3, 4, 5, 6, 7, 8, 9, 10, ... in out.jsonl\n'
    found = {entry["line"]: entry for entry in entries()}
    assert list(found) == [1, *range(3, 14)]
    assert found[1]["answer"] and found[13]["seed"] == 1 and found[4]["id"] == 3
    for line, message in {
        3: "not valid JSON",
        4: "the prompt is empty",
        5: "it needs 'prompt'",
        6: "and not both",
        7: "the role 'robot'",
        8: "'seed' is 'x'; it must be a whole number",
        9: "the budget is 0",
        10: "half of a surrogate pair",
        12: "not a JSON object",
    }.items():
        assert set(found[line]) == {"line", "id", "key", "error"}
        assert message in found[line]["error"]["message"], line
    assert found[11]["error"]["type"] == "CapacityError" and "shorten it" in found[11]["error"]["message"]
    strict = run("--strict", output="strict.jsonl")
    assert isinstance(strict.exception, InputError) and "in.jsonl, line 3: it is not valid JSON" in str(
        strict.exception
    )
    assert not Path("strict.jsonl").exists()
    # Line 13 is there already when line 1 gets its answer.
    Path("out.jsonl").write_text("".join(json.dumps(found[line]) + "\n" for line in found if line != 1))
    assert run().exit_code == 1
    assert [entry["line"] for entry in entries()] == list(found), "in the order of the input again"


def test_a_line_that_was_mended_is_tried_again(place: Path) -> None:
    lines = [json.dumps({"prompt": STORY}), '{"prompt": 5}', json.dumps({"prompt": "Tell me a story."})]
    Path("in.jsonl").write_text("\n".join(lines))
    assert (out := run()).exit_code == 1 and 'see "error" of line 2 in out.jsonl' in out.stderr
    before = entries()
    score = ["reward", "score", str(shipped.reward()), "-i", "out.jsonl"]
    scored = CliRunner().invoke(main, score)
    assert scored.exit_code == 2 and "line 2: it has an error in the place of an answer" in scored.stderr
    Path("in.jsonl").write_text("\n".join([lines[0], json.dumps({"prompt": "Tell me about an owl."}), lines[2]]))
    assert run().exit_code == 0
    after = entries()
    assert [after[0], after[2]] == [before[0], before[2]] and after[1]["answer"]
    assert len(CliRunner().invoke(main, score).output.split()) == 3


def test_two_processes_do_not_write_one_file(place: Path) -> None:
    assert run().exit_code == 0
    before = Path("out.jsonl").read_bytes()
    with Path("out.jsonl").open("ab") as file:
        hold(file, "")
        out = run()
        assert isinstance(out.exception, InputError) and "out.jsonl is being written by" in str(out.exception)
    assert run().exit_code == 0 and Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments", [[STORY], [STORY, "--json"], [STORY, "--method", "best-of-n"], ["-i", "in.jsonl"], [STORY, "--stream"]]
)
def test_settings_give_way_to_what_is_typed(arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AT_ONCE": "2", "STRICT": "1", "STREAM": "1", "BUDGET_TOKENS": "999"}.items():
        monkeypatch.setenv(f"AISP_{name}", value)
    small = ["--budget", "4", "--rows", "4", "--max-tokens", "6"]
    done = CliRunner().invoke(main, ["generate", *arguments, *small])
    assert done.exit_code == 0 and done.stdout.strip(), done.output


def test_strict_stops_at_an_answer_that_fails(place: Path) -> None:
    write([{"prompt": STORY}, {"prompt": "word " * 900}, {"prompt": STORY}])
    out = run("--strict", "--at-once", "1")
    assert out.exit_code == 1 and "1 of 3 prompts failed" in out.stderr
    assert ["error" in entry for entry in entries()] == [False, True]


def test_other_inputs_settings_and_files_are_refused(place: Path) -> None:
    assert run().exit_code == 0
    before = Path("out.jsonl").read_bytes()

    def refused(*arguments: str) -> str:
        out = run(*arguments)
        assert isinstance(out.exception, InputError), out.output
        assert Path("out.jsonl").read_bytes() == before
        return str(out.exception)

    settings = "out.jsonl, line 1 answers line 1 of in.jsonl with other settings or models; give another file to -o"
    assert settings in refused("--seed", "1")
    assert settings in refused("-r", "short-and-plain")
    write([*LINES[:3], {"prompt": "Tell me a story about a dog."}, LINES[4]])
    assert "line 4 answers something else than line 4 of in.jsonl asks" in refused()
    write(LINES[:4])
    assert "line 5 answers something else than line 5" in refused()
    write([*LINES, {"prompt": "Tell me a story about a dog."}])
    out = run()
    assert out.exit_code == 0 and len(entries()) == 6 and Path("out.jsonl").read_bytes().startswith(before)
    Path("out.jsonl").write_text("my notes\n")
    before = Path("out.jsonl").read_bytes()
    assert "out.jsonl, line 1 is no answer of `generate --input`" in refused()
    Path("out.jsonl").write_text("my notes, without an end of line")
    before = Path("out.jsonl").read_bytes()
    assert "out.jsonl, line 1 is no answer of `generate --input`" in refused()
    before = Path("in.jsonl").read_bytes()
    assert "would be written over what is read" in str(run(output="in.jsonl").exception)
    assert Path("in.jsonl").read_bytes() == before


def test_a_reward_file_that_was_changed_is_another_one(place: Path) -> None:
    def rule(words: int) -> None:
        Path("my.toml").write_text(f"format = 1\n[[part]]\nrule = 'length'\nwords = [1, {words}]\nnormalise = false")

    rule(3)
    assert run("-r", "my.toml").exit_code == 0
    rule(4)
    assert "with other settings or models" in str(run("-r", "my.toml").exception)


def test_plain_lines_standard_input_and_standard_output(place: Path) -> None:
    stdin = f"{STORY}\r\n\nTell me a story about a hen.\n".encode()
    out = aisp("generate", "--input", "-", *FAST, stdin=stdin)
    assert out.returncode == 0 and out.stderr == b"", out.stderr
    assert [json.loads(line)["line"] for line in out.stdout.splitlines()] == [1, 3]
    (place / "in.txt").write_bytes(stdin)
    assert run(source="in.txt").exit_code == 0
    assert [entry["answer"] for entry in entries()] == [json.loads(line)["answer"] for line in out.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a PROMPT"),
        (["hello", "-i", "in.jsonl"], "give either a PROMPT"),
        (["hello", "--strict"], "are for --input"),
        (["-i", "in.jsonl", "--stream"], "are for one prompt"),
        (["-i", "in.jsonl", "--at-once", "0"], "--at-once is 0"),
        (["-i", "nowhere"], "cannot be read"),
        (["-i", "empty"], "has no prompts"),
        (["-i", "bytes"], "not valid UTF-8"),
        (["-i", "in.jsonl", "-o", "nowhere/out.jsonl"], "does not exist"),
    ],
)
def test_commands_that_make_no_sense(arguments: list[str], message: str, place: Path) -> None:
    Path("empty").write_text("\n \n")
    Path("bytes").write_bytes(b"\xff\xff\n")
    out = CliRunner().invoke(generate, arguments)
    assert isinstance(out.exception, InputError) and message in str(out.exception), out.output


def test_a_first_interrupt_keeps_what_is_whole(place: Path) -> None:
    write([{"prompt": STORY}, {"prompt": STORY, "budget": 100000, "max_tokens": 60}])
    command = [sys.executable, "-m", "aisp_local", "generate", "-i", "in.jsonl", "-o", "out.jsonl", *FAST]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not Path("out.jsonl").exists() or not Path("out.jsonl").read_bytes().endswith(b"\n"):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.decode() == "interrupted: 1 of 2 answers are there in out.jsonl\n"
    assert [entry["line"] for entry in entries()] == [1]


def test_what_the_memory_does_not_hold_together_is_asked_in_parts(place: Path) -> None:
    search = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 6, "seed": 0, "time_limit": None}
    asked: list[int] = []
    with Aligner.load() as aligner:
        whole = aligner.generate_many

        def little(prompts: Any, **options: Any) -> Any:
            asked.append(len(prompts))
            if len(prompts) > 1:
                raise CapacityError("no memory")
            return whole(prompts, **options)

        aligner.generate_many = little  # type: ignore[method-assign]
        batch = Batch(Path("in.jsonl"), search, None, raw=False, strict=False, at_once=None)
        outcome = batch.run(aligner, Path("out.jsonl"), as_json, lambda: False, BatchLine(enabled=False))
        assert (outcome.answered, outcome.failed, outcome.stopped) == (5, [], False)
        assert asked == [3, 1, 2, 1, 1, 1, 1]
        batch = Batch(Path("in.jsonl"), search, None, raw=False, strict=False, at_once=2)
        with pytest.raises(CapacityError):
            batch.run(aligner, Path("two.jsonl"), as_json, lambda: False, BatchLine(enabled=False))


def test_the_line_tells_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "200")
    line = BatchLine(enabled=True)
    line.begin(40, 10, 6)
    for _ in range(4):
        line.ended(failed=False)
    line.ended(failed=True)
    now[0] += 60
    line(0, Progress(1, 2, 0, 8, step=6, rows_active=4, n_tokens=10, seconds=1.0))
    shown = capsys.readouterr().err
    assert re.search(r"14/40 prompts  1 failed  10\.9 s each  4 min 27 s left", shown), shown


def test_raw_lines_are_continued(place: Path) -> None:
    write([{"prompt": "Once"}, {"messages": []}])
    texts = [(q.prompt, q.problem) for q in read_questions(Path("in.jsonl"), raw=True)]
    assert texts[0] == ("Once", None) and texts[1][1] == "it has messages, which --raw cannot continue"


def test_prompt_indices_are_one_for_each_prompt() -> None:
    with Aligner.load() as aligner:
        first, second = aligner.generate_many(
            [STORY, STORY], prompt_indices=[3, 3], method="best-of-n", budget=2, n=2, max_tokens=6
        )
        alone = aligner.generate(STORY, prompt_index=3, method="best-of-n", budget=2, n=2, max_tokens=6)
        assert first.answer == second.answer == alone.answer  # type: ignore[union-attr]
        with pytest.raises(InputError, match="2 prompts and 1 prompt indices"):
            aligner.generate_many([STORY, STORY], prompt_indices=[3])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(place: Path) -> None:
    os.symlink("/dev/full", "out.jsonl")
    out = run()
    assert isinstance(out.exception, InputError) and "cannot be written (No space left on device)" in str(out.exception)

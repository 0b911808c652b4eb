"""`aisp-local reward ...`: what is printed, exit codes, sentences."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx_files import write_reward

from aisp_local import shipped
from aisp_local.cli.main import main
from aisp_local.files import write_output
from aisp_local.rewards import OnnxReward


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["reward", *map(str, arguments)], input=stdin)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reward(tmp_path / "tiny")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_scores_of_arguments(folder: Path) -> None:
    done = run("score", folder, "-p", "tell", "good fox", "bad", "")
    expected = OnnxReward.load(folder).score("tell", ["good fox", "bad", ""])
    assert done.exit_code == 0 and done.stderr == ""
    np.testing.assert_allclose([float(line) for line in done.stdout.splitlines()], expected, rtol=1e-5)


def test_scores_of_a_file(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "tell", "responses": ["good", "bad"]}, {"response": "fox"}]
    path = write_rows(tmp_path / "in.jsonl", rows)
    done = run("score", folder, "-i", path, "--json", "-p", "a story")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(f["line"], f["index"], f["response"]) for f in found] == [(1, 1, "good"), (1, 2, "bad"), (2, 1, "fox")]
    reward = OnnxReward.load(folder)
    expected = [*reward.score("tell", ["good", "bad"]), *reward.score("a story", ["fox"])]
    np.testing.assert_allclose([f["score"] for f in found], expected, rtol=1e-5)


def test_scores_stream_through_a_pipe(folder: Path) -> None:
    """The first score is out before the second line is in."""
    command = [sys.executable, "-c", "from aisp_local.cli.main import main; main()", "reward", "score", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for text in ("good", "bad"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            value = float(process.stdout.readline())
            assert value == pytest.approx(OnnxReward.load(folder).score("", [text])[0], rel=1e-5)
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    command = f"'{sys.executable}' -c 'from aisp_local.cli.main import main; main()' reward score '{folder}'"
    done = subprocess.run(
        f"(yes good | head -50000; true) | {command} | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["score", "FOLDER", "a", "-i", "x"], None, "both texts and --input were given"),
        (["score", "FOLDER", "-i", "missing.jsonl"], None, "missing.jsonl cannot be read"),
        (["score", "nowhere", "a"], None, "reward folder nowhere does not exist"),
        (["eval", "FOLDER", "missing.jsonl"], None, "missing.jsonl cannot be read"),
        (["show", "nowhere"], None, "reward folder nowhere does not exist"),
        (["list", "nowhere"], None, "nowhere is not a folder"),
        (["verify", "FOLDER", "--pairs", "missing"], None, "missing cannot be read"),
    ],
)
def test_bad_input(folder: Path, arguments: list[str], stdin: str | None, message: str) -> None:
    done = run(*[str(folder) if a == "FOLDER" else a for a in arguments], stdin=stdin)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == ""


def test_a_bad_row_of_a_file_is_named_after_the_good_ones_were_scored(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"response": "good"}, {"response": "bad"}, {"respnse": "x"}])
    done = run("score", folder, "-i", path)
    assert done.exit_code == 2 and f"{path}, line 3: it needs 'response'" in done.stderr
    expected = OnnxReward.load(folder).score("", ["good", "bad"])
    np.testing.assert_allclose([float(line) for line in done.stdout.splitlines()], expected, rtol=1e-5)


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder: Path, tmp_path: Path) -> None:
    mark = "\ufeff"
    texts, rows = tmp_path / "texts.txt", tmp_path / "pairs.jsonl"
    texts.write_text(f"{mark}good\nbad\n", encoding="utf-8")
    rows.write_text(mark + json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")
    plain = run("score", folder, "good", "bad").stdout
    assert run("score", folder, "-i", texts).stdout == plain
    assert run("eval", folder, rows).exit_code == 0
    command = [sys.executable, "-m", "aisp_local", "reward", "score", str(folder)]
    assert subprocess.run(command, input=texts.read_bytes(), capture_output=True).stdout.decode() == plain
    lines = f'{mark}{{"response": "good"}}\n{{"response": "bad"}}\n'.encode()
    assert subprocess.run(command, input=lines, capture_output=True).stdout.decode() == plain


@pytest.mark.parametrize("option", ["", "-i -"])
def test_closed_standard_input_is_a_sentence(folder: Path, option: str) -> None:
    command = f"'{sys.executable}' -m aisp_local reward score '{folder}' {option} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("aisp-local: error: standard input is closed"), done.stderr


def test_a_bad_row_is_named_after_the_good_ones_were_scored(folder: Path) -> None:
    command = [sys.executable, "-c", "from aisp_local.cli.main import main; main()", "reward", "score", str(folder)]
    done = subprocess.run(command, input='{"response": "good"}\n{"respnse": "x"}\n', capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1
    assert "standard input, line 2: it needs 'response'" in done.stderr


def test_verify_passes_and_fails_by_its_exit_code(folder: Path, tmp_path: Path) -> None:
    done = run("verify", shipped.judge())
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()][:2] == [["ok", "files"], ["ok", "provider"]]
    done = run("verify", folder, "--json")  # it knows no English
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["passed"] is False
    ranking = next(check for check in found["checks"] if check["name"] == "ranking")
    assert not ranking["passed"] and ranking["advice"]
    (folder / "model.onnx").unlink()
    done = run("verify", folder)
    assert done.exit_code == 1 and "FAILED  load" in done.stdout and "-> restore the folder" in done.stdout


def test_eval_prints_and_draws(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "tell", "chosen": "good fox", "rejected": "bad", "subset": s} for s in ("chat", "safety") * 8]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    done = run("eval", folder, path, "--plots", tmp_path / "new" / "plots")
    assert done.exit_code == 0, done.output
    assert "chat" in done.stdout and "chosen longer" in done.stdout and "log loss" in done.stdout
    drawn = sorted(p.name for p in (tmp_path / "new" / "plots").iterdir())
    assert drawn == ["accuracy.svg", "calibration.svg", "length.svg"]
    found = json.loads(run("eval", folder, path, "--json").stdout)
    scores = OnnxReward.load(folder).score("tell", ["good fox", "bad"])
    assert found["overall"]["accuracy"] == float(scores[0] > scores[1]) and found["overall"]["n"] == 16
    assert [g["name"] for g in found["by_source"]] == ["chat", "safety"]
    assert found["length"]["pearson"] == pytest.approx(1 if scores[0] > scores[1] else -1)


def test_lone_surrogates_are_printed_as_question_marks(tmp_path: Path) -> None:
    """A source, a response and a name that no encoding holds; and an encoding that holds little."""
    folder = write_reward(tmp_path / "tiny", name="n\udc80me", description="é")
    rows = [{"prompt": "tell", "chosen": "good", "rejected": "bad", "source": "s\ud800urce"}] * 4
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    texts = write_rows(tmp_path / "texts.jsonl", [{"response": "f\ud800x"}])
    plots = tmp_path / "plots"
    for arguments, said in (
        (["eval", folder, data, "--plots", plots], "s?urce"),
        (["eval", folder, data, "--json"], "s?urce"),
        (["score", folder, "-i", texts, "--json"], "f?x"),
        (["show", folder], "n?me"),
        (["show", folder, "--json"], "n?me"),
        (["list", folder], "n?me"),
    ):
        done = run(*arguments)
        assert done.exit_code == 0 and said in done.stdout, (arguments, done.output, done.exception)
    assert "s\N{REPLACEMENT CHARACTER}urce" in (plots / "accuracy.svg").read_text(encoding="utf-8")
    write_output(tmp_path / "card.md", "| s\ud800urce |")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == "| s?urce |"
    command = [sys.executable, "-m", "aisp_local", "reward", "show", str(folder)]
    env = dict(os.environ) | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "description  ?" in done.stdout


def test_eval_names_bad_rows(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}])
    done = run("eval", folder, path)
    assert done.exit_code == 2 and f"{path}, line 2: it lacks 'chosen'; its keys are prompt" in done.stderr


def test_eval_does_not_start_where_it_cannot_write(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "file").touch()
    done = run("eval", folder, path, "--plots", tmp_path / "file")
    assert done.exit_code == 2 and "file" in done.stderr


def test_list_and_show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv("AISP_REWARDS", str(own))
    write_reward(own / "mine", name="mine", licence="MIT")
    (own / "broken").mkdir()
    (own / "broken" / "reward.json").write_text("{")
    done = run("list", folder)
    assert done.exit_code == 0
    known = ("story-reward  24.0 MB", "story-judge  3.3 MB", "cheer  2.1 MB", "cheer-judge  2.1 MB")
    for part in (*known, "mine  ", "licence: MIT", "broken  broken: ", "tiny  "):
        assert part in done.stdout, part
    rows = {row["name"]: row for row in json.loads(run("list", folder, "--json").stdout)}
    folders = {"story-reward", "story-judge", "cheer", "cheer-judge", "mine", "broken", "tiny"}
    assert {name for name, row in rows.items() if row["kind"] == "folder"} == folders
    assert set(rows) - folders == set(shipped.recipes()) and f"kind-and-safe  recipe  {RECIPES}" in done.stdout
    assert "People who help" in rows["kind-and-safe"]["description"]
    assert rows["mine"]["bytes"] > 0 and "not valid JSON" in rows["broken"]["error"]
    shown = run("show", shipped.reward())
    assert shown.exit_code == 0
    assert run("show", "story-reward").stdout == run("show", "shipped").stdout == shown.stdout
    assert run("show", "story-judge").stdout == run("show", "judge").stdout == run("show", shipped.judge()).stdout
    assert run("show", "cheer").exit_code == 0
    for part in ("stored as 22.5 M int8", "pair, at most 256 tokens", "1 * score[:, 0]", "ExecutionProvider"):
        assert part in shown.stdout, part
    found = json.loads(run("show", folder, "--json").stdout)
    assert found["input"]["kind"] == "pair" and found["parameters"] == {"float32": 138}
    assert found["files"].keys() == {"model.onnx", "tokenizer.json"}


def test_a_broken_folder_is_a_row_and_not_the_end_of_the_list(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("a lost", "b pipe", "c no manifest", "d link", "e sub", "f good"):
        write_reward(home / name)
    (home / "a lost" / "model.onnx").unlink()
    (home / "b pipe" / "model.onnx").unlink()
    os.mkfifo(home / "b pipe" / "model.onnx")
    (home / "c no manifest" / "reward.json").unlink()
    os.mkfifo(home / "c no manifest" / "reward.json")
    (home / "d link" / "model.onnx").unlink()
    (home / "d link" / "model.onnx").symlink_to("model.onnx")
    (home / "e sub" / "model.onnx").unlink()
    (home / "e sub" / "model.onnx").mkdir()
    done = run("list", home)
    assert done.exit_code == 0, (done.output, done.exception)
    for name in ("a lost", "b pipe", "c no manifest", "d link", "e sub"):
        assert f"\n{name}  broken: " in done.stdout, name
    assert f"tiny  0.0 MB  {home / 'f good'}" in done.stdout
    for name in ("a lost", "b pipe", "e sub"):
        done = run("show", home / name)
        assert done.exit_code == 2 and "lacks model.onnx" in done.stderr and "restore the folder" in done.stderr


def test_a_manifest_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    folder = write_reward(
        tmp_path / "evil", name="x\x1b]0;owned\x07\x9b31mRED", description="one\nok fake  1 MB\r\x1b[2J\u2028é"
    )
    for command in ("list", "show"):
        done = run(command, folder)
        assert done.exit_code == 0
        assert not {"\x1b", "\x07", "\x9b", "\r", "\u2028"} & set(done.stdout)
        assert "x?]0;owned??31mRED" in done.stdout and "one?ok fake  1 MB??[2J?é" in done.stdout


def test_a_recipe_whose_scale_was_not_measured_scores_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('format = 1\n[[part]]\nreward = "shipped"\n[[part]]\nrule = "repetition"\n')
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for recipe in ("short-and-plain", mine):
        for arguments in (("score", recipe, "a b c"), ("eval", recipe, path)):
            done = run(*arguments)
            assert done.exit_code == 2 and "'mean' and 'std'" in done.stderr
            assert f"aisp-local generate PROMPT -r {recipe} --json" in done.stderr
    text = mine.read_text().replace('"shipped"', '"shipped"\nmean = 1.0\nstd = 2.0')
    mine.write_text(text)
    assert run("score", mine, "a b c").exit_code == 0


RECIPES = shipped.recipes()["kind-and-safe"]
RECIPE = """
format = 1
name = "mi\\u001bx"
description = "foxes"
combine = "cautious"
k = 0.5
judge = "tiny"
[[part]]
reward = "tiny"
weight = 2
[[part]]
rule = "length"
words = [2, inf]
name = "long"
normalise = true
mean = -1
std = 2.0
[[part]]
rule = "forbidden"
words = ["bad", "wörse"]
patterns = ['\\bfox(es)?\\b']
"""


def test_show_says_what_a_recipe_is_made_of(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    shown = run("show", recipe)
    assert shown.exit_code == 0, shown.output
    digest = hashlib.sha256(recipe.read_bytes()).hexdigest()
    model = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    for part in (
        "name         mi?x",
        f"file         {recipe}, sha256 {digest}",
        "less 0.5 of their standard deviations",
        f"judge        tiny ({folder})",
        "part 1       tiny: weight 2, normalised by what 16 responses",
        f"model.onnx sha256 {model}",
        "part 2       long: weight 1, (score - -1) / 2",
        "words = [2, inf]",
        'words = ["bad", "wörse"]',
        "fox(es)?",
    ):
        assert part in shown.stdout, part
    found = json.loads(run("show", recipe, "--json").stdout)
    assert (found["sha256"], found["combine"], found["k"], found["uncalibrated"]) == (digest, "cautious", 0.5, True)
    assert found["judge"] == {"name": "tiny", "path": str(folder)}
    assert [(p["name"], p["kind"], p["weight"], p["mean"]) for p in found["parts"]] == [
        ("tiny", "reward", 2, None),
        ("long", "rule", 1, -1),
        ("forbidden", "rule", 1, None),
    ]
    assert found["parts"][0]["model"]["files"]["model.onnx"] == model
    assert found["parts"][1]["keys"] == {"rule": "length", "words": [2, None]} and found["parts"][1]["model"] is None
    for name in shipped.recipes():
        shown = run("show", name)
        assert shown.exit_code == 0 and f"name         {name}\n" in shown.stdout and "story-reward: " in shown.stdout
    assert "does not exist" in run("show", tmp_path / "none.toml").stderr


def test_verify_checks_what_a_recipe_is_made_of(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.toml"
    recipe.write_text(RECIPE.replace('judge = "tiny"', "").replace("weight = 2", "weight = 2\nname = 'm'"), "utf-8")
    good = {"prompt": "tell", "chosen": "a long good day", "rejected": "bad bad foxes"}
    rows = write_rows(tmp_path / "pairs.jsonl", [good] * 8)
    done = run("verify", recipe, "--pairs", rows, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert list(checks) == ["recipe", "model", "finite", "spread", "determinism", "speed", "given pairs"]
    assert checks["recipe"]["says"] == "1 model, 2 rules; 1 regular expression compiles"
    assert [name for name, check in checks.items() if not check["passed"]] == ["model"]  # it knows no English
    assert done.exit_code == 1 and checks["model"]["advice"] == f"aisp-local reward verify {folder}"
    assert checks["model"]["figures"]["failed"] == ["tokens", "ranking"]
    assert set(checks["spread"]["figures"]["spreads"]) == {"m", "long", "forbidden"}
    assert "in another process" in checks["determinism"]["says"]
    assert all(size["scores_per_s"] > 0 for size in checks["speed"]["figures"]["sizes"])

    (folder / "model.onnx").write_bytes(b"other")
    done = run("verify", recipe)
    assert done.exit_code == 1 and done.stdout.startswith("FAILED  recipe") and "part 1" in done.stdout
    recipe.write_text("format = 1\n[[part]]\nrule = 'forbidden'\npatterns = ['(']")
    done = run("verify", recipe)
    assert done.exit_code == 1 and "part 1: 'patterns': '(' is no regular expression" in done.stdout


def test_verify_of_a_recipe_of_rules_and_of_a_server_that_is_not_there(tmp_path: Path) -> None:
    recipe = tmp_path / "short.toml"
    rule = "format = 1\n[[part]]\nrule = 'length'\nwords = [1, 3]\n"
    recipe.write_text(rule)
    pairs = [{"prompt": "a", "chosen": "b " * 9, "rejected": "c " * 4}] * 8
    done = run("verify", recipe, "--pairs", write_rows(tmp_path / "pairs.jsonl", pairs))
    names = [line.split()[:2] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert names[:-1] == [["ok", name] for name in ("recipe", "finite", "spread", "determinism", "speed")]
    assert names[-1] == ["FAILED", "given"] and "turn the sign of a weight" in done.stdout
    server = "[[part]]\nserver = 'http://127.0.0.1:9'\nprompt = '{response}'\nretries = 0\n"
    for failure in ("stop", "worst"):
        recipe.write_text("format = 1\n" + server + f"on_failure = '{failure}'\n")
        done = run("verify", recipe)
        assert done.exit_code == 1 and "ok      recipe       1 server" in done.stdout
        assert "FAILED  server       server 127.0.0.1:9: " in done.stdout and "-> start it" in done.stdout


def test_the_kit_needs_no_torch() -> None:
    code = (
        "import sys, aisp_local.reward_kit, aisp_local.cli.reward; "
        "sys.exit(any(m.split('.')[0] in ('torch', 'onnx', 'transformers', 'matplotlib') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0

"""The installed command, as a user runs it: answers, exit codes, sentences."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
from click.testing import CliRunner
from onnx_files import write_reward

from aisp_local import Aligner, shipped
from aisp_local.cli.chat import chat, layout
from aisp_local.cli.chat.layout import told_apart
from aisp_local.cli.generate import generate
from aisp_local.cli.live import ProgressLine
from aisp_local.cli.main import main
from aisp_local.cli.output import print_text
from aisp_local.errors import InputError
from aisp_local.files import write_output
from aisp_local.finite import finite
from aisp_local.types import Progress

pytestmark = pytest.mark.native

STORY = "Tell me a story about a fox."


def aisp(*arguments: str, stdin: bytes | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    command = Path(sys.executable).with_name("aisp-local")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AISP_") or k == "AISP_THREADS"}
    return subprocess.run(
        [str(command), *arguments], input=stdin, capture_output=True, timeout=300, cwd=cwd, env=environment, check=False
    )


def test_generate_prints_the_answer_and_nothing_else(tmp_path: Path) -> None:
    arguments = ("generate", STORY, "--budget", "8", "--rows", "4", "--max-tokens", "24", "--seed", "3")
    first = aisp(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr.decode()
    assert first.stderr == b""
    assert first.stdout.decode().strip()
    assert aisp(*arguments, cwd=tmp_path).stdout == first.stdout
    assert list(tmp_path.iterdir()) == []


def test_generate_json(tmp_path: Path) -> None:
    out = aisp(
        "generate", "-", "--budget", "10", "--rows", "4", "--max-tokens", "16", "--json", "--kl", stdin=STORY.encode()
    )
    assert out.returncode == 0, out.stderr.decode()
    data = json.loads(out.stdout)
    required = "answer reward baseline method budget iterations candidates seed model reward_model versions"
    assert set(required.split()) <= set(data)
    assert data["method"] == "score" and data["budget"] == 10 and data["seed"] == 0
    assert [i["n"] for i in data["iterations"]] == [4, 4, 2]
    assert len(data["candidates"]) == 10
    assert data["reward"] == max(c["reward"] for c in data["candidates"])
    assert data["answer"] == data["candidates"][0]["text"]
    # The first block of the first iteration, of 4 tokens, is the base model's.
    assert all((c["kl"] > 0) == (c["iteration"] > 1 or c["n_tokens"] > 4) for c in data["candidates"])
    assert set(data["baseline"]) == {"text", "reward", "parts", "judge"}
    with Aligner.load() as aligner:
        result = aligner.chat([{"role": "user", "content": STORY}], budget=10, n=4, max_tokens=16, baseline=True)
    assert result.answer == data["answer"]
    assert result.baseline is not None and result.baseline.text == data["baseline"]["text"]


@pytest.mark.parametrize("method", ["aisp", "best-of-n"])
def test_methods_and_own_reward(method: str, tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "reward")
    output = tmp_path / "answer.txt"
    arguments = ("--method", method, "--budget", "4", "--max-tokens", "8", "-r", str(folder), "-o", str(output))
    out = aisp("generate", STORY, *arguments)
    assert out.returncode == 0, out.stderr.decode()
    assert out.stdout == b""
    assert output.read_text().strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.txt", "reward"]


def test_generate_writes_a_timeline(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    out = aisp("generate", STORY, "--budget", "8", "--rows", "4", "--max-tokens", "8", "--timeline", str(path))
    assert out.returncode == 0 and out.stdout.strip() and out.stderr == b""
    events = json.loads(path.read_text())["traceEvents"]
    assert {"decode", "sample", "score", "update"} <= {event["name"] for event in events}
    assert {"MainThread", "aisp-local-reward_0"} <= {event.get("args", {}).get("name") for event in events}
    assert list(tmp_path.iterdir()) == [path]


def test_raw_continues_plain_text() -> None:
    out = aisp("generate", "Once upon a time", "--raw", "--budget", "2", "--max-tokens", "8")
    assert out.returncode == 0, out.stderr.decode()
    assert out.stdout.strip()


BAD = {
    "missing model": (["-m", "nowhere.gguf"], "model file nowhere.gguf does not exist"),
    "model is a folder": (["-m", "."], "is a folder"),
    "not a model": (["-m", "text.txt"], "text.txt is not a GGUF file"),
    "truncated model": (["-m", "half.gguf"], "it may be truncated"),
    "truncated header": (["-m", "header.gguf"], "header.gguf is truncated"),
    "model of a name too long": (["-m", 300 * "x"], "cannot be used (File name too long)"),
    "vocabulary only": (["-m", "vocabulary.gguf"], "holds a vocabulary only"),
    "no vocabulary": (["-m", "weights.gguf"], "holds no tokenizer"),
    "budget zero": (["--budget", "0"], "the budget is 0"),
    "budget negative": (["--budget", "-4"], "the budget is -4"),
    "budget beyond reason": (["--budget", "100000000"], "the budget is 100000000 rollouts; it must be 1 to 1000000"),
    "rows beyond reason": (["--budget", "100000", "--rows", "100000"], "100000 rollouts an iteration; it must be 1 to"),
    "rows of a stream": (["--budget", "100000", "--stream"], "with --stream all of the budget) is 100000 rollouts"),
    "no rows": (["--rows", "0"], "n (--rows; with --stream all of the budget) is 0 rollouts"),
    "unknown method": (
        ["--method", "magic"],
        "method 'magic' is unknown; use one of aisp, aisp-bases, aisp-held, aisp-static, args",
    ),
    "no tokens": (["--max-tokens", "0"], "max_tokens is 0"),
    "too many threads": (["--threads", "100000"], "llama.cpp takes 1 to 512"),
    "no threads": (["--threads", "0"], "llama.cpp takes 1 to 512"),
    "negative seed": (["--seed", "-1"], "the seed is -1"),
    "no time": (["--time-limit", "0"], "the time limit is 0.0 seconds"),
    "no time by its other name": (["--budget-seconds", "0"], "the time limit is 0.0 seconds"),
    "time that is no number": (["--time-limit", "nan"], "the time limit is nan seconds"),
    "missing steering": (["--steering", "u.json"], "u.json cannot be read (No such file or directory); check the path"),
    "steering is a folder": (["--steering", "."], ". cannot be read (Is a directory); check the path of the steering"),
    "steering is a model": (["--steering", "half.gguf"], "half.gguf is not valid UTF-8"),
    "steering is a text": (["--steering", "text.txt"], "text.txt holds no steering of this version; write one with"),
    "unwritable output": (["-o", "nowhere/answer.txt"], "nowhere does not exist"),
    "unwritable timeline": (["--timeline", "nowhere/trace.json"], "nowhere does not exist"),
    "output is a folder": (["-o", "."], "is a folder"),
    "output of a name too long": (["-o", 300 * "x"], "cannot be written (File name too long)"),
    "reward without manifest": (["-r", "."], "holds no reward.json"),
    "missing reward": (["-r", "nowhere"], "reward folder nowhere does not exist"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no models."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.txt").write_text("hello")
    (folder / "half.gguf").write_bytes(shipped.model().read_bytes()[:400_000])
    (folder / "header.gguf").write_bytes(shipped.model().read_bytes()[:10])
    synthetic.write_vocab_only(folder / "vocabulary.gguf")
    synthetic.write_llama(folder / "weights.gguf", vocab="none")
    return folder


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_sentence_and_exit_code_2(name: str, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD[name]
    out = aisp("generate", STORY, *arguments, cwd=broken)
    stderr = out.stderr.decode()
    assert out.returncode == 2, stderr
    assert out.stdout == b""
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert "Traceback" not in stderr
    monkeypatch.chdir(broken)
    debug = CliRunner().invoke(main, ["--debug", "generate", STORY, *arguments]).stderr
    assert "Traceback" in debug and message in debug


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-m", ""], "the path is empty"),
        (["generate", "x", "-r", ""], "the path is empty"),
        (["generate", "x", "-o", ""], "the path is empty"),
        (["explain", ""], "the path is empty"),
        (["reward", "show", ""], "the path is empty"),
        (["serve", "--host", ""], "--host is empty"),
        (["serve", "--parallel", "65"], "not in the range"),
        (["chat", "--resume", "folder/"], "folder cannot be read (Is a directory)"),
        (
            ["generate", "x", "-o", "a.json", "--trace", "./a.json"],
            "would be written over what is read or written there",
        ),
        (
            ["generate", "x", "-m", "model.gguf", "-o", "model.gguf"],
            "would be written over what is read or written there",
        ),
        (
            ["generate", "x", "--steering", "model.gguf", "--trace", "model.gguf"],
            "would be written over what is read or written there",
        ),
        (
            ["generate", "x", "--lora-scaled", "model.gguf", "0.5", "-o", "model.gguf"],
            "would be written over what is read or written there",
        ),
        (["generate", "x", "--strength", "0.3", "--option", "strength=0.9"], "are the same; leave one out"),
    ],
)
def test_what_is_empty_or_in_the_way_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("prompt", "stdin", "message"),
    [
        ("", None, "the prompt is empty"),
        ("  \n", None, "the prompt is empty"),
        ("-", b"", "the prompt is empty"),
        ("-", b"caf\xe9", "not valid UTF-8 (byte 3)"),
        ("word " * 2000, None, "the model's context"),
    ],
)
def test_bad_prompts(prompt: str, stdin: bytes | None, message: str) -> None:
    out = aisp("generate", prompt, stdin=stdin)
    stderr = out.stderr.decode()
    assert out.returncode == 2, stderr
    assert message in stderr and len(stderr.strip().splitlines()) == 1
    assert out.stdout == b"" and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--method", "magic"], STORY.encode(), "method 'magic' is unknown"),
        (["--max-tokens", "0"], STORY.encode(), "max_tokens is 0"),
        (["-r", "nowhere"], STORY.encode(), "reward folder nowhere does not exist"),
        ([], b"caf\xe9\n", "standard input is not valid UTF-8"),
    ],
)
def test_a_conversation_that_cannot_begin(arguments: list[str], stdin: bytes, message: str, tmp_path: Path) -> None:
    out = aisp("chat", *arguments, stdin=stdin, cwd=tmp_path)
    stderr = out.stderr.decode()
    assert out.returncode == 2, stderr
    assert message in stderr and len(stderr.strip().splitlines()) == 1


SHORT = ("generate", STORY, "--budget", "1", "--max-tokens", "4")


SHELL = {
    "closed input": ("generate - <&-", "standard input is closed"),
    "closed output": (f"generate '{STORY}' >&-", "standard output is closed; use -o FILE"),
    "full output": (
        f"generate '{STORY}' --budget 2 --max-tokens 4 >/dev/full",
        "standard output cannot be written (No space left on device)",
    ),
    "chat without input": ("chat <&-", "standard input is closed"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", sorted(SHELL))
def test_streams_that_cannot_be_used(name: str) -> None:
    line, message = SHELL[name]
    command = Path(sys.executable).with_name("aisp-local")
    out = subprocess.run(["sh", "-c", f"{command} {line}"], stderr=subprocess.PIPE, timeout=300, check=False)
    stderr = out.stderr.decode()
    assert out.returncode == 2, stderr
    assert message in stderr and len(stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback_before_or_after_the_command() -> None:
    for arguments in (["--debug", "generate", STORY, "--budget", "0"], ["generate", STORY, "--budget", "0", "--debug"]):
        out = aisp(*arguments)
        assert out.returncode == 2 and b"Traceback" in out.stderr


def test_json_has_no_numbers_that_json_does_not_know() -> None:
    assert finite({"a": [float("nan"), 1.5, {"b": float("-inf")}], "c": "nan"}) == {
        "a": [None, 1.5, {"b": None}],
        "c": "nan",
    }


def test_an_interrupt_of_the_baseline_keeps_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Aligner, "baseline", interrupted)
    with Aligner.load() as aligner:
        result = aligner.generate(STORY, budget=2, n=2, max_tokens=4, baseline=True)
    assert result.answer and result.baseline is None
    done = CliRunner().invoke(chat, ["--max-tokens", "4", "--method", "best-of-n"], input=f"{STORY}\n/base\n/show\n")
    assert done.exit_code == 0, done.output
    assert "(interrupted)" in done.output and "method       best-of-n" in done.output.split("(interrupted)")[1]


def test_a_long_conversation_forgets_its_oldest_turns_before_answers_are_cut() -> None:
    lines = "".join(f"{STORY} {'It is red. ' * 12}\n" for _ in range(6))
    out = aisp("chat", "--max-tokens", "128", "--method", "best-of-n", "--budget", "2", stdin=lines.encode())
    assert out.returncode == 0, out.stderr.decode()
    shown = out.stdout.decode()
    assert shown.count("[reward ") == 6 and "the oldest turn was forgotten" in shown
    assert "error" not in out.stderr.decode()


def test_the_time_left_counts_down_within_an_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(enabled=True, max_tokens=100)
    for iteration, done, step, seconds in (
        (1, 0, 0, 1.0),  # nothing is known yet
        (1, 3, 50, 1.5),  # half of an iteration, whatever has ended of it
        (2, 16, 0, 2.0),
        (2, 17, 40, 3.0),
        (2, 20, 90, 9.0),
    ):
        line._shown = 0.0
        line(Progress(iteration, 4, done, 64, step, rows_active=9, n_tokens=9, seconds=seconds, best=None, stats=None))
    assert re.findall(r"(\d+) s left", capsys.readouterr().err) == ["10", "6", "5", "0"]


def test_an_output_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    out = aisp(*SHORT, "-o", "locked/answer.txt", cwd=tmp_path)
    assert out.returncode == 2
    assert out.stderr.decode() == (
        "aisp-local: error: locked/answer.txt cannot be written: no permission; choose another path\n"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As /dev/stdout or /dev/null would: root must not replace those by files."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert aisp(*SHORT, "-o", "pipe", cwd=tmp_path).returncode == 0
        assert os.read(reader, 1000).strip()
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "answer.txt").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); choose another path"):
        write_output(tmp_path / "answer.txt", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("answer.txt", "old")]


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "answer.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("answer.txt")
    assert aisp(*SHORT, "-o", "link.txt", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "answer.txt").read_text() not in ("", "old")


def test_an_interrupt_gives_the_best_so_far() -> None:
    pty = pytest.importorskip("pty")
    command = Path(sys.executable).with_name("aisp-local")
    arguments = ["generate", STORY, "--budget", "100000", "--max-tokens", "60", "--json"]
    master, slave = pty.openpty()
    process = subprocess.Popen([str(command), *arguments], stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    seen = b""
    with open(master, "rb", buffering=0) as terminal:
        while b"iteration 2/" not in seen and (read := terminal.read(4096)):
            seen += read
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=120)
        seen += terminal.read(1 << 16)
    assert process.returncode == 0, seen.decode()
    data = json.loads(stdout)
    assert data["status"] == "interrupted"
    assert data["answer"] and len(data["candidates"]) < 100000
    assert b"best answer so far" in seen


def test_a_conversation(tmp_path: Path) -> None:
    lines = [
        "/why",
        STORY,
        "/why",
        "/base",
        "/effort medium",
        "/effort enormous",
        "/save talk.txt",
        "/nonsense",
        "/help",
        "/clear",
        "/quit",
    ]
    out = aisp("chat", "--max-tokens", "16", "--rows", "8", stdin="\n".join(lines).encode(), cwd=tmp_path)
    text = out.stdout.decode()
    assert out.returncode == 0, out.stderr.decode()
    for expected in (
        "32 rollouts",
        "iteration  rollouts",
        "best candidates",
        "[unaligned: reward",
        "effort medium: 128 rollouts",
        "saved to talk.txt",
        "/save [NAME|FILE]",
    ):
        assert expected in text, expected
    for expected in (
        "nothing to explain yet",
        "effort 'enormous' is unknown; use one of low, medium, high",
        "unknown command /nonsense",
    ):
        assert expected in out.stderr.decode(), expected
    saved = (tmp_path / "talk.txt").read_text()
    assert saved.startswith(f"You: {STORY}\n\nModel: ")


def test_chat_survives_what_it_cannot_do(tmp_path: Path) -> None:
    lines = ["word " * 3000, "/save nowhere/talk.txt", "/save", STORY]
    out = aisp("chat", "--max-tokens", "8", stdin="\n".join(lines).encode(), cwd=tmp_path)
    assert out.returncode == 0
    errors = out.stderr.decode()
    assert "the model's context" in errors and "does not exist" in errors
    assert "[reward" in out.stdout.decode()


def test_help_and_version() -> None:
    assert b"Examples:" in aisp("--help").stdout
    assert b"Exit codes:" in aisp("--help").stdout
    assert b"0.1.0" in aisp("--version").stdout
    assert aisp("generate").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["generate", STORY, "-m", "nowhere.gguf"],
        ["generate", STORY, "--budget", "0"],
        ["generate", STORY, "--rows", "100000"],
        ["generate", STORY, "--time-limit", "-1"],
        ["generate", STORY, "--steering", "nowhere.json"],
        ["generate", STORY, "--method", "magic"],
        ["chat", "--method", "magic"],
    ],
)
def test_what_needs_no_model_does_not_wait_for_its_libraries(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "from aisp_local.cli.main import main\n"
        "heavy = {'llama_cpp', 'onnxruntime', 'tokenizers'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "main()"
    )
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert out.returncode in (0, 2)
    assert out.stdout.splitlines()[-1] == "[]", out.stdout


def test_the_commands_have_the_defaults_of_python() -> None:
    python = inspect.signature(Aligner.generate).parameters
    defaults = {name: p.default for name, p in python.items()} | {"rows": python["n"].default}
    for command in (generate, chat):
        with command.make_context("x", []) as context:
            options = context.params
        for name in ("method", "max_tokens", "rows", "seed", "budget", "effort", "budget_tokens", "target_reward"):
            assert options[name] == defaults[name], name


def test_long_lines_are_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Once upon a time there was a fox.\n\n    indented code stays as it is"
    assert layout.wrapped(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "33")
    assert layout.wrapped(text) == "Once upon a time there was a fox.\n\n    indented code stays as it is"
    monkeypatch.setenv("COLUMNS", "20")
    assert layout.wrapped(text).split("\n")[:2] == ["Once upon a time", "there was a fox."]
    assert layout.wrapped("x" * 50) == "x" * 50


def test_a_model_does_not_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a\tb\r\x1b[2J\x9b\x07\n"
    print_text(text)
    assert capsys.readouterr().out == text  # a program gets what the model said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_text(text)
    assert capsys.readouterr().out == "a\tb??[2J??\n"
    assert layout.wrapped(text) == "a\tb??[2J??\n" and "\x1b" not in "".join(told_apart([text, text]))


def test_candidates_are_shown_from_where_they_differ() -> None:
    assert told_apart(["a fox", "a\ndog"]) == ["a fox", "a dog"]
    begin = "Once upon a time there was a fox that "
    shown = told_apart([begin + "sang" + " la" * 40, begin + "slept", begin + "sat"], width=40)
    assert shown == ["...sang" + " la" * 10 + "...", "...slept", "...sat"]
    shown = told_apart([f"{begin}sat in a tree and sang", f"{begin}sat in a tree and slept", "A dog."], width=40)
    assert shown == ["...sang", "...slept", "A dog."]
    assert told_apart([]) == [] and told_apart(["x" * 99], width=10) == ["x" * 7 + "..."]


def test_ctrl_c_while_modules_are_loaded_is_no_traceback() -> None:
    code = (
        "import builtins, sys\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *more, **others):\n"
        "    if name == 'click':\n"
        "        raise KeyboardInterrupt\n"
        "    return load(name, *more, **others)\n"
        "builtins.__import__ = interrupted\n"
        "from aisp_local.cli.start import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and done.stderr == "aisp-local: interrupted\n"

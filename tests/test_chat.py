"""Conversations: each command, what is kept of them, and what they can begin with; real models unless said."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnx_files import write_reward
from test_cli import STORY, aisp

from aisp_local import Aligner, shipped
from aisp_local.cli.chat import chat, commands, layout
from aisp_local.cli.chat.conversation import Conversation, folder, path_of
from aisp_local.cli.chat.lines import Lines
from aisp_local.cli.chat.persona import load_persona
from aisp_local.cli.chat.session import Session
from aisp_local.cli.chat.settings import Settings, words
from aisp_local.cli.main import main
from aisp_local.errors import CapacityError, InputError

FAST = ["--method", "best-of-n", "--max-tokens", "6"]
CONVERSATION = {
    "format": 1,
    "settings": {"method": "best-of-n", "max_tokens": 6},
    "messages": [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": "Tell me of a cat."},
        {"role": "assistant", "content": "There was a cat.", "aisp": {"reward": 1.5, "settings": {"seed": 9}}},
    ],
}


@pytest.fixture(scope="module")
def aligner() -> Iterator[Aligner]:
    with Aligner.load() as loaded:
        yield loaded


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def session(aligner: Aligner, home: Path) -> Session:
    return Session(aligner, Settings(method="best-of-n", max_tokens=6))


@pytest.fixture
def talk(session: Session, capsys: pytest.CaptureFixture[str]) -> Session:
    """With one turn."""
    session.ask(STORY)
    capsys.readouterr()
    return session


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


# What the user types


def read(*lines: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    read_end, write_end = os.pipe()
    os.write(write_end, "\n".join(lines).encode())
    os.close(write_end)
    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        source, found = Lines(lambda _: []), []
        while True:
            try:
                entry = source.read()
            except EOFError:
                return found
            found.append((entry.text, entry.command))


def test_entries_are_lines_blocks_and_lines_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(
        "  hello ", "/undo", "/etc/hosts has", "/* C */", '"""', "/undo", "  two", '"""', '"""one""" ',
        '/system """Be', 'kind."""', "one \\", "two", "", "/?", "/", "/ or", monkeypatch=monkeypatch,
    ) == [
        ("hello", False), ("/undo", True), ("/etc/hosts has", False), ("/* C */", False), ("/undo\n  two", False),
        ("one", False), ("/system Be\nkind.", True), ("one \ntwo", False), ("", False), ("/?", True),
        ("/", True), ("/ or", False),
    ]  # fmt: skip
    with pytest.raises(InputError, match="has no end"):
        read('"""', "one", monkeypatch=monkeypatch)


def test_a_terminal_completes_pastes_and_breaks_lines() -> None:
    pty = pytest.importorskip("pty")
    if "GNU" not in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("needs GNU readline")
    code = (
        "from aisp_local.cli.chat.lines import Lines\n"
        "lines = Lines(lambda line: ['/effort '] if line == '/eff' else [])\n"
        "print('ready', flush=True)\n"
        "while True: print('got', repr(lines.read().text), flush=True)"
    )
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""

    def wait(text: bytes) -> None:
        # Up to the prompt after it: what comes before that, readline's terminal has translated (\r is \n by then).
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen or b"> " not in seen.partition(text)[2]:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        seen = b""

    try:
        wait(b"ready")
        os.write(master, b"/eff\tlow\r")
        wait(rb"got '/effort low'")
        os.write(master, b"\x1b[200~one\ntwo\x1b[201~\r")
        wait(rb"got 'one\ntwo'")
        os.write(master, b"three\x1b\rfour\r")
        wait(rb"got 'three\nfour'")
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_completion_knows_commands_settings_methods_and_files(session: Session, home: Path) -> None:
    (home / "notes.txt").write_text("x")
    folder().mkdir(parents=True)
    written(folder() / "fox.json", {})
    for line, expected in {
        "/re": ["/regenerate ", "/resume "],
        "/effort m": ["medium"],
        "/set max": ["max-tokens "],
        "/set method sm": ["smc"],
        "/compare best-of-n,max-t": ["max-tokens="],
        "/compare sco": ["score"],
        "/file no": ["notes.txt"],
        "/resume f": ["fox"],
        "/bye": [],
        "hello": [],
        "/nonsense a": [],
        "": [],
    }.items():
        assert commands.complete(session, line) == expected, line


# Commands


def test_help_has_every_command(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    commands.run(session, "/help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"/{command.usage} {command.help}" in shown for command in commands.COMMANDS.values())
    with pytest.raises(InputError, match=r"unknown command /regnerate; did you mean /regenerate\?"):
        commands.run(session, "/regnerate")
    with pytest.raises(InputError, match="unknown command /; /help lists"):
        commands.run(session, "/")
    with pytest.raises(commands.LeaveError):
        commands.run(session, "/bye")


@pytest.mark.parametrize("name", ["undo", "regenerate", "base", "compare score", "keep 1", "why"])
def test_what_needs_a_turn_says_so(name: str, session: Session) -> None:
    with pytest.raises(InputError, match="nothing"):
        commands.run(session, f"/{name}")


def test_regenerate_takes_other_seeds(talk: Session) -> None:
    talk.settings = talk.settings.changed("max-tokens", "16")
    commands.run(talk, "/regenerate 1")
    first = talk.turns[0]
    assert first.seed == 1 and first.question == STORY
    commands.run(talk, "/regenerate")
    assert [turn.seed for turn in talk.turns] == [2] and talk.turns[0].answer != first.answer
    commands.run(talk, "/regenerate 1")
    assert talk.turns[0].answer == first.answer and talk.turns[0].reward == first.reward
    with pytest.raises(InputError, match="takes a seed, not 'x'"):
        commands.run(talk, "/regenerate x")


def test_edit_asks_in_other_words(
    talk: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands.run(talk, "/edit\nTell me a story about a cat.")
    assert [turn.question for turn in talk.turns] == ["Tell me a story about a cat."]
    with pytest.raises(InputError, match="an editor needs a terminal"):
        commands.run(talk, "/edit")
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nsed -i s/cat/dog/ $1\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    time.sleep(0.01)  # click looks at the file's time
    commands.run(talk, "/edit")
    assert [turn.question for turn in talk.turns] == ["Tell me a story about a dog."]
    capsys.readouterr()
    commands.run(talk, "/edit")
    assert capsys.readouterr().out == "nothing was changed\n"
    monkeypatch.setenv("VISUAL", "/nowhere/editor")
    with pytest.raises(InputError, match="set EDITOR, or use /edit TEXT"):
        commands.run(talk, "/edit")


def test_undo_clear_and_history(talk: Session, capsys: pytest.CaptureFixture[str]) -> None:
    talk.ask("And then?")
    commands.run(talk, "/history")
    shown = capsys.readouterr().out
    assert f"1> {STORY}\n" in shown and "2> And then?\n" in shown and shown.count("[reward ") == 3
    commands.run(talk, "/undo")
    assert [turn.question for turn in talk.turns] == [STORY] and talk.last is None
    commands.run(talk, "/base")
    commands.run(talk, "/clear")
    commands.run(talk, "/history")
    shown = capsys.readouterr().out
    assert "forgotten: And then?" in shown and "[unaligned: reward " in shown and "nothing was said yet" in shown
    assert talk.turns == []


def test_compare_shows_ways_and_keep_takes_one(talk: Session, capsys: pytest.CaptureFixture[str]) -> None:
    first = talk.turns[0]
    commands.run(talk, "/compare base max-tokens=3,effort=low")
    shown = capsys.readouterr().out
    assert "1. base\n[unaligned: reward " in shown and "2. max-tokens=3,effort=low\n[reward " in shown
    assert talk.turns == [first], "nothing is kept unless it is said"
    with pytest.raises(InputError, match="1 to 2"):
        commands.run(talk, "/keep 3")
    base = talk.aligner.baseline([{"role": "user", "content": STORY}], max_tokens=6)
    commands.run(talk, "/keep 1")
    assert talk.turns[0].answer == base.text and talk.turns[0].reward == base.reward
    assert talk.settings.max_tokens == 6
    commands.run(talk, "/compare seed=3")
    assert "1. best-of-n\n" in capsys.readouterr().out, "one alone is compared with what holds now"
    for ways, message in (
        ("", "say what with what"),
        ("magic", "'magic' is unknown"),
        ("strength=0.2", "no setting 'strength'"),
        ("base base", "these are the same"),
        ("aisp,seed=3,score", "names two methods; write them apart, as in aisp score"),
    ):
        with pytest.raises(InputError, match=message):
            commands.run(talk, f"/compare {ways}")


def test_columns_share_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two three four five six seven eight", "狐狸" * 20]
    assert layout.columns(texts) == "\n\n".join(texts), "without a terminal one below the other"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "63")
    first, *rest = layout.columns(texts).split("\n")
    assert first == "one two three four five six".ljust(29) + "  │  " + "狐狸" * 7
    assert all(line.index("│") == first.index("│") for line in rest)
    assert "".join(line.partition("│")[2].strip() for line in [first, *rest]) == texts[1]
    monkeypatch.setenv("COLUMNS", "40")
    assert "│" not in layout.columns(texts)


def test_settings_are_set_shown_and_refused(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("strength 0.7", "max-tokens 7", "rows=8", "stream on", "effort medium", "time-limit 9"):
        session.settings = Settings() if line.startswith("strength") else session.settings
        commands.run(session, f"/set {line}")
    settings = session.settings
    assert settings.options == {"strength": 0.7} and settings.search()["n"] == 128 and settings.search()["commit"]
    commands.run(session, "/set stream off")
    commands.run(session, "/set rows default")
    commands.run(session, "/show")
    shown = capsys.readouterr().out
    assert "strength     0.7" in shown and "context " in shown and "reward       story-reward" in shown
    for line, message in {
        "strength 7": "it must be in",
        "strenth 0.5": "did you mean 'strength'",
        "rows x": "rows is 'x'; it must be a whole number",
        "max-tokens 0": "max_tokens is 0",
        "stream maybe": "use on or off",
        "steering u.json": "there is no setting 'steering'",
        "time-limit -1": "must be greater than 0",
        "effort huge": "effort 'huge' is unknown",
        "method magic": "method 'magic' is unknown",
        "strength": "say what is to be set",
    }.items():
        before = session.settings
        with pytest.raises(InputError, match=message):
            commands.run(session, f"/set {line}")
        assert session.settings == before
    commands.run(session, "/set method best-of-n")
    assert session.settings.options == {}, "another method has no strength"
    assert {"method", "max-tokens", "strength"} <= set(words("score"))


def test_a_turn_is_ended_and_begun_as_it_is_set(session: Session, home: Path) -> None:
    for line in ("effort medium", "budget 12", "rows 4", "budget-tokens 900", "target-reward -1e9", "patience 2"):
        commands.run(session, f"/set {line}")
    assert session.settings.search()["budget"] == 12
    session.ask(STORY)
    assert session.last is not None and session.last.status == "target" and session.last.rollouts == 4
    commands.run(session, "/effort low")
    assert session.settings.rollouts == 32, "an effort takes the place of a budget"
    for line, message in {
        "patience 0": "must be at least 1",
        "target-reward high": "it must be a number",
        "budget 0": "it must be 1 to",
        "warm-start maybe": "use on or off",
        "target-reward inf": "it must be a finite number",
    }.items():
        with pytest.raises(InputError, match=message):
            commands.run(session, f"/set {line}")


def test_a_stream_has_no_budget_of_tokens() -> None:
    with pytest.raises(InputError, match="streaming decodes all rollouts at once; leave out budget-tokens"):
        Settings(stream=True, budget_tokens=100)


def test_a_turn_starts_with_what_the_one_before_learnt(session: Session, home: Path) -> None:
    session.settings = Settings(max_tokens=12, budget=16, rows=8)
    session.ask(STORY)
    first = session.last
    assert first is not None and first.control is not None and first.control.any()
    learnt = session.aligner.steering(first)
    messages = [{"role": "user", "content": STORY}, {"role": "assistant", "content": first.answer}]
    asked = [*messages, {"role": "user", "content": "And then?"}]
    commands.run(session, "/set warm-start on")
    session.ask("And then?")
    assert session.last is not None
    again = session.aligner.chat(asked, steering=learnt, seed=session.seed(1), max_tokens=12, budget=16, n=8)
    assert [c.reward for c in session.last.candidates] == [c.reward for c in again.candidates]
    # The same turn again starts where it did, whatever it has learnt meanwhile.
    answer = session.turns[1].answer
    commands.run(session, f"/regenerate {session.seed(1)}")
    assert session.turns[1].answer == answer
    commands.run(session, "/undo")
    session.ask("And then?")
    assert session.turns[1].answer == answer
    commands.run(session, "/set strength 0")
    session.ask("And then?")  # nothing is held: nothing to start with
    commands.run(session, "/set method best-of-n")
    session.ask("And then?")


def test_chat_starts_with_a_steering(session: Session, home: Path) -> None:
    short = ["--max-tokens", "8", "--budget", "8", "--rows", "4"]
    made = aisp("generate", STORY, *short, "--save-steering", "u.json", cwd=home)
    assert made.returncode == 0, made.stderr.decode()
    talked = aisp("chat", *short, "--steering", "u.json", cwd=home, stdin=STORY.encode())
    alone = aisp("chat", *short, cwd=home, stdin=STORY.encode())
    assert talked.returncode == alone.returncode == 0 and b"8 rollouts" in talked.stdout
    steered = session.aligner.chat(
        [{"role": "user", "content": STORY}], steering=home / "u.json", seed=1, max_tokens=8, budget=8, n=4
    )
    assert steered.answer.split() == talked.stdout.decode().partition("[reward")[0].split()
    for more, message in (
        (["--method", "best-of-n"], "needs a method that holds a control"),
        (["--strength", "0"], "needs a method that holds a control"),
        (["--warm-start", "--method", "smc"], "--steering needs a method that holds a control"),
        (["-m", str(shipped.talker())], "was learnt with another model"),
    ):
        refused = aisp("chat", *short, "--steering", "u.json", *more, cwd=home, stdin=b"")
        assert refused.returncode == 2 and message in refused.stderr.decode()


def test_an_effort_goes_before_a_budget_that_is_said_more_weakly(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, its table, the environment, a conversation, a persona, the command line; of one place the budget."""
    (home / "config.toml").write_text("budget = 3\nmax_tokens = 4\nmethod = 'best-of-n'\n[serve]\nport = 1\n")
    (home / "table.toml").write_text("budget = 3\nmax_tokens = 4\nmethod = 'best-of-n'\n[chat]\neffort = 'low'\n")
    (home / "p.toml").write_text("format = 1\neffort = 'low'\n")
    (home / "both.toml").write_text("format = 1\neffort = 'low'\nbudget = 2\n")
    settings = CONVERSATION["settings"] | {"effort": "high", "budget": 7}  # type: ignore[operator]
    (home / "talk.json").write_text(json.dumps(CONVERSATION | {"settings": settings}))

    def rollouts(*typed: str, config: str = "config.toml") -> int:
        done = CliRunner().invoke(main, ["--config", config, "chat", *typed], input="/effort\n")
        assert done.exit_code == 0, done.output
        return int(re.search(r": (\d+) rollouts an answer", done.output)[1])  # type: ignore[index]

    assert rollouts() == 3
    assert rollouts(config="table.toml") == 32
    assert rollouts("--resume", "talk.json") == 7
    assert rollouts("--resume", "talk.json", "--persona", "p.toml") == 32
    assert rollouts("--resume", "talk.json", "--persona", "both.toml") == 2
    assert rollouts("--persona", "both.toml", "--effort", "medium") == 128
    assert rollouts("--persona", "p.toml", "--budget", "9") == 9
    monkeypatch.setenv("AISP_EFFORT", "medium")
    assert rollouts() == 128 and rollouts("--budget", "9") == 9
    monkeypatch.setenv("AISP_BUDGET", "5")
    assert rollouts() == 5 and rollouts("--effort", "low") == 32


def test_settings_of_a_method_are_for_those_that_have_them(home: Path) -> None:
    (home / "config.toml").write_text('option = ["blocks=4"]\nstrength = 0.9\nwarm_start = true\n')
    (home / "p.toml").write_text("format = 1\nstrength = 0.2\n[options]\nblocks = 2\n")

    def shown(*typed: str) -> str:
        done = CliRunner().invoke(main, ["--config", "config.toml", "chat", *typed], input="/show\n")
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    assert "blocks 4" in shown() and "strength 0.9" in shown() and "warm-start on" in shown()
    assert "warm-start off" in shown("--no-warm-start")
    assert "blocks 2" in shown("--persona", "p.toml") and "strength 0.2" in shown("--persona", "p.toml")
    assert "blocks 3" in shown("--persona", "p.toml", "--option", "blocks=3")
    assert "blocks" not in shown("--method", "best-of-n") and "strength" not in shown("--method", "best-of-n")
    generate = ["--config", "config.toml", "generate", STORY, "--budget", "2", "--max-tokens", "3"]
    assert CliRunner().invoke(main, [*generate, "--method", "best-of-n"]).exit_code == 0
    typed = CliRunner().invoke(main, [*generate, "--method", "best-of-n", "--option", "blocks=4"])
    assert typed.exit_code == 2 and "has no option 'blocks'" in typed.output


def test_an_effort_that_is_typed_goes_before_a_budget_of_the_settings(home: Path) -> None:
    (home / "config.toml").write_text("budget = 3\nmax_tokens = 4\nmethod = 'best-of-n'\n")
    config = ["--config", "config.toml"]
    for typed, expected in (([], 3), (["--effort", "low"], 32), (["--effort", "low", "--budget", "5"], 5)):
        talked = aisp(*config, "chat", *typed, cwd=home, stdin=STORY.encode())
        assert f"{expected} rollouts" in talked.stdout.decode()
        answered = json.loads(aisp(*config, "generate", STORY, "--json", *typed, cwd=home).stdout)
        assert len(answered["candidates"]) == expected


def test_a_system_prompt_is_what_the_model_reads_first(session: Session, home: Path) -> None:
    (home / "system.txt").write_text("You tell stories.\n")
    commands.run(session, "/system @system.txt")
    session.ask(STORY)
    assert session.conversation.system == "You tell stories."
    asked = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": STORY}]
    assert session.turns[0].answer == session.aligner.chat(asked, method="best-of-n", max_tokens=6, seed=1).answer
    with pytest.raises(CapacityError, match="or the system prompt"):
        session.ask("word " * 600)
    commands.run(session, "/system -")
    assert session.conversation.system == ""
    for name, message in (("@nowhere.txt", "cannot be read"), ("@.", "cannot be read")):
        with pytest.raises(InputError, match=message):
            commands.run(session, f"/system {name}")


def test_a_file_is_asked_about(session: Session, home: Path) -> None:
    (home / "my notes.txt").write_text("There was a fox.\n")
    commands.run(session, '/file "my notes.txt" Go on:')
    assert session.turns[0].question == "Go on:\n\nThere was a fox."
    (home / "empty.txt").write_text(" \n")
    (home / "bytes").write_bytes(b"\xff\xfe")
    for name, message in (
        ("empty.txt", "is empty"),
        ("bytes", "not valid UTF-8"),
        ("no", "cannot be read"),
        ("", "name a"),
    ):
        with pytest.raises(InputError, match=message):
            commands.run(session, f"/file {name}")


# What is kept


def test_what_is_kept_is_gone_on_with(talk: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give a name or a file"):
        commands.run(talk, "/save")
    assert not folder().exists(), "nothing is written unless asked"
    commands.run(talk, "/system Be kind.")
    commands.run(talk, "/save fox")
    path = folder() / "fox.json"
    assert path.parent.stat().st_mode & 0o077 == 0
    content = json.loads(path.read_text())
    assert content["format"] == 1 and content["settings"]["max_tokens"] == 6
    assert [(m["role"], m["content"]) for m in content["messages"]] == [
        ("system", "Be kind."), ("user", STORY), ("assistant", talk.turns[0].answer)
    ]  # fmt: skip
    about = content["messages"][2]["aisp"]
    assert about["reward"] == talk.turns[0].reward and about["settings"]["seed"] == 1 and about["rollouts"] == 32
    again = Conversation.load(path)
    assert again.turns == talk.turns and again.system == "Be kind."
    talk.ask("And then?")
    commands.run(talk, "/save")
    assert len(Conversation.load(path).turns) == 2
    commands.run(talk, "/clear")
    with pytest.raises(InputError, match="there is another conversation 'fox'"):
        commands.run(talk, "/save fox")
    capsys.readouterr()
    commands.run(talk, "/resume")
    assert [turn.question for turn in talk.turns] == [STORY, "And then?"]
    assert "2 turns, the last: And then?" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no conversation 'fx'; did you mean 'fox'\?"):
        commands.run(talk, "/resume fx")
    assert path_of("a/b") == Path("a/b") and path_of("b.json") == Path("b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no conversation: it is not valid JSON"),
        ("[]", "holds no conversation"),
        ('{"format": 2, "messages": []}', "of format 1"),
        ("{}", "'messages' must be"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must take turns"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must take turns"),
        ('{"messages": [], "settings": {"rows": "x"}}', "'rows' has the wrong type"),
        ('{"messages": [], "settings": {"lora_scaled": [1]}}', "list of"),
        ('{"messages": [], "settings": []}', "must be an object"),
    ],
)
def test_files_that_hold_no_conversation(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Conversation.load(path)
    assert str(path) in str(pytest.raises(InputError, Conversation.load, path).value)


def test_a_conversation_of_another_program_is_one(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "aisp": 3}]
    found = Conversation.load(written(tmp_path / "talk.json", {"messages": messages}))
    assert [(turn.question, turn.answer, turn.reward, turn.seed) for turn in found.turns] == [("a", "b", None, None)]
    assert found.path is None, "which /save leaves alone"


def test_resume_has_the_settings_that_were_kept(home: Path) -> None:
    written(home / "cat.json", CONVERSATION)
    lines = "/show\n/history\nAnd then?\n/save\n"
    out = CliRunner().invoke(chat, ["--resume", "cat.json", "--max-tokens", "5"], input=lines)
    assert out.exit_code == 0, out.output
    assert "method       best-of-n" in out.stdout and "max-tokens   5" in out.stdout
    assert "System: You tell stories." in out.stdout and "There was a cat.  [reward 1.50]" in out.stdout
    kept = json.loads((home / "cat.json").read_text())
    assert [m["content"] for m in kept["messages"]][:4] == [
        "You tell stories.",
        "Tell me of a cat.",
        "There was a cat.",
        "And then?",
    ]
    assert kept["messages"][2]["aisp"] == {"reward": 1.5, "settings": {"seed": 9}}
    none = CliRunner().invoke(chat, ["--resume"])
    assert isinstance(none.exception, InputError) and "no conversation was kept yet" in str(none.exception)


# What a conversation begins with


def test_shipped_personas_can_be_had() -> None:
    assert set(shipped.personas()) >= {"storyteller-kind", "storyteller-brief"}
    for name in shipped.personas():
        found = load_persona(name)
        assert found["reward"].name in shipped.recipes(), name
        Settings(**{key: found[key] for key in ("max_tokens",) if key in found})


def test_a_persona_sets_what_the_command_line_does_not(home: Path) -> None:
    write_reward(home / "tiny")
    (home / "me.toml").write_text(
        'format = 1\nsystem = "Be kind."\nreward = "tiny"\nmethod = "best-of-n"\nmax_tokens = 4\nseed = 5\n'
    )
    out = CliRunner().invoke(chat, ["--persona", "me.toml", "--seed", "6"], input=f"{STORY}\n/show\n/save kept.json\n")
    assert out.exit_code == 0, out.output
    assert re.search(r"reward +tiny\n", out.stdout) and "seed         6" in out.stdout
    assert "system       Be kind." in out.stdout
    kept = json.loads((home / "kept.json").read_text())
    assert kept["settings"]["reward"] == str(home / "tiny") and kept["settings"]["seed"] == 6


def test_the_command_line_wins_over_a_persona_and_that_over_a_conversation(home: Path) -> None:
    (home / "me.toml").write_text("format = 1\nstrength = 0.6\nmax_tokens = 8\n[options]\nblocks = 3\n")
    settings = {"rows": 7, "max_tokens": 9, "options": {"strength": 0.9, "blocks": 5}}
    written(home / "kept.json", {"format": 1, "settings": settings, "messages": []})
    options = ["--persona", "me.toml", "--resume", "kept.json"]
    for more, expected in (
        ([], {"rows": "7", "max-tokens": "8", "strength": "0.6", "blocks": "3"}),
        (["--strength", "0.2", "--option", "blocks=2"], {"strength": "0.2", "blocks": "2"}),
        (["--method", "best-of-n"], {"method": "best-of-n", "max-tokens": "8"}),
    ):
        out = CliRunner().invoke(chat, [*options, *more], input="/show\n")
        assert out.exit_code == 0, out.output
        shown = dict(line.split(maxsplit=1) for line in out.stdout.splitlines() if line.strip())
        assert expected.items() <= shown.items()
    assert "strength" not in shown, "another method has none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("format = 2", "format 2 is not known"),
        ("format = 1\nstrenth = 1", "the key 'strenth' is unknown; did you mean 'strength'"),
        ('format = 1\nstrength = "x"', "'strength' has the wrong type"),
        ("format = ", "not valid TOML"),
        ("format = 1\nlora = [3]", "3 is not the name of a file"),
    ],
)
def test_a_persona_that_is_none(content: str, message: str, home: Path) -> None:
    (home / "me.toml").write_text(content)
    with pytest.raises(InputError, match=message):
        load_persona("me.toml")
    with pytest.raises(InputError, match=r"no persona 'storyteller-knd'; did you mean 'storyteller-kind'"):
        load_persona("storyteller-knd")


def test_a_question_about_what_is_piped_in(tmp_path: Path) -> None:
    out = aisp("chat", "Tell me a story about this:", *FAST, stdin=b"A fox.\n", cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == b"", out.stderr
    asked = [{"role": "user", "content": "Tell me a story about this:\n\nA fox."}]
    with Aligner.load() as aligner:
        answer = aligner.chat(asked, method="best-of-n", max_tokens=6, seed=1).answer
    assert out.stdout.decode() == answer.strip() + "\n", "the answer and nothing else"
    assert list(tmp_path.iterdir()) == []
    bad = aisp("chat", "Tell:", *FAST, stdin=b"caf\xe9")
    assert bad.returncode == 2 and b"not valid UTF-8" in bad.stderr


def test_a_model_without_a_chat_template_is_refused_at_once(home: Path) -> None:
    data = shipped.model().read_bytes()
    Path("plain.gguf").write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_tomplate"))
    done = CliRunner().invoke(main, ["chat", "-m", "plain.gguf", *FAST], input=f"{STORY}\n")
    assert done.exit_code == 2 and "plain.gguf has no chat template, which a conversation needs" in done.stderr
    assert "no: generate --raw" in CliRunner().invoke(main, ["models", "show", "plain.gguf"]).stdout
    raw = ["generate", "Once", "--raw", "-m", "plain.gguf", "--budget", "2", *FAST]
    assert CliRunner().invoke(main, raw).exit_code == 0

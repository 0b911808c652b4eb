"""README and docs/ do what they say: their Python blocks run, their commands run, their error messages are ours.

Commands are found by what they begin with, so that a new page is tested without being listed. What cannot run here is
held to be possible at least: the command, its options, the target of make, the extra of pip, the script, exist.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import Request, urlopen

import click
import pytest
import synthetic
from click.testing import CliRunner
from hub_server import FakeHub
from hub_server import serving as serving_hub
from test_server import Server, serving

from aisp_local import Aligner, api, controllers, shipped
from aisp_local.cli.main import main
from aisp_local.controllers import METHODS
from aisp_local.errors import ModelError
from aisp_local.rewards import load_reward
from aisp_local.rewards.rules import RULES
from aisp_local.server import Settings

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    r"^reward export OpenAssistant/": "asks the hub by another client; tests/test_reward_export.py has that",
}
"""Commands of aisp-local that are only parsed, and why."""

SLOW = [r"reward verify ", r"bench speed"]
"""Commands that run with the slow tests; else they are parsed."""

TRAINING = r"^reward (export|train)\b|^bench value\b|--method re-control"
"""Commands that need PyTorch and minutes: they run with the slow tests where it is installed; else they are parsed."""

NEEDS = {
    "aisp_local.reward_kit.export": "needs PyTorch and minutes; tests/test_reward_export.py",
    "aisp_local.reward_kit.train": "needs PyTorch and minutes; tests/test_reward_train.py",
}
"""Python blocks that are only compiled, and why."""

CLIENTS = {"langchain_openai": "langchain-openai", "llama_index": "llama-index-llms-openai-like"}
"""Python blocks that run where a package is, which is heavy."""

SMALL = {
    "generate": "--budget 4 --rows 4 --max-tokens 8",
    "chat": "--rows 4 --max-tokens 8",
    "bench controllers": "--max-prompts 1 --max-tokens 8 --budget 16 --exact-kl 0 --method score",
    "bench quality": "--max-prompts 1 --max-tokens 8 --budget 16 --exact-kl 0 --method score",
    "bench experiment": "--small --max-prompts 1 --max-tokens 8",
    "bench speed": "--quick",
    "bench value": "--responses 4 --epochs 2 --max-tokens 8",
    "reward train": "--epochs 1 --max-length 32",
    "serve": "--port 0",
}
"""What is appended to commands, so that they take a second or two: all else about them is as in the text."""

TYPED = {"models rm": "y\n", "bench rate": "q\n"}
"""What a command asks for that no transcript shows."""

TRAINED = ("my-reward", "polite")
"""Rewards that the pages make by training or exporting, and go on to use: stand-ins, where that has not run."""

PULLED = "bartowski/Llama-3.2-1B-Instruct-GGUF"
HUB = {
    PULLED: ["Llama-3.2-1B-Instruct-Q4_K_M.gguf"],
    "Qwen/Qwen2.5-0.5B-Instruct-GGUF": ["qwen2.5-0.5b-instruct-q8_0.gguf"],
    "TheBloke/Mistral-7B-GGUF": ["mistral-7b.Q5_K_M.gguf", "mistral-7b.Q4_K_M.gguf"],
    "owner/name": ["name-Q5_K_M.gguf", "name-Q4_K_M.gguf"],
    "me/Story-GGUF": ["story-Q8_0.gguf"],
}
"""What the hub of these tests has; every file is the shipped model."""

LIVED_IN = {
    "models.md": [("models pull me/Story-GGUF", "")],
    "cli.md": [
        (f"models pull {PULLED}", ""),
        ("chat --max-tokens 4", "Hello.\n/save it\n"),
        (f"config set model {PULLED}", ""),
        ("config set chat.effort medium", ""),
    ],
}
"""What was done before in the home of a page, with what was typed. In cli.md each help stands for itself."""

BUDGET, MAX_TOKENS = 8, 12
"""What a search of a Python block has at most."""

COMMAND = re.compile(
    r"(?:\w+=(?:\"[^\"]*\"|\S*) )*(?:\.venv/bin/)?(aisp-local|python3?|make|pip|curl|cat|tar|pytest|head)\b(?!:)"
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    where: str  # page:line
    language: str
    body: str


@dataclass(frozen=True)
class Command:
    where: str
    text: str  # without prompt and comment
    shown: str  # what follows it in a transcript

    @property
    def words(self) -> list[str]:
        """Without variables set before it, and without what is piped into a command of ours."""
        words = shlex.split(re.sub(r"^.*\| (?=aisp-local)", "", self.text), comments=True)
        while re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            words.pop(0)
        return [words[0].removeprefix(".venv/bin/"), *words[1:]]

    @property
    def arguments(self) -> str:
        """What follows aisp-local."""
        return self.text.removeprefix(".venv/bin/").removeprefix("aisp-local").strip()


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(f"{page.name}:{text[: found.start()].count(chr(10)) + 1}", found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """Lines after a prompt with what follows them, or else those that begin with a command; they may be continued."""
    if block.language in ("python", "json", "toml"):
        return
    prompted = re.search(r"^\$ ", block.body, re.MULTILINE) is not None
    lines = block.body.splitlines()
    while lines:
        line = lines.pop(0)
        if prompted and not line.startswith("$ "):
            continue
        line = line.removeprefix("$ ").strip()
        if not prompted and not COMMAND.match(line):
            continue
        while _open(line) and lines:
            line = (line.removesuffix("\\") if line.endswith("\\") else line + "\n") + lines.pop(0)
        shown = []
        while prompted and lines and not lines[0].startswith("$ "):
            shown.append(lines.pop(0))
        yield Command(block.where, line, "\n".join(shown))


def _open(line: str) -> bool:
    """Whether the command goes on in the next line."""
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return line.endswith("\\")


ALL = [(page, block, command) for page in PAGES for block in blocks(page) for command in commands(block)]
OURS = [command for _, _, command in ALL if command.words[0] == "aisp-local"]
OTHERS = [command for _, _, command in ALL if command.words[0] not in ("aisp-local", "curl")]
TRAININGS = list({block.where: block for _, block, command in ALL if re.search(TRAINING, command.arguments)}.values())
PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def reason(command: Command) -> str | None:
    """Why a command is not run."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.arguments)), None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a model, a reward, pairs, questions, and rubbish."""
    folder = tmp_path_factory.mktemp("docs")
    story = '[[part]]\nrule = "length"\nwords = [5, 60]\n'
    pairs = [{"prompt": "Say something.", "chosen": f"It is a good day {i}.", "rejected": "no no no"} for i in range(4)]
    for name in ("model.gguf", "a-model.gguf"):
        shutil.copy(shipped.model(), folder / name)
    synthetic.write(folder / "qwen2.gguf", "qwen2", vocab="bpe")
    for name in ("my_reward", "reward_folder", "another", "other_reward", "my_rewards/one", *TRAINED):
        shutil.copytree(shipped.judge(), folder / name)  # small
    shutil.copytree(shipped.talker_reward(), folder / "changed")
    (folder / "changed" / "config.json").write_text("{}")
    (folder / "reward_models").symlink_to(ROOT / "reward_models")
    (folder / "my.toml").write_text(f"format = 1\n\n{story}")
    (folder / "misspelt.toml").write_text(f"format = 1\n\n{story}".replace("words", "word"))
    (folder / "grader.toml").write_text(
        'format = 1\n\n[[part]]\nserver = "http://127.0.0.1:9"\nprompt = "{prompt} {response} Good?"\nretries = 0\n'
    )
    (folder / "prompts.json").write_text(json.dumps(dict.fromkeys(("tuning", "evaluation"), ["Tell me a story."])))
    asked = [json.dumps({"prompt": f"Tell me a story, {i}."}) for i in range(2)]
    (folder / "prompts.jsonl").write_text("\n".join(asked) + "\n")
    first = blocks(ROOT / "docs" / "index.md")
    (folder / "cat.toml").write_text(next(block.body for block in first if block.language == "toml"))
    (folder / "prompt.txt").write_text("Tell me a story about a fox.\n")
    (folder / "story.txt").write_text("Once there was a fox.\n")
    (folder / "question.txt").write_text("Tell me a story about a fox.\n")
    (folder / "long.txt").write_text("word " * 3000)
    (folder / "notes.txt").write_text("These are notes.\n")
    (folder / "broken.gguf").write_bytes(shipped.model().read_bytes()[:100_000])
    for name in ("pairs.jsonl", "mine.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "half.jsonl").write_text('{"prompt": "Hello", "chosen": "Hello!"}\n')
    write_training_rows(folder)
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as packed:
        packed.write((folder / "pairs.jsonl").read_text())
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with (
        Aligner.load(threads=1, reward=shipped.talker_reward()) as aligner,
        serving(aligner, Settings(max_tokens=MAX_TOKENS)) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    data = shipped.model().read_bytes()
    with serving_hub(
        FakeHub({name: dict.fromkeys(files, data) for name, files in HUB.items()}, tags=frozenset({"v1"}))
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def elsewhere(
    work: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """In that folder, and a home of the page that was empty at its top; what pages register is gone afterwards."""
    monkeypatch.chdir(work)
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    where = params["command"].where if "command" in params else "any"
    home = work / "home" / (where if where.startswith("cli.md") else where.partition(":")[0])
    for name in [name for name in os.environ if name.startswith(("AISP_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name, value in (("HOME", str(home)), ("HF_ENDPOINT", hub.endpoint), ("EDITOR", "true")):
        monkeypatch.setenv(name, value)
    if not home.exists():
        home.mkdir(parents=True)
        for words, given in LIVED_IN.get(where.partition(":")[0], []):
            assert CliRunner().invoke(main, words.split(), input=given).exit_code == 0
    with patch.dict(METHODS), patch.dict(RULES), warnings.catch_warnings():
        yield


def for_words(table: Mapping[str, str], words: Sequence[str]) -> str:
    """What a table says of the command that begins with these words."""
    return next((value for name, value in table.items() if list(words[: len(name.split())]) == name.split()), "")


def run(command: Command) -> click.testing.Result:
    """As a shell would: with < and >, behind a pipe, and with what a transcript shows as typed."""
    before = command.text.partition("| aisp-local")[0] if "| aisp-local" in command.text else ""
    words = command.words[1:]
    typed = [line[2:] for line in command.shown.splitlines() if line.startswith("> ")]
    given: bytes | str = "".join(f"{line}\n" for line in typed if not line.startswith("/set max-tokens"))
    if before:
        given = subprocess.run(["sh", "-c", before], capture_output=True, check=True).stdout
    given = given or for_words(TYPED, words)
    if "<" in words:
        at = words.index("<")
        given = Path(words[at + 1]).read_bytes()
        del words[at : at + 2]
    target = None
    redirection = next((word for word in words if word in (">", ">>")), None)
    if redirection is not None:
        at = words.index(redirection)
        target = Path(words[at + 1]).expanduser()
        del words[at : at + 2]
    if "aisp-local: error:" not in command.shown and not command.shown.startswith("Error:"):
        words += for_words(SMALL, words).split()
        if words[:2] in (["bench", "controllers"], ["bench", "quality"]) and "-m" not in words:
            words += ["--pair", "dialogs"]
    done = CliRunner().invoke(main, words, input=given)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab" if redirection == ">>" else "wb") as file:
            file.write(done.stdout_bytes)
    return done


def serve(command: Command) -> None:
    """Start a server, ask it something, and end it as a person does."""
    words = [*command.words[1:], *SMALL["serve"].split()]
    server = subprocess.Popen([sys.executable, "-m", "aisp_local", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = next(line for line in server.stderr if "Ctrl-C ends it" in line)
        port = re.search(r":(\d+)/v1", said)
        assert port is not None
        key = {"Authorization": f"Bearer {words[words.index('--api-key') + 1]}"} if "--api-key" in words else {}
        with urlopen(Request(f"http://127.0.0.1:{port[1]}/v1/models", headers=key), timeout=60) as answer:
            assert json.load(answer)["data"]
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130  # as it ends by the signal
    finally:
        server.kill()
        server.communicate()


def check_parses(command: Command) -> None:
    """The command exists, and so do its options, with values that they take."""
    words = command.words[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("<", ">", ">>", "&", "|")), len(words))]
    at: Any = main
    context = click.Context(main, info_name="aisp-local")
    while isinstance(at, click.Group) and not (at.invoke_without_command and not words):
        name, at, words = at.resolve_command(context, words)
        assert at is not None
        context = click.Context(at, parent=context, info_name=name)
    with suppress(ModelError):  # a name of a model that is not on this machine
        at.make_context(context.info_name, list(words), parent=context.parent, resilient_parsing="--help" in words)


def is_slow(command: Command) -> bool:
    return any(re.search(pattern, command.text) for pattern in SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in OURS if is_slow(command)], ids=str)
def test_slow_commands(command: Command) -> None:
    assert run(command).exit_code == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="TRAININGS ARE NOT TESTED: pip install 'aisp-local[export]'")
@pytest.mark.parametrize("block", TRAININGS, ids=lambda block: block.where)
def test_trainings(block: Block, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands of ours in the block, so that what is made is what is used."""
    import hf_models

    for path in work.glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for command in commands(block):
        if command.words[0] != "aisp-local" or reason(command) is not None:
            continue
        made = re.search(r"reward export (\S+)|--backbone (\S+)", command.text)
        folder = Path((made[1] or made[2]) if made else "")
        if made and not folder.exists():
            hf_models.write(folder, "Llama" if "llama" in folder.name else "Bert")
        done = run(command)
        if "aisp-local: error:" in command.shown:
            assert done.exit_code == 1
            _same(re.sub(r"\d[\d.]*", "0", done.stderr), re.sub(r"\d[\d.]*", "0", command.shown))
        elif not is_slow(command):  # a network of random weights ranks nothing right
            assert done.exit_code == 0, (command, done.output, done.exception)
        shutil.rmtree("my-reward.work", ignore_errors=True)


def write_training_rows(folder: Path) -> None:
    """What the pages train rewards on: comments with verdicts, and pairs."""
    things = ("letter", "garden", "song", "dinner", "report", "plan", "house", "idea")
    said = {"polite": ("Thank you for the", "What a lovely"), "rude": ("I hate the", "What a stupid")}
    rows = [(f"{phrase} {thing}.", verdict) for thing in things for verdict in said for phrase in said[verdict]]
    (folder / "comments.csv").write_text("comment,verdict\n" + "".join(f"{text},{verdict}\n" for text, verdict in rows))
    texts = {verdict: [text for text, v in rows if v == verdict] for verdict in said}
    pairs = zip(texts["polite"], texts["rude"], strict=True)
    lines = [
        json.dumps({"prompt": f"Say {i}.", "chosen": good, "rejected": bad}) + "\n"
        for i, (good, bad) in enumerate(pairs)
    ]
    (folder / "preferences.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("command", OURS, ids=lambda command: f"{command.where} {command.text[:60]}")
def test_commands_of_ours(command: Command) -> None:
    if reason(command) is not None or is_slow(command) or re.search(TRAINING, command.arguments):
        check_parses(command)
    elif "aisp-local: error:" in command.shown:
        done = run(command)
        _same(done.stderr, command.shown)
        assert done.exit_code in (1, 2)
    elif command.arguments.startswith("serve"):
        serve(command)
    else:
        check_parses(command)  # as it stands: what is appended may hide what it says
        done = run(command)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "error: " in command.shown or "error: " not in done.stderr, done.stderr  # of a command in a chat
        assert done.output or "-o" in command.words or command.words[1] == "config"


def _same(found: str, shown: str) -> None:
    """Equal, whatever the line breaks; ``[...]`` stands for anything."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("[...]"))
    assert re.fullmatch(pattern.replace(r".*", ".*"), " ".join(found.split())), (shown, found)


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: f"{command.where} {command.text[:60]}")
def test_other_commands_are_possible(command: Command) -> None:
    name, *words = command.words
    text = command.text
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words if "=" not in word][0] in targets
    elif name == "pip" or words[:2] == ["-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for names in re.findall(r"(?:\.|aisp-local)\[([\w,]+)\]", text):
            assert set(names.split(",")) <= set(extras)
    elif name in ("python", "python3"):
        script = ROOT / words[0].removeprefix("aisp-gpu/")
        if words[0] == "-m":
            assert find_spec(words[1]) is not None
        else:
            source = script.read_text()
            if "--help" in words:
                subprocess.run([sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True)
            for option in (word for word in words[1:] if word.startswith("--") and word != "--help"):
                assert f'"{option}"' in source, option
    elif name == "pytest":
        for path in (word for word in words if word.startswith("tests/")):
            assert (ROOT / path).exists()
    elif name != "tar":
        assert name in ("cat", "head", "wc"), f"how is {name} tested?"
        found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["sh", "-c", text], env=os.environ | {"PATH": found}, stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks(page: Path, request: pytest.FixtureRequest) -> None:
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    with small(), redirect_stdout(io.StringIO()):
        for block in blocks(page):
            if block.language != "python":
                continue
            code = block.body
            if "127.0.0.1:8080" in code:
                code = code.replace("127.0.0.1:8080", f"127.0.0.1:{request.getfixturevalue('server').port}")
            compiled = compile("\n" * int(block.where.split(":")[1]) + code, str(page), "exec")
            if not any(name in code for name in (*NEEDS, *CLIENTS)):
                exec(compiled, namespace)


@pytest.mark.parametrize("package", CLIENTS)
def test_clients(package: str, server: Server) -> None:
    if find_spec(package) is None:
        pytest.skip(f"THE RECIPE IS NOT TESTED: pip install {CLIENTS[package]}")
    (block,) = (block for page in PYTHON for block in blocks(page) if f"from {package}" in block.body)
    code = block.body.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    # These warn of many things of their own.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    [command for _, _, command in ALL if command.words[0] == "curl"],
    ids=lambda command: f"{command.where} {command.text[:60]}",
)
def test_curl(command: Command, server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("THE REQUESTS ARE NOT TESTED: there is no curl here")
    text = re.sub(r"(localhost|127\.0\.0\.1):8080", f"127.0.0.1:{server.port}", command.text)
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout and done.stdout.strip()


def small() -> Any:
    """Searches of a few short rollouts."""
    real = api.search_many

    def few(*arguments: Any, **options: Any) -> Any:
        for name, most in (("budget", BUDGET), ("n", BUDGET), ("max_tokens", MAX_TOKENS)):
            options[name] = min(options[name], most)
        return real(*arguments, **options)

    return patch.object(api, "search_many", few)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_and_json_blocks(page: Path, work: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            for one in block.body.splitlines() if block.body.count('\n{"') else [block.body]:
                json.loads(one)
        if block.language == "toml":
            (work / "block.toml").write_text(block.body.replace('"judge_folder"', '"judge"'))
            tomllib.loads(block.body)
            if "[[part]]" in block.body:
                load_reward(work / "block.toml")


def test_the_table_of_reasons_is_needed() -> None:
    texts = [command.arguments for command in OURS]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, text) for text in texts)] == []
    assert [name for name in (*SMALL, *TYPED) if not any(text.startswith(name) for text in texts)] == []
    code = [block.body for page in PYTHON for block in blocks(page)]
    assert [name for name in (*NEEDS, *CLIENTS) if not any(name in body for body in code)] == []


def test_the_options_of_methods_are_those_that_there_are() -> None:
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([a-z_0-9]+ [^|]*) \|$", text, re.M))
    others = {"value": "(a file)", "beta": "(from ess)", "window": "(all steps)", "mean": "(Python: U to stay at)"}
    for method in set(controllers.METHODS) - {"score"}:
        options = controllers.defaults_of(method).items()
        told = [f"{name.rstrip('_')} {others[name] if value is None else f'{value:.3g}'}" for name, value in options]
        assert rows[method] == ", ".join(told)

"""Settings from a file, environment variables and flags; help, completion, versions, the reference, doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import aisp_local
from aisp_local import Aligner, shipped
from aisp_local.cli import config as config_command
from aisp_local.cli import settings, version
from aisp_local.cli.main import main
from aisp_local.cli.options import method_options
from aisp_local.cli.output import duration
from aisp_local.cli.version import digest, lines
from aisp_local.errors import InputError
from aisp_local.testing import FakeEngine, FakeReward

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of the caller's variables."""
    for name in list(os.environ):
        if name.startswith(("AISP_", "XDG_")) or name == "NO_COLOR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def file(home: Path) -> Path:
    return home / ".config/aisp-local/config.toml"


def aisp(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="aisp-local", **options)


def in_effect(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What a command is run with."""
    name = next(word for word in arguments if word in main.commands)
    found: dict[str, Any] = {}
    monkeypatch.setattr(main.commands[name], "callback", lambda **options: found.update(options))
    done = aisp(*arguments)
    assert done.exit_code == 0, done.output
    return found


def test_the_file_then_the_environment_then_the_command_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(
        'threads = 3\nmodel = "talker"\nlora = ["a.gguf", "b.gguf"]\n[generate]\nthreads = 4\njson = true\n'
    )
    assert in_effect(monkeypatch, "chat")["threads"] == 3
    got = in_effect(monkeypatch, "generate", "x")
    assert (got["threads"], got["json_"], got["model"]) == (4, True, shipped.talker())
    assert got["lora"] == (Path("a.gguf"), Path("b.gguf"))
    monkeypatch.setenv("AISP_THREADS", "5")
    monkeypatch.setenv("AISP_TIME_LIMIT", "2.5")
    got = in_effect(monkeypatch, "generate", "x")
    assert got["threads"] == 5 and got["time_limit"] == 2.5
    assert in_effect(monkeypatch, "generate", "x", "--budget-seconds", "3")["time_limit"] == 3
    assert in_effect(monkeypatch, "generate", "x", "--threads", "6", "-m", "storyteller")["threads"] == 6
    assert "[default: 5]" in re.sub(r"\s+", " ", aisp("chat", "--help").output)
    monkeypatch.delenv("AISP_THREADS")
    assert "[default: 4]" in re.sub(r"\s+", " ", aisp("generate", "--help").output)
    other = file.with_name("other.toml")
    other.write_text("threads = 9\n")
    assert in_effect(monkeypatch, "--config", str(other), "chat")["threads"] == 9
    monkeypatch.setenv("AISP_CONFIG", str(other))
    assert in_effect(monkeypatch, "chat")["threads"] == 9
    monkeypatch.setenv("AISP_THREADS", "many")
    assert "'many' is not a valid integer" in aisp("chat").stderr


def test_a_strength_in_the_settings_is_for_methods_that_have_one(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("strength = 0.3\n")
    said = aisp("generate", "x", "--method", "best-of-n", "-r", "nowhere").stderr
    assert "reward folder nowhere does not exist" in said
    typed = aisp("generate", "x", "--method", "best-of-n", "--strength", "0.3").stderr
    assert "has no option 'strength'" in typed


WRONG = {
    "threads = 2\n\nmodle = 3\n": "line 3: the key 'modle' is unknown; did you mean 'model'?",
    '[chat]\n# x\nthreads = "two"\n': 'line 3: threads is "two"; it must be a whole number',
    "[serve]\nport = 99999\n": "line 2: port is 99999; 99999 is not in the range 0<=x<=65535",
    "[serve]\nbudget = 3\n": "line 2: the key 'budget' is unknown; aisp-local serve has no option of that name",
    "[chatt]\n": "line 1: there is no command 'chatt' to set options of; did you mean 'chat'?",
    "[bench]\nseed = 1\n": "there is no command 'bench' to set options of",
    "strength = 2\n": "strength is 2; 2.0 is not in the range 0.0<=x<=1.0",
    "stream = 1\n": "stream is 1; it must be true or false",
    "threads = true\n": "threads is true; it must be a whole number",
    'lora = "a.gguf"\n': 'lora is "a.gguf"; it must be a list',
    'lora_scaled = ["a.gguf", 1]\n': "each must be a list of 2",
    'lora_scaled = [["a.gguf", "x"]]\n': "it must be a number",
    "[chat]\neffort = 'huge'\n": "'huge' is not one of 'low', 'medium', 'high'",
    "model = 2026-01-01\n": 'model is "2026-01-01"; it must be a string',
    "threads = \n": "is not valid TOML",
}


@pytest.mark.parametrize("text", sorted(WRONG))
def test_what_no_command_can_use_is_one_sentence_with_its_place(text: str, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = aisp("generate", "x")
    assert done.exit_code == 2 and WRONG[text] in done.stderr, done.stderr
    assert str(file) in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert aisp("config", "path").stdout.strip() == str(file), "what repairs it still works"
    assert aisp("models", "list").exit_code == 0 and aisp("reward", "list").exit_code == 0


def test_files_that_cannot_be_read(home: Path, file: Path) -> None:
    assert "does not exist; check --config" in aisp("--config", "nowhere.toml", "chat").stderr
    assert "cannot be read (Is a directory)" in aisp("--config", str(home), "chat").stderr
    (home / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert "not valid UTF-8" in aisp("--config", str(home / "latin.toml"), "chat").stderr


def test_set_get_and_unset_keep_comments(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("# mine\nthreads = 2  # two\n")
    for key, value in (
        ("model", "talker"),
        ("max-tokens", "64"),
        ("chat.effort", "medium"),
        ("lora", "a.gguf"),
        ("stream", "true"),
        ("serve.allow_origin", '["http://a", "http://b"]'),
    ):
        assert aisp("config", "set", key, value).exit_code == 0, key
    text = file.read_text()
    assert text.startswith("# mine\nthreads = 2  # two\n") and 'lora = ["a.gguf"]' in text
    for key, value in (("model", "talker"), ("max_tokens", "64"), ("chat.effort", "medium"), ("stream", "true")):
        assert aisp("config", "get", key).stdout.strip() == value
    assert json.loads(aisp("config", "get", "serve.allow_origin").stdout) == ["http://a", "http://b"]
    shown = aisp("config").stdout
    assert re.search(r'^model = "talker" +# config.toml$', shown, re.MULTILINE)
    assert re.search(r'^\[chat\]\neffort = "medium"', shown, re.MULTILINE)
    for key in ("model", "max_tokens", "lora", "stream", "chat.effort", "serve.allow_origin"):
        assert aisp("config", "unset", key).exit_code == 0
    assert file.read_text().strip() == "# mine\nthreads = 2  # two"
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "threads", "two"], "it must be a whole number"),
        (["set", "nothing", "2"], "the key 'nothing' is unknown"),
        (["set", "bench.seed", "2"], "there is no command 'bench'"),
        (["get", "nothing"], "the key 'nothing' is unknown"),
        (["get", "model"], "model is not set"),
        (["unset", "model"], "model is not set in"),
        (["get", "debug"], "the key 'debug' is unknown"),
    ],
)
def test_settings_that_there_are_not(arguments: list[str], message: str, file: Path) -> None:
    done = aisp("config", *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not file.exists()


def test_a_broken_file_is_not_written_over(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("threads = \n")
    assert "is not valid TOML" in aisp("config", "set", "threads", "2").stderr
    assert file.read_text() == "threads = \n"


def test_a_broken_file_can_be_asked_about_and_repaired(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("nosuch = 1\nthreads = 2 # two\n")
    assert "(aisp-local config edit opens the file)" in aisp("generate", "Hi").stderr
    shown = aisp("generate", "--help")
    assert shown.exit_code == 0 and "--budget" in shown.output and "'nosuch' is unknown" in shown.stderr
    assert aisp("config", "unset", "nosuch").exit_code == 0 and file.read_text() == "threads = 2 # two\n"
    file.write_text("threads = \n")
    assert "is not valid TOML" in aisp("config", "unset", "threads").stderr


def test_files_of_one_run_are_no_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'output' is unknown" in aisp("config", "set", "output", "x.txt").stderr and not file.exists()
    monkeypatch.setenv("AISP_OUTPUT", "x.txt")
    assert in_effect(monkeypatch, "generate", "Hi")["output"] is None


def test_a_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AISP_EFFORT", "banana")
    done = aisp("generate", "Hi")
    assert done.exit_code == 2 and "It is set by the environment variable AISP_EFFORT." in done.stderr
    assert "It is set" not in aisp("generate", "Hi", "--effort", "apple").stderr
    assert 'effort = "banana"' in (shown := aisp("config").output) and "AISP_EFFORT, which cannot be used" in shown


def test_an_editor_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", "")
    monkeypatch.setenv("EDITOR", "no-such-editor")
    done = aisp("config", "edit")
    assert done.exit_code == 2 and "the editor cannot be used" in done.stderr and "set EDITOR" in done.stderr


def test_edit_writes_only_what_can_be_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[str | None] = iter(["threads = \n", "threads = 2\n"])
    monkeypatch.setattr(config_command.click, "edit", lambda *_, **__: next(answers))
    done = aisp("config", "edit", input="y\n")
    assert done.exit_code == 0 and "is not valid TOML" in done.stderr and file.read_text() == "threads = 2\n"
    answers = iter(["threads = 'x'\n"])
    assert aisp("config", "edit", input="n\n").exit_code == 2 and file.read_text() == "threads = 2\n"
    answers = iter([None])
    assert "nothing was changed" in aisp("config", "edit").stderr


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AISP_API_KEY", "hush")
    said = aisp("config", "show", "--all").output + aisp("config", "show", "--json").output
    said += aisp("serve", "--help").output + aisp("doctor", "--no-speed").output
    assert "hush" not in said and "AISP_API_KEY" in said


def test_settings_that_are_not_a_file_of_ours(home: Path) -> None:
    with pytest.raises(InputError, match="larger than 1 MiB"):
        (home / "big.toml").write_text("#" * (1 << 20) + "\n")
        settings.read(main, home / "big.toml")


def everything() -> list[tuple[str, click.Command]]:
    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for inner, one in command.commands.items() if isinstance(command, click.Group) else ():
            yield from walk(f"{name} {inner}", one)

    return list(walk("aisp-local", main))


@pytest.mark.parametrize("name", [name for name, _ in everything()])
def test_examples_come_first_in_every_help(name: str) -> None:
    shown = aisp(*name.split()[1:], "--help").output
    assert re.match(rf"Usage: {name} .*\n(  .*\n)*\nExamples:\n  \S", shown), shown
    assert shown.count("Examples:") == 1 and "\b" not in shown


def test_the_reference_is_current_and_the_same_anywhere() -> None:
    """In a process of its own: click keeps the help option of a command that was made outside of the group."""
    environment = os.environ | {"AISP_THREADS": "7", "COLUMNS": "50", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "aisp_local.cli.reference"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (DOCS / "cli.md").read_text(encoding="utf-8"), f"{' '.join(command[1:])} > docs/cli.md"
    assert set(re.findall("^## (.*)$", done.stdout, re.MULTILINE)) == {name for name, _ in everything()}


def test_the_width_of_help_is_the_terminals() -> None:
    narrow = aisp("generate", "--help", terminal_width=60).output
    wide = aisp("generate", "--help", terminal_width=110).output
    assert len(narrow.splitlines()) > len(wide.splitlines())


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.commands["chat"], "callback", lambda **_: click.echo(click.style("x", fg="red")))
    assert aisp("chat", color=True).output == "\x1b[31mx\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert aisp("chat", color=True).output == "x\n"


def test_version_says_what_decides_the_numbers() -> None:
    first, *rest = aisp("--version").output.splitlines()
    assert first == "aisp-local, version 0.1.0"
    said = "\n".join(rest)
    assert re.search(r"^llama-cpp-python \S+ \((patched|stock)\).*, libllama [0-9a-f]{12}$", said, re.MULTILINE)
    pin = tomllib.loads((Path(__file__).parents[1] / "patches" / "pin.toml").read_text())
    assert pin["version"] in version._LLAMA_CPP, "what llama.cpp does the pinned release have?"
    assert re.search(r"^onnxruntime(-gpu)? \d", said, re.MULTILINE)
    assert f"shipped model: storyteller.gguf {digest(shipped.model())}" in rest
    assert f"shipped reward: story-reward {digest(shipped.reward() / 'reward.json')}" in rest
    series = Path(__file__).parents[1] / "patches" / "series"
    of_checkout = f"patch series of this checkout: {len(list(series.glob('*.patch')))} patches"
    assert (of_checkout in said) == series.is_relative_to(Path(aisp_local.__file__).resolve().parents[1])
    assert lines() == [first, *rest]


def completed(shell: str, words: str, last: int, home: Path) -> list[str]:
    environment = os.environ | {
        "_AISP_LOCAL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(last) if shell != "fish" else words.split()[-1],
    }
    code = "from aisp_local.cli.main import main; main(prog_name='aisp-local')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_names_complete_in_a_shell(home: Path) -> None:
    assert completed("bash", "aisp-local chat -m ta", 3, home) == ["plain,talker"]
    assert completed("bash", "aisp-local chat -r k", 3, home) == ["plain,kind-and-safe"]
    assert completed("bash", "aisp-local mod", 1, home) == ["plain,models"]
    assert completed("bash", "aisp-local generate --method sc", 3, home) == ["plain,score"]
    assert completed("bash", "aisp-local chat --persona storyteller-k", 3, home) == ["plain,storyteller-kind"]
    assert completed("bash", "aisp-local reward show story-j", 3, home) == ["plain,story-judge"]
    assert completed("bash", "aisp-local config get chat.eff", 3, home) == ["plain,chat.effort"]
    assert completed("bash", "aisp-local chat -m ./no", 3, home) == ["file,./no"]
    assert "talker" in completed("fish", "aisp-local models show tal", 3, home)[0]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = aisp("completion", shell)
    assert done.exit_code == 0 and "_AISP_LOCAL_COMPLETE" in done.stdout


def test_durations() -> None:
    assert [duration(x) for x in (-1, 0.4, 59.4, 60, 185, 4800)] == [
        "0 s",
        "0 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 20 min",
    ]


@pytest.mark.native
def test_doctor_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local import doctor

    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    done = aisp("doctor", "-m", "talker", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["binding"]["patched"] and found["cores"] >= 1
    assert found["onnxruntime"]["why"] or found["onnxruntime"]["used"] == "CUDA"
    speed = found["speed"]
    assert speed["model"] == str(shipped.talker())
    assert set(speed["tokens_per_s"]) == {"1", "8", "32"} and min(speed["tokens_per_s"].values()) > 0
    low, medium, high = speed["searches"]
    assert (low["rollouts"], medium["rollouts"], high["rollouts"]) == (32, 128, 512)
    assert 0 < low["seconds"] < medium["seconds"] < high["seconds"]
    assert low["cache_bytes"] == 32 * 256 * 640 and low["fits"]


def test_doctor_knows_what_a_search_has_the_reward_read() -> None:
    """Of responses that never end: as many texts, and of the same lengths."""
    from aisp_local import doctor

    engine, lengths = FakeEngine(), list[int]()
    engine._z[:, 0], engine._w[:, 0], engine._w[0] = 1.0, 0.0, -20.0
    engine._z[:, 1:] *= 0.1

    def count(_: Any, responses: Sequence[str]) -> list[float]:
        lengths.extend(map(len, responses))
        return [float(text.count("e")) for text in responses]

    Aligner(engine, FakeReward(count)).generate("", budget=16, n=8, seed=1)
    first, later = doctor._read_at(True)
    assert lengths == [at for positions in (first, later) for at in positions for _ in range(8)]
    assert doctor._read_at(False) == ([256], [256])


@pytest.mark.native
def test_doctor_says_what_is_broken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = aisp("doctor", "--no-speed")
    assert fine.exit_code == 0 and re.search(r"^broken +nothing$", fine.stdout, re.MULTILINE)
    assert re.search(r"^settings +.*config.toml \(does not exist\): nothing set$", fine.stdout, re.MULTILINE)
    file.parent.mkdir(parents=True)
    file.write_text("modle = 3\n")
    done = aisp("doctor")
    assert done.exit_code == 1
    assert re.search(r"^broken +.*config.toml, line 1: the key 'modle' is unknown", done.stdout, re.MULTILINE)
    assert "speed of" not in done.stdout
    file.unlink()
    half = file.with_name("half.gguf")
    half.write_bytes(shipped.model().read_bytes()[:400_000])
    done = aisp("doctor", "-m", str(half))
    assert done.exit_code == 1 and "half.gguf cannot be loaded as a model" in done.stdout
    from aisp_local import doctor

    monkeypatch.setattr(doctor, "available_memory", lambda: 1000)
    done = aisp("doctor", "-m", "talker", "--json")
    assert done.exit_code == 1 and "no room for one rollout" in json.loads(done.stdout)["problems"][0]


def test_an_option_whose_name_python_keeps_for_itself() -> None:
    assert method_options("aisp", None, False, ["lambda=0.25", "sigma=2"]) == {"lambda_": 0.25, "sigma": 2}
    assert method_options("aisp", None, False, ["lambda_=0.25"]) == {"lambda_": 0.25}

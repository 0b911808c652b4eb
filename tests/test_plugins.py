"""What other packages add: the template in examples/, and packages with something wrong in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aisp_local import controllers, plugins
from aisp_local.errors import InputError, RewardError
from aisp_local.rewards import load_reward

TEMPLATE = Path(__file__).resolve().parent.parent / "examples" / "aisp-local-plugin"


def write_package(site: Path, name: str, points: dict[str, dict[str, str]]) -> None:
    """What an installer leaves of a package beside its modules."""
    folder = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A folder for sys.path in which the template is installed, by its own pyproject.toml."""
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
    shutil.copytree(TEMPLATE / "aisp_local_plugin", tmp_path / "aisp_local_plugin")
    write_package(tmp_path, project["name"], project["entry-points"])
    return tmp_path


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.mark.native
def test_the_command_uses_the_template(template: Path) -> None:
    arguments = ["aisp_local", "generate", "Tell me a story.", "--method", "cooling", "-r", "brevity"]
    out = run(
        template,
        *arguments,
        "--budget",
        "4",
        "--max-tokens",
        "12",
        "--option",
        "coldest=0.4",
        "--json",
        "--threads",
        "1",
    )
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert (found["method"], found["reward_model"], len(found["candidates"])) == ("cooling", "brevity", 4)
    assert found["reward"] == max(c["reward"] for c in found["candidates"]) < 0
    shown = run(template, "aisp_local", "generate", "--help")
    assert "cem, cooling, misvo" in " ".join(shown.stdout.split())
    assert "brevity  package  \n    of aisp-local-plugin" in run(template, "aisp_local", "reward", "list").stdout
    assert "package      aisp-local-plugin" in run(template, "aisp_local", "reward", "show", "brevity").stdout
    wrong = run(template, *arguments, "--option", "warmest=2")
    assert wrong.returncode == 2 and "its options are coldest, hottest" in wrong.stderr


def test_the_template_passes_its_own_tests(template: Path) -> None:
    out = run(template, "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TEMPLATE), str(TEMPLATE / "tests"))
    assert out.returncode == 0 and "3 passed" in out.stdout, out.stdout + out.stderr


def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"aisp_local.controllers": {"score": "json:loads"}, "aisp_local.rewards": {"judge": "json:loads"}}
    write_package(tmp_path, "taker", points)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="package taker adds a method 'score', which is the name of a built-in"):
        assert controllers.method_names() == sorted(controllers.METHODS)
    assert controllers.builder("score") is controllers.Score
    assert load_reward("judge").name == "story-judge"


def test_two_packages_with_one_name_are_both_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "one", {"aisp_local.controllers": {"mine": "json:loads"}})
    write_package(tmp_path, "other", {"aisp_local.controllers": {"mine": "json:dumps"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="two packages add a method 'mine'; neither is used"):
        assert "mine" not in controllers.method_names()


def test_a_broken_package_leaves_the_others_alone(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (template / "broken_module.py").write_text("def fails():\n    raise OSError('no model')\n\nnumber = 3\n")
    points = {
        "aisp_local.controllers": {"gone": "not_there:Method", "number": "broken_module:number"},
        "aisp_local.rewards": {"gone": "broken_module:nothing", "fails": "broken_module:fails"},
    }
    write_package(template, "broken", points)
    monkeypatch.syspath_prepend(str(template))
    assert {"gone", "cooling"} <= set(controllers.method_names())
    with pytest.raises(InputError, match="method 'gone' of the package broken cannot be loaded .ModuleNotFoundError"):
        controllers.options_of("gone")
    with pytest.raises(InputError, match="method 'number' is int, which makes no controller"):
        controllers.options_of("number")
    with pytest.raises(InputError, match="reward 'gone' of the package broken cannot be loaded .AttributeError"):
        load_reward("gone")
    with pytest.raises(RewardError, match="reward 'fails' cannot be made .OSError: no model"):
        load_reward("fails")
    with pytest.raises(RewardError, match="recipe by its name: kind-and-safe, short-and-plain, brevity, fails, gone"):
        load_reward("nowhere")
    assert controllers.options_of("cooling") == {"hottest", "coldest"}
    assert load_reward("brevity").name == "brevity"
    assert plugins.load("aisp_local.rewards", "nowhere", ()) is None


def test_the_documentation_shows_its_entry_points() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (TEMPLATE.parents[1] / "docs" / "python.md").read_text(), re.S)
    assert block in (TEMPLATE / "pyproject.toml").read_text()

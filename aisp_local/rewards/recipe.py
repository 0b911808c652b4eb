"""A composite reward from a TOML file, format 1, see docs/reward-rules.md."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aisp_local import shipped
from aisp_local.errors import InputError, RewardError
from aisp_local.rewards.base import Reward
from aisp_local.rewards.composite import COMBINE, ROLLOUTS, Combine, Composite, Part
from aisp_local.rewards.onnx import OnnxReward
from aisp_local.rewards.rules import RULES
from aisp_local.rewards.section import Section, nearest, read_toml
from aisp_local.rewards.server import ServerReward

_DOCS = "docs/reward-rules.md"
_TOP = ("format", "name", "description", "combine", "k", "judge", "rollouts", "part")
_KINDS = ("reward", "rule", "server")
_PART = ("name", "weight", "normalise", "mean", "std")

T = TypeVar("T")


@dataclass(frozen=True)
class Ingredient:
    """What a part is made of. ``keys``: those of the file that are not any part's, with paths as they were found."""

    kind: str  # "reward", "rule" or "server"
    keys: Mapping[str, Any]
    folder: Path | None  # the reward folder, of a model


@dataclass(frozen=True)
class Recipe:
    """A TOML file that was read: ``ingredients`` are those of ``reward.parts``, in their order."""

    path: Path
    description: str
    reward: Composite
    ingredients: tuple[Ingredient, ...]
    judge: Path | None  # its folder, or another TOML file


def load_recipe(source: str | os.PathLike[str], *, judge: bool = True) -> Composite:
    """The reward of a TOML file, with everything that it names. ``judge`` false: its judge is left out.

    Raises RewardError, whose sentence names the file, the part and the key.
    """
    return read_recipe(source, judge=judge).reward


def read_recipe(source: str | os.PathLike[str], *, judge: bool = True) -> Recipe:
    """``load_recipe``, with what the parts are made of."""
    path = Path(source)
    missing = f"reward file {path} does not exist; check the path given with -r"
    read = read_toml(path, thing="a description of a reward", missing=missing, docs=_DOCS)
    top = Section(read, str(path), _DOCS)
    if top.get("format", int) != 1:
        raise RewardError(f"{path}: format {top.data['format']!r} is not known; this version reads format 1")
    top.only(*_TOP)
    combine: Combine = top.choice("combine", COMBINE, "sum")  # type: ignore[assignment]
    if "k" in top.data and combine != "cautious":
        raise RewardError(f"{path}: 'k' has a meaning only with combine = \"cautious\"; leave it out")
    description = top.get("description", str, "")
    rows = top.get("part", list)
    if not rows:
        raise RewardError(f"{path}: 'part' is empty; add a [[part]] (see {_DOCS})")
    made = [_part(Section(row, f"{path}: part {i}", _DOCS), path.parent) for i, row in enumerate(rows, start=1)]
    parts, ingredients = [part for part, _ in made], tuple(ingredient for _, ingredient in made)
    name = top.get("name", str, path.stem)
    k, rollouts = top.number("k", 1.0), top.get("rollouts", int, ROLLOUTS)
    judged_by, judging = _judge(top, path.parent) if judge and "judge" in top.data else (None, None)
    reward = _said(
        str(path),
        lambda: Composite(parts, combine=combine, k=k, name=name, judge=judging, rollouts=rollouts),
    )
    return Recipe(path, description, reward, ingredients, judged_by)


def description_of(path: Path) -> str:
    """What a recipe says of itself; nothing of what it names is loaded. Raises RewardError."""
    read = read_toml(path, thing="a description of a reward", missing=f"{path} does not exist", docs=_DOCS)
    return str(Section(read, str(path), _DOCS).get("description", str, ""))


def _part(row: Section, folder: Path) -> tuple[Part, Ingredient]:
    kinds = [kind for kind in _KINDS if kind in row.data]
    if len(kinds) != 1:
        if not kinds:
            row.only(*_PART, *_KINDS)  # perhaps a misspelt one of them
        given = " and ".join(map(repr, kinds)) or "none of them"
        raise RewardError(f"{row.where} needs exactly one of 'reward', 'rule' and 'server', and has {given}")
    (kind,) = kinds
    reward, keys = {"reward": _folder, "rule": _rule, "server": _server}[kind](row, folder)
    model = {"reward": "reward", "rule": "folder"}.get(kind)
    ingredient = Ingredient(kind, keys, Path(keys[model]) if model in keys else None)
    mean, std = (None if key not in row.data else row.number(key) for key in ("mean", "std"))
    part = _said(
        row.where,
        lambda: Part(
            reward,
            weight=row.number("weight", 1.0),
            # A model's scale means nothing in itself; a rule's and a server's is documented.
            normalise=row.get("normalise", bool, kind == "reward" or mean is not None),
            mean=mean,
            std=std,
            name=row.get("name", str, ""),
        ),
    )
    return part, ingredient


def _folder(row: Section, folder: Path) -> tuple[Reward, dict[str, Any]]:
    row.only(*_PART, "reward")
    name = row.get("reward", str)
    if Path(name).suffix == ".toml":
        raise RewardError(f"{row.where}: 'reward' is {name!r}; a part is a reward folder: put that file's parts here")
    path = _said(f"{row.where}: 'reward'", lambda: _path(name, folder))
    return _said(f"{row.where}: 'reward'", lambda: OnnxReward.load(path)), {"reward": str(path)}


def _rule(row: Section, folder: Path) -> tuple[Reward, dict[str, Any]]:
    name = row.get("rule", str)
    if name not in RULES:
        raise RewardError(f"{row.where}: 'rule' is {name!r}, which is unknown; {nearest(name, sorted(RULES), 'rules')}")
    rule = RULES[name]
    arguments = _arguments(row, rule, "rule")
    for key in rule.PATHS:
        if isinstance(arguments.get(key), str):
            arguments[key] = str(_path(arguments[key], folder))
    return _said(row.where, lambda: rule(**arguments)), {"rule": name} | arguments


def _server(row: Section, folder: Path) -> tuple[Reward, dict[str, Any]]:
    arguments = _arguments(row, ServerReward) | {"server": row.data["server"]}
    return _said(row.where, lambda: ServerReward(**arguments)), arguments


def _arguments(row: Section, kind: Callable[..., Any], *also: str) -> dict[str, Any]:
    """The keys of a part that are the keyword arguments of what it makes; all others are refused."""
    known = inspect.signature(kind).parameters
    row.only(*also, *_PART, *known)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in row.data:
            raise RewardError(f"{row.where} lacks {key!r}; add it (see {_DOCS})")
    return {key: value for key, value in row.data.items() if key in known}


def _judge(top: Section, folder: Path) -> tuple[Path, Reward]:
    name = top.get("judge", str)

    def load() -> tuple[Path, Reward]:
        path = _path(name, folder)
        return path, load_recipe(path, judge=False) if path.suffix == ".toml" else OnnxReward.load(path)

    return _said(f"{top.where}: 'judge'", load)


def _path(name: str, folder: Path) -> Path:
    """The shipped reward, or a path relative to the TOML file."""
    return (None if (folder / name).exists() else shipped.reward_by_name(name)) or folder / name


def _said(where: str, make: Callable[[], T]) -> T:
    """What ``make`` gives; its errors with where in the file they come from."""
    try:
        return make()
    except InputError as error:
        raise RewardError(f"{where}: {error}") from error

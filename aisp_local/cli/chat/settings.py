"""How answers are searched for in a conversation, and what /set may change of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aisp_local.cli.options import method_options, settable
from aisp_local.controllers import builder, method_names
from aisp_local.defaults import (
    DEFAULT_EFFORT,
    DEFAULT_MAX_TOKENS,
    DEFAULT_METHOD,
    DEFAULT_SEED,
    EFFORT,
    STREAMED,
    budget_of,
    check_search,
)
from aisp_local.errors import InputError
from aisp_local.rewards.section import Section, nearest
from aisp_local.types import Limits

_UNSET = "default"
_SWITCH = {"on": True, "off": False}
_SWITCHES = ("stream", "warm_start")
_UNITS = {"time_limit": "a number of seconds", "target_reward": "a number"}


@dataclass(frozen=True)
class Settings:
    """``budget`` goes before ``effort``; ``options`` are the method's.

    ``warm_start``: each turn starts with what the turn before learnt. Raises InputError for what no search could run
    with.
    """

    method: str = DEFAULT_METHOD
    effort: str = DEFAULT_EFFORT
    budget: int | None = None
    budget_tokens: int | None = None
    target_reward: float | None = None
    patience: int | None = None
    warm_start: bool = False
    max_tokens: int = DEFAULT_MAX_TOKENS
    rows: int | None = None
    seed: int = DEFAULT_SEED
    time_limit: float | None = None
    stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        budget_of(None, self.effort)
        if self.stream and self.method not in STREAMED:
            raise InputError(f"streaming needs the method {' or '.join(STREAMED)}; {self.method!r} chooses at the end")
        if self.stream and (self.budget_tokens, self.target_reward, self.patience) != (None, None, None):
            raise InputError("streaming decodes all rollouts at once; leave out budget-tokens, target-reward, patience")
        check_search(
            method=self.method, budget=self.rollouts, n=self.rows, max_tokens=self.max_tokens, seed=self.seed,
            time_limit=self.time_limit, **self.options,
        )  # fmt: skip
        Limits(self.target_reward, self.patience, self.budget_tokens)

    @property
    def rollouts(self) -> int:
        """Of an answer."""
        return budget_of(self.budget, self.effort)

    @property
    def holds(self) -> bool:
        """Whether its searches learn a control, which another may start with."""
        still = [self.options.get("strength") == 0, self.options.get("nats") == 0, self.options.get("selection") == 1]
        return hasattr(builder(self.method), "held") and not any(still)

    def search(self) -> dict[str, Any]:
        """The arguments of ``Aligner.chat``, but for the seed, which each turn has its own of."""
        streamed = STREAMED[self.method] if self.stream else {}
        return {
            "method": self.method,
            "budget": self.rollouts,
            "n": self.rollouts if self.stream else self.rows,
            "max_tokens": self.max_tokens,
            "time_limit": self.time_limit,
            "budget_tokens": self.budget_tokens,
            "target_reward": self.target_reward,
            "patience": self.patience,
            **self.options,
            **streamed,
        }

    def as_json(self) -> dict[str, Any]:
        """What differs from nothing said at all would not tell a later version: every value."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"options": dict(self.options)}

    def changed(self, name: str, value: str) -> Settings:
        """With one of them set: of the fields, or an option of the method; "default" takes it back.

        A method that lacks options of the one before has the others.
        """
        name = name.replace("-", "_")
        if name in FIELDS:
            new = _FIELD_DEFAULTS[name] if value == _UNSET else _parsed(name, value)
            if name == "effort":
                return replace(self, effort=new, budget=None)
            if name != "method":
                return replace(self, **{name: new})
            known = settable(new)
            return replace(self, method=new, options={k: v for k, v in self.options.items() if k in known})
        if name not in settable(self.method):
            raise InputError(f"there is no setting {name!r}; {nearest(name, list(words(self.method)), 'they')}")
        rest = {key: kept for key, kept in self.options.items() if key != name}
        more = [] if value == _UNSET else [f"{name}={value}"]
        return replace(self, options=rest | method_options(self.method, None, False, more))

    def varied(self, text: str) -> Settings:
        """With what a word says: a method, NAME=VALUE, or one with several of the other with commas between them."""
        new, parts = self, text.split(",")
        methods = [part for part in parts if "=" not in part]
        if len(methods) > 1:
            raise InputError(f"{text} names two methods; write them apart, as in {' '.join(methods)}")
        for part in parts:
            name, equals, value = part.partition("=")
            new = new.changed(name, value) if equals else new.changed("method", part)
        return new

    def lines(self) -> list[str]:
        """Each on a line, as /set takes them; what was not given is not shown."""
        shown = self.as_json() | dict(self.options)
        del shown["options"]
        if self.budget is not None:
            del shown["effort"]
        return [f"{_typed(name):<12} {_shown(value)}" for name, value in shown.items() if value is not None]


_FIELD_DEFAULTS: dict[str, Any] = Settings().as_json()
FIELDS = tuple(name for name in _FIELD_DEFAULTS if name != "options")


_KINDS: dict[str, type | tuple[type, ...]] = {
    "system": str, "model": str, "reward": str, "judge": str, "lora": list, "lora_scaled": list,
    "method": str, "effort": str, "strength": (int, float), "options": dict,
    "max_tokens": int, "rows": int, "seed": int, "time_limit": (int, float), "stream": bool,
    "budget": int, "budget_tokens": int, "target_reward": (int, float), "patience": int, "warm_start": bool,
}  # fmt: skip
KEYS = tuple(_KINDS)


def options_in(section: Section, folder: Path) -> dict[str, Any]:
    """The command's options that a file has, by their names there; paths are relative to its folder.

    A model or a reward that is not there is taken for a name. Raises InputError for what is of the wrong type.
    """

    def place(name: object) -> Path:
        if not isinstance(name, str):
            raise InputError(f"{section.where}: {name!r} is not the name of a file")
        beside = folder / Path(name).expanduser()
        return beside if beside.exists() else Path(name)

    given = [key for key in KEYS if section.data.get(key) is not None]
    found = {key: section.get(key, _KINDS[key]) for key in given}
    found |= {key: place(found[key]) for key in ("model", "reward", "judge") if key in found}
    if "lora" in found:
        found["lora"] = tuple(map(place, found["lora"]))
    if "lora_scaled" in found:
        pairs = found["lora_scaled"]
        if not all(isinstance(p, list) and len(p) == 2 and isinstance(p[1], int | float) for p in pairs):
            raise InputError(f"{section.where}: 'lora_scaled' must be a list of [file, scale]")
        found["lora_scaled"] = tuple((place(name), float(scale)) for name, scale in pairs)
    return found


def words(method: str) -> dict[str, list[str]]:
    """The settings that a method has, each with the words that it may be set to where there are few."""
    choices = {"method": method_names(), "effort": list(EFFORT)} | dict.fromkeys(_SWITCHES, list(_SWITCH))
    names = (*FIELDS, *sorted(settable(method)))
    return {_typed(name): [*choices.get(name, ()), _UNSET] for name in names}


def _typed(name: str) -> str:
    """The command line's way to write a name."""
    return name.replace("_", "-") if name in FIELDS else name


def _parsed(name: str, value: str) -> Any:
    if name in ("method", "effort"):
        return value
    if name in _SWITCHES:
        if value not in _SWITCH:
            raise InputError(f"{_typed(name)} is {value!r}; use on or off")
        return _SWITCH[value]
    kind = float if name in _UNITS else int
    try:
        return kind(value)
    except ValueError as error:
        what = _UNITS.get(name, "a whole number")
        raise InputError(f"{_typed(name)} is {value!r}; it must be {what}, or {_UNSET}") from error


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

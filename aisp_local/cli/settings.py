"""The user's settings: config.toml, over it environment variables, over both what the command line says.

A key is the long name of an option with "_" for "-". At the top of the file it is for every command that has the
option, in a table such as [chat] for that command alone. Its environment variable is AISP_ and the key in capitals.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from aisp_local.cli.names import ModelPath
from aisp_local.defaults import layered
from aisp_local.errors import InputError
from aisp_local.files import read_text
from aisp_local.rewards.section import nearest

FILE = "config.toml"
_WITHOUT = ("completion", "config", "explain", "replay")  # commands that settings are not for
_ONE_RUN = ("input", "output", "resume", "save_steering", "timeline", "trace")
"""Options that name a file of one run: as a setting they would write, or answer, the same one for ever."""

_MAX_BYTES = 1 << 20
_WHICH = "check --config or AISP_CONFIG"


def default_path() -> Path:
    """~/.config/aisp-local/config.toml, or where the system keeps such files."""
    return Path(click.get_app_dir("aisp-local")) / FILE


def commands(main: click.Group) -> dict[str, dict[str, click.Option]]:
    """The commands that settings are for, each with its options by their keys."""
    found = {}
    for name, command in main.commands.items():
        if name not in _WITHOUT and not isinstance(command, click.Group):
            options = [p for p in command.params if isinstance(p, click.Option) and p.expose_value and not p.is_eager]
            found[name] = {key: option for option in options if (key := key_of(option)) not in _ONE_RUN}
    return found


def key_of(option: click.Option) -> str:
    """Its long name, the first of several."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0]).lstrip("-").replace("-", "_")


def name_variables(main: click.Group) -> None:
    """Let every option have its environment variable."""
    for options in commands(main).values():
        for key, option in options.items():
            option.envvar = option.envvar or f"AISP_{key.upper()}"


@dataclass(frozen=True)
class Settings:
    """What a file says, checked. ``shared`` by key, ``tables`` by command and key."""

    path: Path
    shared: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, command: str, options: Mapping[str, click.Option]) -> dict[str, Any]:
        """The values of one command's options, by key."""
        layers = (self.shared, self.tables.get(command, {}))
        return layered(*({key: value for key, value in layer.items() if key in options} for layer in layers))

    def defaults(self, main: click.Group) -> dict[str, dict[str, Any]]:
        """click's default_map. What environment variables say is in it too, so that --help shows it."""
        found = {}
        for name, options in commands(main).items():
            values = {str(options[key].name): value for key, value in self.of(name, options).items()}
            said = {str(option.name): from_environment(option) for option in options.values()}
            found[name] = layered(values, {key: value for key, value in said.items() if value is not None})
        return found


def from_environment(option: click.Option) -> Any | None:
    """What the option's environment variable says; None if it is not set, or says nothing that the option takes."""
    context = click.Context(click.Command("environment"))
    said = option.value_from_envvar(context)
    if said is None or option.is_flag or option.multiple or option.nargs != 1 or isinstance(option.type, ModelPath):
        return said
    try:
        return option.type_cast_value(context, said)
    except click.BadParameter:  # which the command says itself
        return None


def read(main: click.Group, path: Path | None) -> Settings:
    """The settings in a file; without one, those of the user's own if there is any. Raises InputError."""
    chosen = default_path() if path is None else path
    try:
        if not chosen.exists() and path is None:
            return Settings(chosen)
        if not chosen.exists():
            raise InputError(f"the configuration {chosen} does not exist; {_WHICH}")
        if chosen.is_file() and chosen.stat().st_size > _MAX_BYTES:
            raise InputError(f"{chosen} is larger than 1 MiB; it is no configuration")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"the configuration {chosen} cannot be read ({error.strerror}); {_WHICH}") from error
    try:
        return parse(main, chosen, read_text(chosen, _WHICH))
    except InputError as error:
        raise InputError(f"{error} (aisp-local config edit opens the file)") from error


def parse(main: click.Group, path: Path, text: str) -> Settings:
    """Settings from the text of a file. Raises InputError, with the line, for what no command can use."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML ({error}); repair it") from error
    known = commands(main)
    shared: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        if not isinstance(value, dict):
            shared[key] = value
            check(main, None, key, value, f"{path}{_line(text, None, key)}")
        elif key not in known:
            raise InputError(
                f"{path}{_line(text, key, None)}: there is no command {key!r} to set options of; "
                f"{nearest(key, sorted(known), 'such commands')}"
            )
        else:
            tables[key] = value
            for name, each in value.items():
                check(main, key, name, each, f"{path}{_line(text, key, name)}")
    return Settings(path, shared, tables)


def check(main: click.Group, command: str | None, key: str, value: Any, where: str) -> None:
    """Raises InputError for a key that a command, or without one all commands, has no option for, or a wrong value."""
    options = options_named(main, command, key)
    if not options:
        known = commands(main)
        keys = sorted({name for options in known.values() for name in options} if command is None else known[command])
        advice = nearest(key, keys, "the keys")
        if command is not None and options_named(main, None, key):
            advice = f"aisp-local {command} has no option of that name"
        raise InputError(f"{where}: the key {key!r} is unknown; {advice}")
    for option in options:
        _check_value(option, value, f"{where}: {key} is {json.dumps(value, default=str, ensure_ascii=False)}")


def options_named(main: click.Group, command: str | None, key: str) -> list[click.Option]:
    """The options that a key sets: of one command, or of all."""
    found = [options.get(key) for name, options in commands(main).items() if command in (None, name)]
    return [option for option in found if option is not None]


def _check_value(option: click.Option, value: Any, said: str) -> None:
    if option.multiple:
        if not isinstance(value, list):
            raise InputError(f"{said}; it must be a list")
        for each in value:
            _check_one(option, each, said)
    else:
        _check_one(option, value, said)


def _check_one(option: click.Option, value: Any, said: str) -> None:
    if option.nargs != 1:
        types = option.type.types if isinstance(option.type, click.Tuple) else [option.type] * option.nargs
        if not isinstance(value, list) or len(value) != len(types):
            raise InputError(f"{said}; each must be a list of {len(types)}")
        for kind, part in zip(types, value, strict=True):
            _check_type(kind, option, part, said)
    elif option.is_flag:
        if not isinstance(value, bool):
            raise InputError(f"{said}; it must be true or false")
    else:
        _check_type(option.type, option, value, said)


def _check_type(kind: click.ParamType[Any], option: click.Option, value: Any, said: str) -> None:
    wanted: tuple[type, ...] = (str,)
    text = "a string"
    if isinstance(kind, type(click.FLOAT)):
        wanted, text = (int, float), "a number"
    elif isinstance(kind, type(click.INT)):
        wanted, text = (int,), "a whole number"
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise InputError(f"{said}; it must be {text}")
    if isinstance(kind, ModelPath):  # which may be gone meanwhile, and that matters where it is used
        return
    try:
        kind.convert(value, option, None)
    except click.BadParameter as error:
        raise InputError(f"{said}; {error.message.rstrip('.')}") from error


def from_text(main: click.Group, command: str | None, key: str, text: str) -> Any:
    """The value that a word on the command line means for a key. Raises InputError for an unknown key."""
    options = options_named(main, command, key)
    if not options:
        check(main, command, key, text, "config set")
    option = options[0]
    plain = isinstance(option.type, (type(click.STRING), click.Path, click.Choice)) and not option.is_flag
    try:
        value = text if plain and not option.multiple else json.loads(text)
    except ValueError:
        value = text
    if option.multiple and not isinstance(value, list):
        value = [value if isinstance(value, str) else text]
    return value


def _line(text: str, table: str | None, key: str | None) -> str:
    """Where a key, or without one a table, stands in a file; empty where that cannot be told."""
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*[\"']?([\w-]+)[\"']?\s*\]", line):
            inside = header[1]
            if key is None and inside == table:
                return f", line {number}"
        elif key is not None and inside == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f", line {number}"
    return ""


@dataclass(frozen=True)
class Effective:
    """An option's value and where it is from; ``origin`` is empty for a default. A secret's value is not told."""

    command: str
    key: str
    value: Any
    origin: str


def effective(main: click.Group, settings: Settings) -> list[Effective]:
    """What is in effect for each option of each command."""
    found = []
    for name, options in commands(main).items():
        own = settings.of(name, options)
        for key, option in options.items():
            value, origin = from_environment(option), ""
            variable = set_variable(option)
            if variable is not None:
                origin = variable if value is not None else f"{variable}, which cannot be used"
                value = os.environ[variable] if value is None else value
            elif key in own:
                value, origin = own[key], settings.path.name
            else:
                default = option.get_default(click.Context(click.Command(name)))
                value = default if isinstance(default, (str, int, float, tuple)) else None
            secret = origin and option.show_default is False
            found.append(Effective(name, key, "(not shown)" if secret else value, origin))
    return found


def set_variable(option: click.Option) -> str | None:
    """The environment variable that sets an option now, if any does."""
    names = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    return next((name for name in names if os.environ.get(name)), None)

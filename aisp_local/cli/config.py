"""`aisp-local config`: the user's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from aisp_local.cli import settings
from aisp_local.cli.help import Group
from aisp_local.cli.output import print_answer, print_json
from aisp_local.errors import InputError
from aisp_local.files import check_output, read_text, write_output

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

    from aisp_local.cli.settings import Effective

_BEGIN = """\
# Settings of aisp-local: options by their long names, for every command that has them, or in a table for one command.
# `aisp-local config show --all` lists them.
#
# model = "owner/name:Q4_K_M"
# threads = 4
#
# [chat]
# effort = "medium"
"""


def _complete_key(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known = settings.commands(_main(context))
    keys = {key for options in known.values() for key in options}
    keys |= {f"{command}.{key}" for command, options in known.items() for key in options}
    return [
        CompletionItem(key)
        for key in sorted(keys)
        if key.startswith(incomplete) and ("." in incomplete) == ("." in key)
    ]


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def config(context: click.Context) -> None:
    """Show and change the settings that commands begin with: a TOML file, over it environment variables.

    A KEY is the long name of an option, with _ for -: threads, max_tokens. So it is set for every command that has it;
    chat.effort sets it for one. The environment variable of a key is AISP_ and its name in capitals (AISP_THREADS).
    What the command line says wins over both. --config FILE, or AISP_CONFIG, names another file.

    \b
    Examples:
      aisp-local config
      aisp-local config set model bartowski/Llama-3.2-1B-Instruct-GGUF
      aisp-local config set chat.effort medium
      aisp-local config unset model
    """
    if context.invoked_subcommand is None:
        context.invoke(show, all_=False, json_=False)


@config.command()
@click.option("--all", "all_", is_flag=True, help="Options at their defaults too.")
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
@click.pass_context
def show(context: click.Context, all_: bool, json_: bool) -> None:
    """Show the settings in effect and where each is from.

    \b
    Examples:
      aisp-local config show
      aisp-local config show --all
    """
    found = settings.read(_main(context), _given(context))
    rows = [row for row in settings.effective(_main(context), found) if all_ or row.origin]
    if json_:
        print_json([vars(row) | {"origin": row.origin or "default"} for row in rows])
        return
    print_answer(f"# {found.path}{'' if found.path.exists() else ' (does not exist)'}")
    everywhere = [row for row in rows if all(_same(row, other) for other in rows if other.key == row.key)]
    shown = {row.key: row for row in everywhere if sum(other.key == row.key for other in rows) > 1}
    for row in shown.values():
        print_answer(_as_line(row))
    for command in dict.fromkeys(row.command for row in rows if row.key not in shown):
        print_answer(f"\n[{command}]")
        for row in rows:
            if row.command == command and row.key not in shown:
                print_answer(_as_line(row))
    if not rows:
        print_answer("# nothing is set; config show --all lists what can be")


def _same(row: Effective, other: Effective) -> bool:
    return (row.value, row.origin) == (other.value, other.origin)


def _as_line(row: Effective) -> str:
    if row.value is None or row.value == ():
        return f"# {row.key} ="
    line = f"{row.key} = {_shown(row.value)}"
    return f"{line:40}# {row.origin}" if row.origin else line


@config.command()
@click.argument("key", shell_complete=_complete_key)
@click.pass_context
def get(context: click.Context, key: str) -> None:
    """Print the value in effect of KEY.

    \b
    Examples:
      aisp-local config get model
      aisp-local config get chat.effort
    """
    main = _main(context)
    command, name = _split(main, key)
    found = settings.read(main, _given(context))
    rows = [row for row in settings.effective(main, found) if row.key == name and command in (None, row.command)]
    if not rows:
        settings.check(main, command, name, None, "config get")
    value = rows[0].value
    if any(row.value != value for row in rows):
        where = ", ".join(f"{row.command}.{name}" for row in rows)
        raise InputError(f"{name} differs between commands; ask for one of {where}")
    if value is None or value == ():
        raise InputError(f"{key} is not set")
    print_answer(value if isinstance(value, str) else _shown(value))


@config.command("set")
@click.argument("key", shell_complete=_complete_key)
@click.argument("value")
@click.pass_context
def set_(context: click.Context, key: str, value: str) -> None:
    """Write KEY = VALUE into the file; comments in it stay. A list is written as '["a", "b"]'.

    \b
    Examples:
      aisp-local config set model bartowski/Llama-3.2-1B-Instruct-GGUF
      aisp-local config set threads 4
      aisp-local config set serve.port 8081
    """
    import tomlkit

    main, path = _main(context), _path(context)
    command, name = _split(main, key)
    parsed = settings.from_text(main, command, name, value)
    settings.check(main, command, name, parsed, "config set")
    if path.exists():
        settings.read(main, path)  # what is wrong already is not written again
    document = _document(path)
    if command is None:
        document[name] = parsed
    else:
        document.setdefault(command, tomlkit.table())[name] = parsed
    text = tomlkit.dumps(document)
    settings.parse(main, path, text)
    _store(path, text)


@config.command()
@click.argument("key", shell_complete=_complete_key)
@click.pass_context
def unset(context: click.Context, key: str) -> None:
    """Take KEY out of the file.

    \b
    Examples:
      aisp-local config unset model
      aisp-local config unset chat.effort
    """
    import tomlkit

    main, path = _main(context), _path(context)
    command, name = _split(main, key)
    document = _document(path)  # whatever else is in it: this is how it can be repaired
    table = document if command is None else document.get(command, {})
    if name not in table:
        raise InputError(f"{key} is not set in {path}")
    del table[name]
    if command is not None and not table:
        del document[command]
    _store(path, tomlkit.dumps(document))


@config.command("path")
@click.pass_context
def path_(context: click.Context) -> None:
    """Print the path of the file, whether it exists or not.

    \b
    Examples:
      cat "$(aisp-local config path)"
    """
    print_answer(str(_path(context)))


@config.command()
@click.pass_context
def edit(context: click.Context) -> None:
    """Open the file in your editor (VISUAL or EDITOR); what no command could use is not written.

    \b
    Examples:
      EDITOR=nano aisp-local config edit
    """
    main, path = _main(context), _path(context)
    before = read_text(path, "check --config or AISP_CONFIG") if path.exists() else _BEGIN
    text = before
    while True:
        try:
            edited = click.edit(text, extension=".toml", require_save=False)
        except click.ClickException as error:
            raise InputError(f"the editor cannot be used ({error.message}); set EDITOR to another") from error
        if edited is None or edited == before:
            click.echo("nothing was changed", err=True)
            return
        text = edited
        try:
            settings.parse(main, path, text)
            break
        except InputError as error:
            click.echo(f"aisp-local: error: {error}", err=True)
            if not click.confirm("Edit again?", default=True, err=True):
                raise InputError("the changes were dropped, the file is as it was") from error
    _store(path, text)


def _main(context: click.Context) -> click.Group:
    root = context.find_root().command
    assert isinstance(root, click.Group)
    return root


def _given(context: click.Context) -> Path | None:
    given: Path | None = context.find_root().params.get("config")
    return given


def _path(context: click.Context) -> Path:
    return _given(context) or settings.default_path()


def _split(main: click.Group, key: str) -> tuple[str | None, str]:
    """Command and name; the command is None for a key of all commands."""
    command, dot, name = key.rpartition(".")
    if not dot:
        return None, key.replace("-", "_")
    known = settings.commands(main)
    if command not in known:
        raise InputError(f"there is no command {command!r} to set options of; such commands are {', '.join(known)}")
    return command, name.replace("-", "_")


def _document(path: Path) -> TOMLDocument:
    """What the file holds, with its comments. Raises InputError for what is no TOML."""
    import tomlkit
    from tomlkit.exceptions import ParseError

    if not path.exists():
        return tomlkit.document()
    try:
        return tomlkit.parse(read_text(path, "check --config or AISP_CONFIG"))
    except ParseError as error:
        raise InputError(f"{path} is not valid TOML ({error}); aisp-local config edit opens the file") from error


def _store(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made ({error.strerror}); choose another with --config") from error
    check_output(path)
    write_output(path, text)


def _shown(value: Any) -> str:
    """As TOML writes it."""
    return json.dumps(value, ensure_ascii=False)

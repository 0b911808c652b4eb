"""A persona: a TOML file with a system prompt, a reward and settings, format 1, see docs/chat.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aisp_local import folders, shipped
from aisp_local.cli.chat.settings import KEYS, options_in
from aisp_local.errors import InputError
from aisp_local.rewards.section import Section, nearest, read_toml

_DOCS = "docs/chat.md"


def personas() -> dict[str, Path]:
    """The shipped ones and those in the user's folder, which come first, by their names."""
    own = {path.stem: path for path in sorted((folders.data() / "personas").glob("*.toml"))}
    return shipped.personas() | own


def load_persona(source: str) -> dict[str, Any]:
    """The command's options that the persona of a name or a file has. Raises InputError."""
    path = Path(source).expanduser()
    if not path.suffix and len(path.parts) == 1:
        known = personas()
        if source not in known:
            raise InputError(
                f"there is no persona {source!r}; {nearest(source, sorted(known), 'they')}, or give a file"
            )
        path = known[source]
    missing = f"persona {path} does not exist; check the path"
    read = read_toml(path, thing="a persona", missing=missing, docs=_DOCS, error=InputError)
    top = Section(read, str(path), _DOCS)
    if top.get("format", int) != 1:
        raise InputError(f"{path}: format {top.data['format']!r} is not known; this version reads format 1")
    top.only("format", "description", *KEYS)
    top.get("description", str, "")
    return options_in(top, path.parent)

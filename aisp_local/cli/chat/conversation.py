"""A conversation, and the file in which it is kept when the user asks for that; docs/chat.md has the format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from aisp_local import folders
from aisp_local.cli.chat.settings import options_in
from aisp_local.errors import InputError
from aisp_local.files import check_output, read_text, write_output
from aisp_local.finite import finite
from aisp_local.jsonl import messages as checked_messages
from aisp_local.rewards.section import Section, nearest
from aisp_local.types import FloatArray, Message, Result

_FORMAT = 1
_NAMES = {"user": "You", "assistant": "Model", "system": "System"}


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and how that was found: what the file has for it under "aisp".

    ``learnt``: the control u [d] that its search left and the nats of a response under it, which no file has.
    """

    question: str
    answer: str
    about: Mapping[str, Any] = field(default_factory=dict)
    learnt: tuple[FloatArray, float | None] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, question: str, result: Result, settings: Mapping[str, Any]) -> Turn:
        about = {
            "reward": result.reward,
            "judge": result.judge,
            "rollouts": result.rollouts,
            "seconds": round(result.seconds, 2),
            "status": result.status,
            "settings": {**settings, "seed": result.seed},
        }
        learnt = result.control
        kept = (learnt, result.control_nats) if learnt is not None and learnt.any() else None
        return cls(question, result.answer, about, kept)

    @property
    def reward(self) -> float | None:
        """None for a turn of a file that does not say."""
        value = self.about.get("reward")
        return float(value) if isinstance(value, int | float) else None

    @property
    def seed(self) -> int | None:
        """What the answer was searched with."""
        settings = self.about.get("settings")
        value = settings.get("seed") if isinstance(settings, dict) else None
        return value if isinstance(value, int) and value >= 0 else None


def messages(system: str, turns: Sequence[Turn], question: str | None = None) -> list[Message]:
    """What a model reads: the system prompt, if there is one, the turns, and a question after them."""
    found: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        found.append({"role": "user", "content": turn.question})
        found.append({"role": "assistant", "content": turn.answer})
    if question is not None:
        found.append({"role": "user", "content": question})
    return found


@dataclass
class Conversation:
    """``settings``: options of the command that it goes on with, by their names there. ``path``: its file."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def save(self, path: Path) -> None:
        """Write it whole or not at all: a .json file for ``load``, else text for people. Raises InputError."""
        own = path.parent == folder()
        if own:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{path.parent} cannot be made ({error.strerror}); give a file") from error
            if path.exists() and (self.path is None or path.resolve() != self.path.resolve()):
                raise InputError(f"there is another conversation {path.stem!r}; give another name, or delete {path}")
        check_output(path)
        if path.suffix != ".json":
            spoken = messages(self.system, self.turns)
            turns = [f"{_NAMES[message['role']]}: {message['content'].strip()}" for message in spoken]
            write_output(path, "\n\n".join(turns) + "\n")
            return
        entries: list[dict[str, Any]] = [dict(message) for message in messages(self.system, self.turns)]
        answers = [entry for entry in entries if entry["role"] == "assistant"]
        for entry, turn in zip(answers, self.turns, strict=True):
            entry["aisp"] = dict(turn.about)
        content = {"format": _FORMAT, "settings": dict(self.settings), "messages": entries}
        write_output(path, json.dumps(finite(content), ensure_ascii=False, indent=1) + "\n")
        self.path = path

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """What ``save`` wrote, or any JSON object with "messages" that take turns. Raises InputError."""
        try:
            text = read_text(path)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise InputError(_missing(path)) from error
            raise
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is no conversation: it is not valid JSON ({error}); /save NAME writes one"
            ) from error
        if not isinstance(content, dict) or content.get("format", _FORMAT) != _FORMAT:
            raise InputError(f"{path} holds no conversation of format {_FORMAT}; /save NAME writes one")
        try:
            found = checked_messages(content.get("messages"), "messages")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        settings = options_in(Section(content.get("settings", {}), f"{path}: 'settings'", "docs/chat.md"), path.parent)
        system = found.pop(0)["content"] if found and found[0]["role"] == "system" else ""
        if [m["role"] for m in found] != ["user", "assistant"] * (len(found) // 2):
            raise InputError(f"{path}: after a system prompt, messages of user and assistant must take turns")
        about = [m.get("aisp") for m in content["messages"] if m["role"] == "assistant"]
        turns = [
            Turn(question["content"], answer["content"], cast(dict[str, Any], extra) if isinstance(extra, dict) else {})
            for question, answer, extra in zip(found[::2], found[1::2], about, strict=True)
        ]
        return cls(system, turns, settings, path if "format" in content else None)  # /save must not replace another's


def folder() -> Path:
    """Where conversations with a bare name lie."""
    return folders.data() / "conversations"


def names() -> list[str]:
    """Of the conversations that were kept by name, the latest first."""
    found = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.stem for path in found]


def path_of(name: str) -> Path:
    """A bare word names a conversation in the user's folder; what has a folder or an ending is a file."""
    path = Path(name).expanduser()
    return path if path.suffix or len(path.parts) != 1 or name.endswith("/") else folder() / f"{name}.json"


def latest() -> Path:
    """The conversation that was kept last. Raises InputError if there is none."""
    kept = names()
    if not kept:
        raise InputError("no conversation was kept yet; /save NAME keeps one")
    return path_of(kept[0])


def _missing(path: Path) -> str:
    if path.parent != folder():
        return f"{path} does not exist; check the path"
    kept = names()
    advice = nearest(path.stem, kept, "those that were kept") if kept else "none was kept yet; /save NAME keeps one"
    return f"there is no conversation {path.stem!r}; {advice}"

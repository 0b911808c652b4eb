"""Typed access to one object of a JSON or TOML file, with errors that name the file, the place and the key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from aisp_local.errors import InputError, RewardError

_MAX_BYTES = 1 << 20


class Section:
    """One object. ``where`` begins every error; ``docs`` is the page that describes the format."""

    def __init__(self, data: object, where: str, docs: str = "docs/rewards.md") -> None:
        if not isinstance(data, dict):
            raise RewardError(f"{where} must be an object")
        self.data, self.where, self.docs = data, where, docs

    def only(self, *keys: str) -> None:
        """Raises RewardError for a key that the format does not have: most likely a misspelt one."""
        for key in self.data:
            if key not in keys:
                raise RewardError(f"{self.where}: the key {key!r} is unknown; {nearest(key, keys, 'its keys')}")

    def get(self, key: str, kind: type | tuple[type, ...], default: object = None) -> Any:
        value = self.data.get(key, default)
        if value is None:
            raise RewardError(f"{self.where} lacks {key!r}; add it (see {self.docs})")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RewardError(f"{self.where}: {key!r} has the wrong type: {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number as a float, which whole numbers of hundreds of digits are not."""
        value = self.get(key, (int, float), default)
        try:
            return float(value)
        except OverflowError as error:
            raise RewardError(f"{self.where}: {key!r} is too large for a number") from error

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.get(key, str, default)
        if value not in choices:
            raise RewardError(f"{self.where}: {key!r} is {value!r}; use one of {', '.join(choices)}")
        return cast(str, value)


def nearest(name: str, known: Sequence[str], all_of_them: str) -> str:
    """Advice for an unknown name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"{all_of_them} are {', '.join(known)}"


def read_toml(
    path: Path, *, thing: str, missing: str, docs: str, error: type[InputError] = RewardError
) -> dict[str, Any]:
    """A TOML file of at most 1 MiB. Raises ``error``, with ``missing`` where there is none."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise error(f"{path} is larger than 1 MiB; it is not {thing}")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(missing) from cause
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}); give a TOML file") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid TOML ({cause}); repair it (see {docs})") from cause

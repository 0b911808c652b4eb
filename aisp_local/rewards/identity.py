"""Which reward it is: where it was loaded from, and a hash of what was found there."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local import shipped
from aisp_local.rewards.base import Reward
from aisp_local.rewards.manifest import MANIFEST


@dataclass(frozen=True)
class Origin:
    """``source``: what ``load_reward`` finds the reward by, an absolute path or a name; None for an object or a
    function. ``fingerprint``: a hash of the files that describe it; a manifest holds hashes of all others."""

    source: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Reward | Callable[..., Any] | None) -> Origin:
        """Of what was given to ``load_reward``, which has found it."""
        if not isinstance(source, (str, os.PathLike)):
            return cls()
        path = Path(source)
        named = len(path.parts) == 1 and not path.exists()
        found = (shipped.recipes().get(path.name) or shipped.reward_by_name(path.name) or path) if named else path
        digest = hashlib.sha256()
        for file in _files(found):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return cls(path.name if named else str(path.absolute()), digest.hexdigest())


def _files(path: Path) -> list[Path]:
    """The manifest of a folder; a recipe, and what each of its parts names by path."""
    if path.is_dir():
        return [path / MANIFEST]
    files = [path]
    with suppress(ValueError, OSError):
        for part in tomllib.loads(path.read_text(encoding="utf-8")).get("part", []):
            for key in ("reward", "folder", "file"):
                if isinstance(part.get(key), str):
                    named = path.parent / part[key]
                    found = named if named.exists() else shipped.reward_by_name(part[key]) or named
                    files.append(found / MANIFEST if found.is_dir() else found)
    return [file for file in files if file.is_file()]

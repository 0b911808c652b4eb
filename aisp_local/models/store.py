"""The folder of pulled models: OWNER/NAME/FILE.gguf, and beside each model a record of where it is from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from aisp_local import folders
from aisp_local.errors import InputError
from aisp_local.files import write_output
from aisp_local.models.names import tag_of

PART = ".part"
_RECORD = ".pulled.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Pulled:
    """A model that is here whole. ``files``: its names in the repository, the first one first, with their hashes
    ("sha256:..." or, of files that a repository holds in git itself, "git:...")."""

    repository: str
    revision: str  # the commit
    files: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.repository}:{tag_of(self.first)}"

    @property
    def first(self) -> str:
        return next(iter(self.files))

    def paths(self) -> list[Path]:
        return [file_path(self.repository, name) for name in self.files]

    @property
    def record(self) -> Path:
        return _record(file_path(self.repository, self.first))


def folder() -> Path:
    """Where pulled models lie: AISP_MODELS, by default ~/.local/share/aisp-local/models."""
    own = os.environ.get("AISP_MODELS")
    return Path(own) if own else folders.data() / "models"


def file_path(repository: str, name: str) -> Path:
    """Where a file of a repository is kept. Raises InputError for a name that leads elsewhere."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or Path(name).is_absolute():
        raise InputError(f"{repository} has a file of the name {name!r}, which leads out of its folder; do not use it")
    return folder().joinpath(*repository.split("/"), *pure.parts)


def save(pulled: Pulled) -> None:
    write_output(pulled.record, json.dumps({"format": 1, **asdict(pulled)}, indent=2) + "\n")


def load(first: Path) -> Pulled | None:
    """The record of the model whose first file this is; None without a whole one."""
    path = _record(first)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        found = Pulled(str(data["repository"]), str(data["revision"]), files)
        return found if files and all(path.is_file() for path in found.paths()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        return None


def all_pulled() -> list[Pulled]:
    """What was pulled and is here whole, by name."""
    found = []
    with suppress(OSError):
        for path in folder().glob(f"*/*/**/.*{_RECORD}"):
            first = path.with_name(path.name[1 : -len(_RECORD)])
            pulled = load(first)
            if pulled is not None and pulled.record == path:
                found.append(pulled)
    return sorted(found, key=lambda pulled: pulled.name)


def unfinished() -> dict[str, list[Path]]:
    """What was begun and not ended, by repository."""
    found: dict[str, list[Path]] = {}
    with suppress(OSError):
        for path in sorted(folder().glob(f"*/*/**/.*{PART}")):
            repository = "/".join(path.relative_to(folder()).parts[:2])
            found.setdefault(repository, []).append(path)
    return found


def remove(paths: Sequence[Path]) -> None:
    """Delete files, and the folders that they leave empty. Raises InputError."""
    try:
        for path in paths:
            path.unlink()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be deleted ({error.strerror}); check its permissions") from error
    top = folder().resolve()
    for path in paths:
        for parent in path.resolve().parents:
            if parent == top or not parent.is_relative_to(top) or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _record(first: Path) -> Path:
    return first.with_name(f".{first.name}{_RECORD}")

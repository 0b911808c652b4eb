"""The folder of a training: its checkpoint, its best weights, and the network as transformers writes it.

A file beside them marks the folder and lists what was written; nothing else in it is ever deleted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from aisp_local.errors import InputError
from aisp_local.files import write_output

MARKER = "aisp-training.json"
CHECKPOINT = "checkpoint.pt"
# By the loop, in a folder that was empty when it was marked.
_OF_THE_LOOP = re.compile(r"(checkpoint|best-\d+)\.(pt|tmp)")


def best_of(step: int | str) -> str:
    """The file of the weights of an evaluation; of "*", the pattern of them all."""
    return f"best-{step}.pt"


class WorkFolder:
    """``work``, or by default ``out`` with ".training" behind its name."""

    def __init__(self, out: str | os.PathLike[str], work: str | os.PathLike[str] | None) -> None:
        target = Path(out).resolve()
        self.path = Path(work) if work is not None else target.with_name(target.name + ".training")
        self.model = self.path / "model"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a training can go on from here."""
        return self._marked() is not None and (self.path / CHECKPOINT).is_file()

    def check(self, resume: bool, restart: bool) -> None:
        """Raises InputError for a folder that is not a training's, or whose checkpoint would be lost unasked."""
        if resume and restart:
            raise InputError("--resume goes on from a checkpoint and --restart deletes it; give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder; choose another with --work")
        if self._marked() is None and self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(
                f"{self.path} holds files, and none that marks it as the folder of a training, so it is left alone; "
                "choose another with --work"
            )
        if resume and not self.has_checkpoint:
            raise InputError(f"{self.path} holds no checkpoint to resume; begin without --resume")
        if self.has_checkpoint and not resume and not restart:
            raise InputError(
                f"{self.path} holds the checkpoint of a training that did not end; go on from it with --resume, or "
                "delete it and begin anew with --restart"
            )

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """The folder for one run. What was written is gone after it, unless it failed and left a checkpoint."""
        if not resume:
            self.clear()
        try:
            if not resume:
                made = not self.path.exists()
                with self._writing():
                    self.path.mkdir(parents=True, exist_ok=True)
                self._mark({"made": made, "files": []})
            yield
        except BaseException:
            if not self.has_checkpoint:
                self.clear()
            raise
        self.clear()

    def save(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill the folder of the network, and remember which files are new there."""
        before = self._files()
        try:
            with self._writing():
                write(self.model)
        finally:
            known = self._marked() or {"made": False, "files": []}
            self._mark(known | {"files": sorted({*known["files"], *(self._files() - before)})})

    def clear(self) -> None:
        """Delete what a training wrote, and the folder if a training made it and nothing else lies there."""
        known = self._marked()
        if known is None:
            return
        files = [path for path in self.path.iterdir() if _OF_THE_LOOP.fullmatch(path.name)]
        files += [self.path / name for name in (*known["files"], MARKER)]
        for file in files:
            with suppress(OSError):
                file.unlink()
        inner = {file.parent for file in files} - {self.path}
        for folder in [*sorted(inner, reverse=True), *([self.path] if known["made"] else [])]:
            with suppress(OSError):  # not empty
                folder.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror or error}); choose another with --work"
            ) from error

    def _files(self) -> set[str]:
        return {path.relative_to(self.path).as_posix() for path in self.model.rglob("*") if path.is_file()}

    def _mark(self, known: dict[str, Any]) -> None:
        write_output(self.path / MARKER, json.dumps(known, indent=1) + "\n")

    def _marked(self) -> dict[str, Any] | None:
        """What the marker says; None where there is none of ours, or one that leads out of the folder."""
        try:
            known = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
            names = [PurePosixPath(name) for name in known["files"]]
            made = bool(known["made"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if any(name.is_absolute() or name.parts[:1] != (self.model.name,) or ".." in name.parts for name in names):
            return None
        return {"made": made, "files": list(map(str, names))}

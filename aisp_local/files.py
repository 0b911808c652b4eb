"""Files that are read, or written whole or not at all, with errors that say what is wrong with them."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from aisp_local.errors import InputError


def read_bytes(path: Path, advice: str = "check the path") -> bytes:
    """What a file holds. Raises InputError where it cannot be read, with what to do about it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error


def read_text(path: Path, advice: str = "check the path") -> str:
    """The text of a file, without a BOM. Raises InputError for what is no UTF-8, and as ``read_bytes`` does."""
    try:
        return read_bytes(path, advice).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid UTF-8 (byte {error.start}); convert it to UTF-8") from error


def write_output(path: Path, content: str | bytes) -> None:
    """Write whole or not at all, "?" for a lone surrogate; a device or a pipe is written to, never replaced."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    target = path.resolve()
    temporary = _beside(target, "tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave the new name with nothing in it
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written before the search is paid for."""
    folder = path.parent
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give a file to write to")
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: the folder {folder} does not exist; create it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise InputError(f"{path} cannot be written: no permission; choose another path")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error


def check_apart(inputs: Sequence[Path | None], outputs: Sequence[Path | None]) -> None:
    """Refuse an output that would replace an input, or another output; None is neither."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        # A device or a pipe takes what comes, one after the other.
        if path is None or (path.exists() and not path.is_file()):
            continue
        if path.resolve() in taken:
            raise InputError(f"{path} would be written over what is read or written there as well; give another path")
        taken.add(path.resolve())


def check_output_folder(path: Path, marker: str, force: bool) -> None:
    """Refuse an output folder that cannot be made, before the work is paid for.

    An existing one is replaced only with ``force``, and only if it holds the file ``marker`` or nothing at all.
    """
    parent = path.resolve().parent
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"{path} is not a folder; give a folder that does not exist yet")
        if path.exists() and not force:
            raise InputError(f"{path} exists; give another folder, or --force to replace it")
        if path.exists() and any(path.iterdir()) and not (path / marker).is_file():
            raise InputError(f"{path} holds no {marker}, so it is not replaced; give another folder")
        if not parent.is_dir():
            raise InputError(f"{path} cannot be written: the folder {parent} does not exist; create it")
        if not os.access(parent, os.W_OK):
            raise InputError(f"{path} cannot be written: no permission; choose another path")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error


@contextlib.contextmanager
def output_folder(path: Path, marker: str, force: bool) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its place at the end of the block; an error leaves nothing."""
    check_output_folder(path, marker, force)
    target = path.resolve()
    made, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        made.mkdir()
        yield made
        check_output_folder(path, marker, force)
        if target.exists():
            os.replace(target, old)
            try:
                os.replace(made, target)
            except BaseException:
                os.replace(old, target)
                raise
        else:
            os.replace(made, target)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); choose another path") from error
    finally:
        for rest in (made, old):
            shutil.rmtree(rest, ignore_errors=True)


def _beside(target: Path, ending: str) -> Path:
    """A name of this thread's own in the same folder."""
    return target.with_name(f".aisp-local-{os.getpid()}-{threading.get_ident()}.{ending}")


def hold(file: IO[bytes], otherwise: str) -> None:
    """Keep other processes that call this from an open file, until it is closed or the process ends, however it ends.

    Nothing where the system has no such locks. Raises InputError that says ``otherwise``.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(otherwise) from error
    except OSError:  # a file system without locks
        return

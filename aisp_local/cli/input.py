"""Standard input, whatever its state."""

from __future__ import annotations

import sys

from aisp_local.errors import InputError


def standard_input(instead: str) -> str:
    """All of it, without a BOM. Raises InputError where it is not UTF-8, or closed: then ``instead`` is advised."""
    if sys.stdin is None:
        raise InputError(f"standard input is closed; {instead}")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid UTF-8 (byte {error.start}); convert it to UTF-8") from error

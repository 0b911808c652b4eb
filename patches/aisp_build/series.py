"""The patch series, applied in order and strictly."""

from __future__ import annotations

import logging
from pathlib import Path

from aisp_build.errors import BuildError


def patches(folder: Path) -> list[Path]:
    """The series in its order."""
    found = sorted(folder.glob("[0-9]*.patch"))
    if not found:
        raise BuildError(f"{folder} holds no patches; the checkout is incomplete")
    return found


def apply(folder: Path, tree: Path) -> None:
    """Apply every patch of ``folder`` to ``tree``. Raises BuildError naming the patch that does not."""
    import patch_ng

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().strip())

    logger = logging.getLogger("patch_ng")
    handler = Keep(logging.WARNING)
    logger.addHandler(handler)
    try:
        for path in patches(folder):
            parsed = patch_ng.fromfile(str(path))
            if not parsed or not parsed.apply(strip=0, root=str(tree), fuzz=False):
                reason = next((m for m in reversed(messages) if m), "unreadable patch")
                raise BuildError(
                    f"{path.name} does not apply ({reason}); the series belongs to another release: "
                    "restore patches/ from the repository"
                )
    finally:
        logger.removeHandler(handler)

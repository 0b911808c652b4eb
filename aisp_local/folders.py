"""The user's own folder for what aisp-local keeps."""

from __future__ import annotations

import os
from pathlib import Path


def data() -> Path:
    """Where what the user asked to keep lies: $XDG_DATA_HOME/aisp-local. Nothing is made by asking for it."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "aisp-local"

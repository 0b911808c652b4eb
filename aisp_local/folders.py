"""The user's own folder for what aisp-local keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data() -> Path:
    """Where conversations lie that the user asked to keep, and personas. Nothing is made by asking for it."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "aisp-local"

"""What a user of the build reads."""

from __future__ import annotations


class BuildError(Exception):
    """The wheel cannot be built; the message says why and what to do."""

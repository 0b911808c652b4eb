"""`aisp-local generate --input`: a file of prompts in, a file of answers out (docs/batch.md)."""

from __future__ import annotations

from aisp_local.cli.batch.run import DEFAULT_AT_ONCE, Batch, content

__all__ = ["DEFAULT_AT_ONCE", "Batch", "content"]

"""`aisp-local chat`: a conversation in the terminal."""

from __future__ import annotations

from aisp_local.cli.chat.command import chat

__all__ = ["chat"]

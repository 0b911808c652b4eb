"""An OpenAI-compatible server of aligned answers: requests in, one engine, answers out."""

from aisp_local.server.app import Settings, make_app
from aisp_local.server.listen import Server

__all__ = ["Server", "Settings", "make_app"]

"""An OpenAI-compatible server of aligned answers: requests in, one engine, answers out."""

from aisp_local.server.app import Settings, make_app

__all__ = ["Settings", "make_app"]

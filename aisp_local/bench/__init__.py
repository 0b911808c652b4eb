"""Measurements of this machine that users run themselves: ``aisp-local bench``."""

"""Silence for libraries that speak of what a user of ours can do nothing about."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, log lines and progress bars."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with _no_bars():
                yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    try:
        from transformers.utils import logging as bars
    except ImportError:
        yield
        return
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()

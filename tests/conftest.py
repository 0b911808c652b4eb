"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from aisp_local.engine import llama


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread decodes, here and in commands, where a test asks for no number.

    The threads of llama.cpp spin while they wait for one another. The shipped models gain little by a second one, and
    beside anything else that runs they lose ten times as much.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(llama, "available_cores", lambda: 1)
        patched.setenv("AISP_THREADS", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Ctrl-C interrupts, here and in commands, also where a shell that runs the tests in its background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

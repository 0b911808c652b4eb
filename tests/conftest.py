"""What all tests share: one thread a product, interrupts, and the same generated examples at every run.

Threads of llama.cpp and of numpy's OpenBLAS spin while they wait for one another. What tests multiply is so small that
a second one gains little, and beside anything else that runs they take ten times as long.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is loaded, here and in commands

import gc  # noqa: E402
import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from aisp_local.engine import llama  # noqa: E402
from aisp_local.rewards import runtime  # noqa: E402

# A run tells of the change that it tests, not of its luck, nor of what else the machine does;
# --hypothesis-profile=varied (make test-all) tries other examples.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("varied", deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread decodes, here and in commands, and one scores here, where a test asks for no number."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (llama, runtime):
            patched.setattr(module, "available_cores", lambda: 1)
        patched.setenv("AISP_THREADS", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def no_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """None of the settings of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patched.delenv("AISP_CONFIG", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Ctrl-C interrupts, here and in commands, also where a shell that runs the tests in its background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_gc_callbacks() -> Iterator[None]:
    """For Ctrl-C at any time: what is raised in a callback of the collector, such as Hypothesis's, is lost."""
    kept = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = kept

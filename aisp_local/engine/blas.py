"""numpy's products between two decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

from threadpoolctl import ThreadpoolController

_held = Lock()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")  # looks through all libraries that are loaded


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS multiplies in the calling thread. Threads of its own would keep the cores in a busy loop for tens of
    milliseconds after each product, beside those that decode the next token.

    The limit is the whole process's, so that one thread has it at a time; for another it is as it happens to be, as
    where somebody else holds threadpoolctl's own limits.
    """
    if not _held.acquire(blocking=False):  # what it would put back is this limit
        yield
        return
    try:
        with _pools().limit(limits=1):
            yield
    finally:
        _held.release()

"""numpy's products between two decode steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all libraries that are loaded


def one_thread() -> AbstractContextManager[object]:
    """BLAS multiplies in the calling thread. Threads of its own would keep the cores in a busy loop for tens of
    milliseconds after each product, beside those that decode the next token. Of the whole process: of two threads that
    are within at once, the last to leave says how many there are afterwards."""
    return _pools().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]

"""Which prompts the KV cache holds: rows start from them, and prompts from what they share with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.native import Context

Tokens = npt.NDArray[np.int32]


class PromptCache:
    """The sequences 0 to ``slots - 1`` of a context, each holding the beginning of a prompt that no row writes to.

    They outlive runs, so that the next iteration, the next turn of a conversation, or another prompt after the same
    system text pays only for what is new. ``n_swa``: the model's attention window, 0 without one.

    A call that is broken off leaves at least the ``tokens`` in the context; ``fit`` removes what is beyond them.
    ``cells``: how many the prompts may take together, those in use and those that are kept.
    """

    def __init__(self, context: Context, slots: int, n_swa: int, cells: int) -> None:
        self._context, self._n_swa, self.cells = context, n_swa, cells
        self.tokens: list[Tokens] = [np.zeros(0, np.int32) for _ in range(slots)]
        self.parts: list[tuple[int, ...]] = [()] * slots  # how many tokens each held whenever some were decoded
        self._users = [0] * slots
        self._used = [0] * slots  # when, counted in calls
        self._calls = 0

    def fit(self, prompts: Sequence[Tokens], cells: int) -> None:
        """Have so many ``cells``; forget what does not fit beside the prompts, as many of them in use as slots."""
        self.cells = cells
        self._users = [0] * len(self.tokens)  # a run that failed gave nothing back
        for slot, held in enumerate(self.tokens):
            if not self._context.remove(slot, len(held)):
                self._forget(slot)
        longest = max(map(len, prompts))
        common = [max(_common(held, prompt) for prompt in prompts) for held in self.tokens]
        best = sorted(range(len(common)), key=lambda slot: (-common[slot], -self._used[slot]))
        left = cells - min(len(best), len(prompts)) * longest
        for rank, slot in enumerate(best):
            if rank < len(prompts):
                if len(self.tokens[slot]) > longest:
                    self._start(slot, slot, common[slot])
            elif len(self.tokens[slot]) > left:
                self._forget(slot)
            else:
                left -= len(self.tokens[slot])

    def clear(self) -> None:
        """Forget all."""
        for slot in range(len(self.tokens)):
            self._forget(slot)

    def take(self, wanted: Tokens, decode: Callable[[int, Tokens, int], None]) -> int | None:
        """A sequence that holds exactly ``wanted``, until ``give_back``; None while others use all, or the cells.

        ``decode(sequence, tokens, position)`` decodes what is missing.
        """
        self._calls += 1
        for slot, held in enumerate(self.tokens):
            if self._users[slot] and np.array_equal(held, wanted):
                self._users[slot] += 1
                return slot
        idle = [slot for slot, users in enumerate(self._users) if users == 0]
        used = sum(len(held) for held, users in zip(self.tokens, self._users, strict=True) if users)
        if not idle or (used and used + len(wanted) > self.cells):
            return None
        common = [_common(held, wanted) for held in self.tokens]
        source = max(range(len(common)), key=lambda slot: (common[slot], self._users[slot] == 0, -slot))
        best = max(idle, key=lambda slot: (common[slot], -self._used[slot]))
        oldest = min(idle, key=lambda slot: (len(self.tokens[slot]) > 0, self._used[slot]))
        # What a prompt does not share stays where there is another place.
        extends = common[best] == common[source] and common[best] == len(self.tokens[best])
        slot = best if extends or best == oldest else oldest
        keep = self._start(slot, source, common[source])
        for other in sorted(idle, key=lambda other: self._used[other]):  # what is kept makes room, the oldest first
            if sum(map(len, self.tokens)) - len(self.tokens[slot]) + len(wanted) > self.cells and other != slot:
                self._forget(other)
        if self._n_swa:  # while it grows, its window loses the beginning
            self.tokens[slot] = wanted[:0]
        decode(slot, wanted[keep:], keep)
        self.tokens[slot] = wanted
        if len(wanted) > keep:
            self.parts[slot] += (len(wanted),)
        self._users[slot] += 1
        self._used[slot] = self._calls
        return slot

    def give_back(self, slot: int) -> None:
        self._users[slot] -= 1

    def _start(self, slot: int, source: int, keep: int) -> int:
        """Bring the slot to the first tokens of the source, ``keep`` of them if the cache can do it; how many."""
        context, beginning = self._context, self.tokens[source][:keep]
        parts = (*(part for part in self.parts[source] if part < keep), keep)
        held = len(self.tokens[source])
        # Of a window's layers only the end is sure to be there: others may have taken the cells before it.
        if keep < held and self._n_swa and context.first_position(source) > max(0, keep - self._n_swa):
            keep = 0
        if slot != source or keep == 0:
            self._forget(slot)
            if keep:
                context.fork(source, slot)
        else:
            self.tokens[slot] = beginning  # before the rest goes
        if keep and not context.remove(slot, keep):  # a recurrent state cannot be rolled back
            self._forget(slot)
            keep = 0
        if keep:
            self.tokens[slot], self.parts[slot] = beginning, parts
        return keep

    def _forget(self, slot: int) -> None:
        self.tokens[slot], self.parts[slot] = self.tokens[slot][:0], ()
        self._context.remove(slot)


def _common(a: Tokens, b: Tokens) -> int:
    """The length of what both begin with."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n

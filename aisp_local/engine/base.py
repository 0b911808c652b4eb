"""The seam between a search and what decodes its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Prompt, Rollouts

Want = Literal["kl", "logprobs", "prelogits"]
"""What a rollout reports only when asked, because it costs: see types.Rollouts."""


class Engine(Protocol):
    """Decodes n responses to one prompt under controls."""

    @property
    def d(self) -> int:
        """Width of the pre-logits."""

    @property
    def n_ctx(self) -> int:
        """The model's context in tokens."""

    def room(self, prompt: Prompt) -> int:
        """How many tokens a response to the prompt may have; less than 1 if the prompt alone is too long."""

    def rollout(
        self,
        prompt: Prompt,
        controls: Controls,
        *,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str] = (),
        want: frozenset[Want] = frozenset(),
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> Rollouts:
        """Decode. ``should_stop()`` is asked before every step; rows cut short so are "interrupted".

        ``on_step(step, rows_active, n_tokens)`` is called after each, counts are of this call.
        """

"""aisp-local: test-time alignment for language models on your own machine (arXiv 2510.26219)."""

from __future__ import annotations

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from aisp_local import lazy

if TYPE_CHECKING:
    from aisp_local.api import Aligner
    from aisp_local.engine import LlamaEngine, Sample
    from aisp_local.errors import (
        AispError,
        BindingError,
        CapacityError,
        DecodeError,
        InputError,
        ModelError,
        RewardError,
        ScoreError,
    )
    from aisp_local.grammar import Grammar
    from aisp_local.llama import AlignedLlama
    from aisp_local.native import Lora
    from aisp_local.steering import Steering
    from aisp_local.trace import Trace
    from aisp_local.types import (
        Baseline,
        Candidate,
        Controls,
        IterationStats,
        Message,
        Progress,
        Prompt,
        Result,
        Rollouts,
        Sampling,
        TokenLogprob,
    )
else:
    __getattr__ = lazy.loaded(
        __name__,
        {
            "api": ("Aligner",),
            "engine": ("LlamaEngine", "Sample"),
            "errors": (
                "AispError",
                "BindingError",
                "CapacityError",
                "DecodeError",
                "InputError",
                "ModelError",
                "RewardError",
                "ScoreError",
            ),
            "grammar": ("Grammar",),
            "llama": ("AlignedLlama",),
            "native": ("Lora",),
            "steering": ("Steering",),
            "trace": ("Trace",),
            "types": (
                "Baseline",
                "Candidate",
                "Controls",
                "IterationStats",
                "Message",
                "Progress",
                "Prompt",
                "Result",
                "Rollouts",
                "Sampling",
                "TokenLogprob",
            ),
        },
    )

__all__ = [
    "AispError",
    "AlignedLlama",
    "Aligner",
    "Baseline",
    "BindingError",
    "Candidate",
    "CapacityError",
    "Controls",
    "DecodeError",
    "Grammar",
    "InputError",
    "IterationStats",
    "LlamaEngine",
    "Lora",
    "Message",
    "ModelError",
    "Progress",
    "Prompt",
    "Result",
    "RewardError",
    "Rollouts",
    "Sample",
    "Sampling",
    "ScoreError",
    "Steering",
    "TokenLogprob",
    "Trace",
    "__version__",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

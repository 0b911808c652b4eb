"""Tokens drawn from rows of logits by llama.cpp: builds with the call that the series in ``patches/`` adds for it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import DecodeError
from aisp_local.native.binding import SAMPLE_SYMBOL, binding, last_log
from aisp_local.types import FloatArray, Sampling

_FLOATS, _DOUBLES, _TOKENS = (kind * 0 for kind in (ctypes.c_float, ctypes.c_double, ctypes.c_int32))


def can_sample_rows() -> bool:
    """Whether this build has ``sample_rows``."""
    return hasattr(binding(), SAMPLE_SYMBOL)


def sample_rows(
    logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64], threads: int = 1
) -> npt.NDArray[np.int32]:
    """Tokens [k] from logits [k, V] and uniforms [k] in [0, 1), as engine.sampling.pick has it.

    Not greedily and without top-k. More ``threads`` than one gain a fiftieth of a step where cores are idle, and where
    they are not they wait for each other, for milliseconds. Raises DecodeError where llama.cpp refuses.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    uniforms = np.ascontiguousarray(uniforms, np.float64)
    k, size = logits.shape
    tokens = np.empty(k, np.int32)
    code = binding().llama_sample_rows(
        _at(_FLOATS, logits),
        size,
        k,
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        _at(_DOUBLES, uniforms),
        threads,
        _at(_TOKENS, tokens),
    )
    if code:
        raise DecodeError(f"llama.cpp could not sample: {last_log()}")
    return tokens


def _at(kind: Any, array: npt.NDArray[Any]) -> Any:
    """The array's values as an argument, in half the time that ``data_as`` takes; they must outlive the call."""
    return kind.from_address(array.ctypes.data)

"""Picks one token a row from logits: vectorised, one uniform number a row and step.

A token is the inverse of the law's cumulative distribution at a uniform number that the caller draws,
so that what a row samples depends on its own numbers only, never on its batch-mates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray, Sampling

_FIRST_CANDIDATES = 256


def pick(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Tokens [k] from logits [k, V] and uniforms [k] in [0, 1)."""
    if sampling.greedy:
        return np.asarray(logits.argmax(axis=1), np.int32)
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return _invert(_tempered(logits, sampling.temperature), uniforms).astype(np.int32)
    order, keep = _candidates(logits, sampling)
    kept = np.take_along_axis(logits, order, axis=1)
    law = np.where(keep, _tempered(kept, sampling.temperature), 0.0)
    choice = _invert(law, uniforms)
    return np.take_along_axis(order, choice[:, None], axis=1)[:, 0].astype(np.int32)


def log_law(logits: FloatArray, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Log-probabilities [k, V] of the law that ``pick`` samples from; -inf where it is cut.

    For greedy decoding: the law at temperature 1, since the sampled one is a point.
    """
    x = logits.astype(np.float64)
    if not sampling.greedy:
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p:
            order, keep = _candidates(logits, sampling)
            mask = np.zeros(x.shape, np.bool_)
            np.put_along_axis(mask, order, keep, axis=1)
            x = np.where(mask, x, -np.inf)
        x /= sampling.temperature
    return log_softmax(x)


def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-softmax over the last axis of finite or -inf values."""
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _tempered(logits: FloatArray, temperature: float) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    return np.asarray(np.exp((x - x.max(axis=1, keepdims=True)) / temperature))


def _invert(weights: npt.NDArray[np.float64], uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    cumulative = weights.cumsum(axis=1)
    # Strictly greater: a token of weight zero is never drawn.
    return np.asarray((cumulative > (uniforms * cumulative[:, -1])[:, None]).argmax(axis=1))


def _candidates(logits: FloatArray, sampling: Sampling) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Likeliest tokens in falling order [k, m] and which of them stay, after top-k, top-p and min-p."""
    size = logits.shape[1]
    m = min(size, sampling.top_k or _FIRST_CANDIDATES)
    top = logits.max(axis=1, keepdims=True).astype(np.float64)
    total = None
    if not sampling.top_k:
        total = np.exp(logits - top).sum(axis=1, keepdims=True)
    while True:
        order = (
            np.argpartition(logits, size - m, axis=1)[:, size - m :]
            if m < size
            else np.broadcast_to(np.arange(size), logits.shape)
        )
        order = np.sort(order, axis=1)  # ties fall to the smaller token id
        values = np.take_along_axis(logits, order, axis=1)
        rank = np.argsort(-values, axis=1, kind="stable")
        order = np.take_along_axis(order, rank, axis=1)
        values = np.take_along_axis(values, rank, axis=1)
        weights = np.exp(values - top)
        law = weights / (weights.sum(axis=1, keepdims=True) if total is None else total)
        before = law.cumsum(axis=1) - law
        keep = (before < sampling.top_p) & (law >= sampling.min_p * law[:, :1])
        keep[:, 0] = True
        # Without top-k the last candidate must be cut in every row, or the list was too short.
        if m == size or sampling.top_k or not keep[:, -1].any():
            return order, keep
        m = min(size, 4 * m)

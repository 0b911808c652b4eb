"""Picks one token a row from logits: vectorised, one uniform number a row and step.

A token is the inverse of the law's cumulative distribution at a uniform number that the caller draws (top-p without
top-k: of the law before the cut, at that number and others made of it, until a token is kept), so that what a row
samples depends on its own numbers only, never on its batch-mates. Rows are taken in blocks that stay in a core's cache,
by several threads where there are any: neither changes a number.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray, Sampling

_FIRST_CANDIDATES = 256
_BINS, _DEPTH = 4096, 24.0  # of logits below the largest, for the search of top-p's threshold
_TRIES = 8
_BLOCK = 64  # of weights that are summed before any of them is looked at
_CACHED = 2**17  # logits that are worked on at a time


def pick(
    logits: FloatArray,
    sampling: Sampling,
    uniforms: npt.NDArray[np.float64],
    pool: ThreadPoolExecutor | None = None,
) -> npt.NDArray[np.int32]:
    """Tokens [k] from logits [k, V] and uniforms [k] in [0, 1)."""
    if sampling.greedy:
        return np.asarray(logits.argmax(axis=1), np.int32)
    k, size = logits.shape
    rows = max(1, _CACHED // size)
    if k <= rows:
        return _pick(logits, sampling, uniforms)
    parts = [slice(start, start + rows) for start in range(0, k, rows)]
    many = map if pool is None else pool.map
    return np.concatenate(list(many(lambda part: _pick(logits[part], sampling, uniforms[part]), parts)))


def _pick(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return _invert(_tempered(logits, sampling.temperature), uniforms).astype(np.int32)
    if not sampling.top_k:
        return _accept(logits, sampling, uniforms).astype(np.int32)
    order, keep, _ = _candidates(logits, sampling)
    kept = np.take_along_axis(logits, order, axis=1)
    law = np.where(keep, _tempered(kept, sampling.temperature), np.float32(0.0))
    choice = _invert(law, uniforms)
    return np.take_along_axis(order, choice[:, None], axis=1)[:, 0].astype(np.int32)


def log_law(logits: FloatArray, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Log-probabilities [k, V] of the law that ``pick`` samples from; -inf where it is cut.

    For greedy decoding: the law at temperature 1, since the sampled one is a point.
    """
    x = logits.astype(np.float64)
    if not sampling.greedy:
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p:
            order, keep, whole = _candidates(logits, sampling)
            mask = np.zeros(x.shape, np.bool_)
            np.put_along_axis(mask, order, keep, axis=1)
            mask[~whole] = _nucleus(logits[~whole], sampling)
            x = np.where(mask, x, -np.inf)
        x /= sampling.temperature
    return log_softmax(x)


def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-softmax over the last axis of finite or -inf values."""
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _shifted(logits: FloatArray) -> FloatArray:
    """Logits below the row's largest."""
    return np.asarray(logits - logits.max(axis=1, keepdims=True))


def _exp(x: FloatArray, temperature: float) -> FloatArray:
    """exp(x / temperature), in the place of x."""
    # float32: these are the costliest lines of a step, and its rounding is far below a sample's noise.
    if temperature != 1.0:
        x /= np.float32(temperature)
    return np.asarray(np.exp(x, out=x))


def _tempered(logits: FloatArray, temperature: float) -> FloatArray:
    return _exp(_shifted(logits), temperature)


def _accept(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Tokens under top-p and min-p: drawn from the whole law until one is kept, which needs no order of the tokens.

    The numbers after the first are its hashes: one a step is enough.
    """
    tokens = np.zeros(len(logits), np.intp)
    left = np.arange(len(logits))
    shifted = _shifted(logits)
    weights = np.exp(shifted)
    limit = sampling.top_p * np.einsum("kv->k", weights).astype(np.float64)
    law = weights if sampling.temperature == 1.0 else _exp(shifted, sampling.temperature)
    u = uniforms
    for _ in range(_TRIES):
        tokens[left] = drawn = _invert(law, u)
        rows = np.arange(len(left))
        weight = weights[rows, drawn]
        refused = (_before(weights, drawn, weight) >= limit) | (weight < sampling.min_p)
        refused &= weight < 1.0  # the likeliest token always stays
        if not refused.any():
            return tokens
        left, limit, law, weights = left[refused], limit[refused], law[refused], weights[refused]
        u = _hashed(u[refused])
    mask = _nucleus(logits[left], sampling)
    tokens[left] = _invert(np.where(mask, law, np.float32(0.0)), u)
    return tokens


def _before(weights: FloatArray, tokens: npt.NDArray[np.intp], weight: FloatArray) -> npt.NDArray[np.float64]:
    """The weight of all tokens that are likelier than each row's, of equal ones those with a smaller id."""
    weight = weight[:, None]
    likelier = weights > weight
    # einsum is numpy's fastest sum of products that leaves other threads alone.
    mass = np.einsum("kv,kv->k", weights, likelier.astype(np.float32)).astype(np.float64)
    for row in np.flatnonzero(_counts(weights >= weight) > _counts(likelier) + 1):
        mass[row] += float(weight[row, 0]) * np.count_nonzero(weights[row, : tokens[row]] == weight[row])
    return np.asarray(mass, np.float64)


def _counts(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.array([np.count_nonzero(row) for row in mask])


def _hashed(uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Other uniform numbers in [0, 1), one of each: splitmix64 of their bits."""
    x = uniforms.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53)


def _invert(weights: FloatArray, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The first index of each row at which the running sum of its weights exceeds the uniform share of their sum."""
    k, size = weights.shape
    rows = np.arange(k)
    whole = size // _BLOCK * _BLOCK
    sums = np.einsum("kbj->kb", weights[:, :whole].reshape(k, -1, _BLOCK))
    sums = np.concatenate([sums, weights[:, whole:].sum(axis=1, keepdims=True)], axis=1)
    cumulative = sums.cumsum(axis=1, dtype=np.float64)
    block = _inverse(cumulative, uniforms * cumulative[:, -1])
    left = uniforms * cumulative[:, -1] - (cumulative[rows, block] - sums[rows, block])
    index = block[:, None] * _BLOCK + np.arange(_BLOCK)
    inside = np.where(index < size, weights[rows[:, None], np.minimum(index, size - 1)], np.float32(0.0))
    within = inside.cumsum(axis=1, dtype=np.float64)
    # The block's own sum may round below what is left: then its last token that can be drawn.
    return block * _BLOCK + _inverse(within, np.minimum(left, np.nextafter(within[:, -1], 0.0)))


def _inverse(cumulative: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    # Strictly greater: a token of weight zero is never drawn.
    return np.asarray((cumulative > targets[:, None]).argmax(axis=1))


def _candidates(
    logits: FloatArray, sampling: Sampling
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The likeliest tokens in falling order [k, m], which of them stay, and for which rows [k] no others do."""
    size = logits.shape[1]
    m = min(size, sampling.top_k or _FIRST_CANDIDATES)
    top = logits.max(axis=1, keepdims=True)
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
    weights = np.exp((values - top).astype(np.float64))
    total = weights.sum(axis=1, keepdims=True)
    if not sampling.top_k and m < size:
        total = np.exp(logits - top).sum(axis=1, keepdims=True)
    law = weights / total
    before = law.cumsum(axis=1) - law
    keep = (before < sampling.top_p) & (law >= sampling.min_p * law[:, :1])
    keep[:, 0] = True
    # Without top-k the last candidate must be cut, or others after it might stay.
    whole = ~keep[:, -1] if m < size and not sampling.top_k else np.ones(len(logits), np.bool_)
    return order, keep, whole


def _nucleus(logits: FloatArray, sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Which tokens [k, V] top-p and min-p keep, without sorting more than those about the threshold."""
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    bins = np.fmin((top - logits) * np.float32(_BINS / _DEPTH), _BINS - 1).astype(np.int32)
    rows = np.arange(len(logits), dtype=np.int32)[:, None]
    mass = np.bincount((bins + _BINS * rows).ravel(), weights.ravel(), minlength=_BINS * len(logits))
    cumulative = mass.reshape(len(logits), _BINS).cumsum(axis=1)
    limit = sampling.top_p * cumulative[:, -1:]
    last = (cumulative >= limit).argmax(axis=1)
    keep = np.asarray(bins < last[:, None])
    for row, bin_ in enumerate(last):
        members = np.flatnonzero(bins[row] == bin_)
        members = members[np.argsort(-logits[row, members], kind="stable")]
        inside = weights[row, members].astype(np.float64)
        before = cumulative[row, bin_] - mass[row * _BINS + bin_] + inside.cumsum() - inside
        keep[row, members[before < limit[row]]] = True
    return np.asarray(keep & (weights >= sampling.min_p))

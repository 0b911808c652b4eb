"""Picks one token a row from logits: vectorised, one uniform number a row and step.

A token is the inverse of the law's cumulative distribution at a uniform number that the caller draws (top-p without
top-k: of the law before the cut, at that number and others made of it, until a token is kept), so that what a row
samples depends on its own numbers only, never on its batch-mates. Rows are taken in blocks that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from aisp_local.native import can_sample_rows, sample_rows
from aisp_local.types import FloatArray, Sampling

_FIRST_CANDIDATES = 256
_BINS, _DEPTH = 4096, 24.0  # of logits below the largest, for the search of top-p's threshold
_TRIES = 8
_LEAST = 1e-3  # of the likeliest token's probability: what is kept of a law that nothing truncates
_MOST = 256  # tokens of a law that are kept: of one so flat the rest hardly tells tokens apart
_BLOCK = 64  # of weights that are summed before any of them is looked at
_CACHED = 2**17  # logits that are worked on at a time

Pick = Callable[[FloatArray, Sampling, npt.NDArray[np.float64]], npt.NDArray[np.int32]]
"""Tokens [k] from logits [k, V] and uniforms [k] in [0, 1)."""


def picker() -> Pick:
    """``pick``, with llama.cpp's kernel for what it can do if this build has it; tokens differ by rounding only."""
    if not can_sample_rows():
        return pick

    def choose(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        # The largest value of a row takes numpy as long as its bytes take to be read.
        if sampling.greedy or sampling.top_k:
            return pick(logits, sampling, uniforms)
        return sample_rows(logits, sampling, uniforms)

    return choose


def pick(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Tokens [k] from logits [k, V] and uniforms [k] in [0, 1).

    A row without a law (NaN or infinity among its logits, or nothing above -infinity) gets the token of such a logit.
    """
    if sampling.greedy:
        return np.asarray(logits.argmax(axis=1), np.int32)
    k, size = logits.shape
    rows = max(1, _CACHED // size)
    if k <= rows:
        return _pick(logits, sampling, uniforms)
    parts = [slice(start, start + rows) for start in range(0, k, rows)]
    return np.concatenate([_pick(logits[part], sampling, uniforms[part]) for part in parts])


def _pick(logits: FloatArray, sampling: Sampling, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    lawful = np.isfinite(logits.max(axis=1))
    if not lawful.all():
        tokens = np.asarray(logits.argmax(axis=1), np.int32)
        if lawful.any():
            tokens[lawful] = _pick(logits[lawful], sampling, uniforms[lawful])
        return tokens
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
        x = np.where(kept(logits, sampling), x, -np.inf) / sampling.temperature
    return log_softmax(x)


def kept(logits: FloatArray, sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Which tokens [k, V] top-k, top-p and min-p leave."""
    if sampling.greedy or not (sampling.top_k or sampling.top_p < 1.0):
        depth = np.float32(np.log(sampling.min_p) if sampling.min_p else -np.inf)
        return np.asarray((logits >= logits.max(axis=1, keepdims=True) + depth) & (logits > -np.inf))
    order, keep, whole = _candidates(logits, sampling)
    mask = np.zeros(logits.shape, np.bool_)
    np.put_along_axis(mask, order, keep, axis=1)
    mask[~whole] = _nucleus(logits[~whole], sampling)
    return np.asarray(mask & (logits > -np.inf))


def sparse_law(
    logits: FloatArray, sampling: Sampling, shift: FloatArray | None = None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], FloatArray, FloatArray]:
    """Rows, tokens, probabilities and base probabilities [K] of the law that ``pick`` samples from.

    If ``min_p`` alone truncates it; without it, of the tokens that are at least 0.001 times as likely as the likeliest.
    ``shift`` [V]: what a control added to the logits; then the tokens of the base law are there as well.
    """
    k, size = logits.shape
    depth, temperature = np.float32(np.log(sampling.min_p or _LEAST)), np.float32(sampling.temperature or 1.0)
    most = logits.max(axis=1)
    least = most + depth
    kept = _likely(logits, least)
    if shift is not None:
        base = logits - shift
        top = base.max(axis=1)
        kept |= _likely(base, top + depth)
    # Flat indices: numpy finds those of a row far sooner than pairs of them.
    rows, tokens = np.divmod(np.flatnonzero(kept.ravel()), size)
    x = logits[rows, tokens]
    weights = np.exp((x - most[rows]) / temperature)
    if shift is None:
        p = shares(weights, rows, k)
        return rows, tokens, p, p
    others = (base[rows, tokens] - top[rows]) / temperature
    weights[x < least[rows]] = 0.0
    return rows, tokens, shares(weights, rows, k), shares(np.exp(others), rows, k)


def _likely(logits: FloatArray, least: FloatArray) -> npt.NDArray[np.bool_]:
    """Which tokens [k, V] have so much, of each row the ``_MOST`` likeliest at most (ties come along)."""
    kept = np.asarray(logits >= least[:, None])
    for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > _MOST):
        kept[row] = logits[row] >= np.partition(logits[row], -_MOST)[-_MOST]
    return kept


def shares(weights: FloatArray, rows: npt.NDArray[np.intp], k: int) -> FloatArray:
    """Weights divided by their sum over each row."""
    return np.asarray(weights / np.bincount(rows, weights, k)[rows], np.float32)


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
        weight = weights[np.arange(len(left)), drawn]
        refused = weight < sampling.min_p
        if sampling.top_p < 1.0:
            refused |= ~_kept(weights, drawn, weight, limit)
        if not refused.any():
            return tokens
        left, limit, law, weights = left[refused], limit[refused], law[refused], weights[refused]
        u = _hashed(u[refused])
    mask = _nucleus(logits[left], sampling)
    tokens[left] = _invert(np.where(mask, law, np.float32(0.0)), u)
    return tokens


def _kept(
    weights: FloatArray, tokens: npt.NDArray[np.intp], weight: FloatArray, limit: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Whether what weighs before each row's token (likelier ones, equal ones with smaller ids) is below the limit."""
    kept = _mass(weights, weights >= weight[:, None]) - weight < limit  # true of nearly all rows
    for row in np.flatnonzero(~kept):
        likelier = _mass(weights[row : row + 1], weights[row : row + 1] > weight[row])[0]
        equal = np.count_nonzero(weights[row, : tokens[row]] == weight[row])
        kept[row] = likelier + float(weight[row]) * equal < limit[row]
    return np.asarray(kept)


def _mass(weights: FloatArray, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    # einsum is numpy's fastest sum of products that leaves other threads alone.
    return np.asarray(np.einsum("kv,kv->k", weights, mask.astype(np.float32)), np.float64)


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
    if size % _BLOCK:
        weights = np.concatenate([weights, np.zeros((k, -size % _BLOCK), np.float32)], axis=1)
    blocks = weights.reshape(k, -1, _BLOCK)
    sums = np.einsum("kbj->kb", blocks)
    cumulative = sums.cumsum(axis=1, dtype=np.float64)
    targets = uniforms * cumulative[:, -1]
    block = _inverse(cumulative, targets)
    within = blocks[rows, block].cumsum(axis=1, dtype=np.float64)
    left = targets - (cumulative[rows, block] - sums[rows, block])
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

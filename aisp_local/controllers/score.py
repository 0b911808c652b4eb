"""Score-function steps on one held control, inside a trust region of nats.

Responses are sampled at a temperature under ``p_u = softmax(W (z + u) / T)``, one control u for all steps, cut by
min-p to a few tokens. Of each step the engine reports those tokens and their probabilities, so that everything below is
exact and costs nothing per vocabulary entry:

    g  = mean_i A_i sum_t W^T (e_{y_it} - p_it) / T        A: rewards, standardised over the iteration
    u <- u + eta g,  eta: KL(p_{u + eta g} || p_u) = ``step`` nats over a response

and u shrinks where KL(p_u || p_0), the sum over a response's tokens, would be above ``max_kl``. Both are taken over the
iteration's own responses. Source: the score function is REINFORCE's (Williams 1992), with a trust region as in natural
policy gradients (Kakade 2001, arXiv 1502.05477).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.weights import NOISE, length
from aisp_local.types import ControllerInfo, Controls, Head, Rollouts, Sampling

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]


class Score:
    name = "score"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        head: Head | None = None,
        prompt_index: int = 0,
        step: float = 1.0,
        max_kl: float = 25.0,
        temperature: float = 0.7,
        min_p: float = 0.02,
        power: float = 0.0,
        beta: float = 0.0,
        rank: int = 0,
        decay: float = 1.0,
        leave: float = 0.0,
        natural: float = 0.0,
        pool: int = 0,
        clip: float = 0.0,
        lenc: float = 0.0,
        reuse: float = 0.0,
        reuse_from: int = 1,
        elite: int = 4,
        depth: float = 1.0,
        pbase: int = 1,
    ) -> None:
        self._step, self._max_kl = step, max_kl
        self._head, self._sampling = head, Sampling(temperature, min_p=min_p)
        self._u: Array = np.zeros(d)
        self._iteration = 0
        self._m = np.zeros(d)
        self.o = dict(rank=rank, decay=decay, beta=beta, natural=natural, pool=pool, clip=clip, lenc=lenc)
        self._all: list[float] = []
        self.reuse, self.reuse_from, self.elite, self.depth, self.pbase = reuse, reuse_from, elite, depth, pbase
        self._pool = []
        self._seedkey = (seed, prompt_index)
        self._F = None
        self._last = None

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        v = None
        if self._u.any():
            v = np.broadcast_to(self._u.astype(np.float32), (n, 1, len(self._u))).copy()
        pre, self._parent = None, np.full(n, np.nan)
        if self.reuse and self._iteration > self.reuse_from:
            rng = np.random.default_rng([*self._seedkey, self._iteration, 99])
            pre = [np.zeros(0, np.int32)] * n
            pool = sorted(self._pool, key=lambda c: -c[0])[: self.elite]
            self._pool = pool
            for j in range(int(round(self.reuse * n))):
                r, toks = pool[int(rng.integers(len(pool)))]
                cut = int(len(toks) * self.depth * rng.random())
                pre[j] = toks[:cut]
                self._parent[j] = r
        self._pre = pre
        return Controls(
            n=n,
            vectors=v,
            prefixes=pre,
            held=True if v is not None else False,
            sampling=self._sampling,
            want=frozenset({"laws"}),
        )

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        laws, head = rollouts.laws, self._head
        self._all += list(rewards)
        if self.reuse:
            self._pool += [(float(r), t) for r, t in zip(rewards, rollouts.tokens)]
        T = self._sampling.temperature
        n = len(rewards)
        idx = np.union1d(laws.token, np.concatenate(rollouts.tokens))
        W = head.weight[idx] * np.float32(head.gain / T)
        where = np.zeros(head.weight.shape[0], np.int64)
        where[idx] = np.arange(len(idx))
        tok = where[laws.token]
        group = self._groups(laws)
        yu = W @ self._u.astype(np.float32)
        kl = self._kl(laws, group, -yu[tok]) / n  # KL(p_u||p_0)
        spread = rewards.std()
        if not spread > NOISE * np.abs(rewards).max():
            return ControllerInfo(control_norm=length(self._u.astype(np.float32)), kl=kl)
        if self.o["rank"]:
            order = np.argsort(np.argsort(rewards)).astype(float)
            A = (order - order.mean()) / order.std()
        elif self.o["pool"]:
            base = np.array(self._all[-self.o["pool"] * n :])
            A = (rewards - base.mean()) / base.std()
        else:
            A = rewards - rewards.mean()
            kid = np.isfinite(self._parent)
            if kid.any() and self.pbase:
                for grp in (kid, ~kid):
                    if grp.sum() > 1:
                        A[grp] = rewards[grp] - rewards[grp].mean()
            A = A / A.std()
        if self.o["clip"]:
            A = np.clip(A, -self.o["clip"], self.o["clip"])
        lens = np.array([len(t) for t in rollouts.tokens])
        sampled = where[np.concatenate(rollouts.tokens)]
        forced = np.zeros(n, int) if self._pre is None else np.array([len(x) for x in self._pre])
        live = np.concatenate([np.arange(k) >= f for k, f in zip(lens, forced)])
        a_tok = np.repeat(A, lens) * live
        lv = laws.step >= forced[laws.row]
        c = np.bincount(sampled, a_tok, minlength=len(idx)) - np.bincount(
            tok, lv * A[laws.row] * laws.probability, minlength=len(idx)
        )
        g = (c / n) @ W
        if self.o["natural"]:
            # Fisher over tokens: sum_t Cov_p(W)
            P = np.bincount(tok, laws.probability, minlength=len(idx)) / n
            mean = np.zeros((group[-1] + 1, W.shape[1]), np.float32)
            np.add.at(mean, group, laws.probability[:, None] * W[tok])
            F = (W * P[:, None].astype(np.float32)).T @ W - mean.T @ mean / n
            self._F = F if self._F is None else self._F + F
            Fm = self._F / self._iteration
            w, Q = np.linalg.eigh(Fm.astype(np.float64))
            w = np.maximum(w, 0) + 0.1 * w.mean()
            g = ((g @ Q) * w ** -self.o["natural"]) @ Q.T
        self._m = self.o["beta"] * self._m + g
        D = self._m
        yd = (W @ D.astype(np.float32))[tok]
        var = self._var(laws, group, yd) / n
        eta = math.sqrt(2 * self._step * self.o["decay"] ** (self._iteration - 1) / max(var, 1e-12))
        new = self._u + eta * D
        yn = W @ new.astype(np.float32)
        total = self._total(laws, group, yn[tok], yu[tok]) / n
        if total > self._max_kl:
            lo, hi = 0.0, 1.0
            for _ in range(20):
                m = (lo + hi) / 2
                if self._total(laws, group, m * yn[tok], yu[tok]) / n > self._max_kl:
                    hi = m
                else:
                    lo = m
            new = new * lo
        self._u = new
        return ControllerInfo(control_norm=length(self._u.astype(np.float32)), kl=kl)

    def _groups(self, laws):
        key = laws.row.astype(np.int64) * 100000 + laws.step
        change = np.empty(len(key), bool)
        change[0] = True
        change[1:] = key[1:] != key[:-1]
        return np.cumsum(change) - 1

    def _kl(self, laws, group, x):
        """sum over steps of KL(p || q), q ~ p exp(x)"""
        G = group[-1] + 1
        e = np.bincount(group, laws.probability * x, minlength=G)
        m = np.full(G, -np.inf)
        np.maximum.at(m, group, x)
        z = np.bincount(group, laws.probability * np.exp(x - m[group]), minlength=G)
        return float((np.log(z) + m - e).sum())

    def _total(self, laws, group, yn, yu):
        """KL(p_new || p_0) along these steps: p_0 ~ p exp(-yu), p_new ~ p exp(yn - yu)"""
        G = group[-1] + 1

        def norm(x):
            m = np.full(G, -np.inf)
            np.maximum.at(m, group, x)
            w = laws.probability * np.exp(x - m[group])
            z = np.bincount(group, w, minlength=G)
            return w / z[group], np.log(z) + m

        p, ln = norm(yn - yu)
        _, l0 = norm(-yu)
        return float(np.bincount(group, p * yn, minlength=G).sum() - (ln - l0).sum())

    def _var(self, laws, group, y):
        G = group[-1] + 1
        e = np.bincount(group, laws.probability * y, minlength=G)
        e2 = np.bincount(group, laws.probability * y * y, minlength=G)
        return float((e2 - e * e).sum())

"""QAlign: its chains come to the law that the paper promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from aisp_local import controllers
from aisp_local.controllers import Qalign
from aisp_local.engine.sampling import log_softmax
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine
from aisp_local.types import Rollouts

T, VOCABULARY, BETA = 3, 3, 0.7


def reward(text: str) -> float:
    return text.count("a") - 0.5 * text.count("b") + (0.3 if text.endswith("b") else 0.0)


def responses(engine: FakeEngine) -> Iterator[tuple[str, float]]:
    """Every response of at most T tokens and its probability."""

    def go_on(tokens: tuple[int, ...], p: float) -> Iterator[tuple[str, float]]:
        if (tokens and tokens[-1] == 0) or len(tokens) == T:
            yield "".join("_ab"[token] for token in tokens if token), p
            return
        law = np.exp(log_softmax((engine._w @ engine._z[tokens[-1] if tokens else 1]).astype(np.float64)))
        for token, q in enumerate(law):
            yield from go_on((*tokens, token), p * float(q))

    yield from go_on((), 1.0)


def test_chains_come_to_the_tilted_law() -> None:
    """Against every response's probability ``p(y) exp(r(y) / beta)``, by the length-corrected acceptance."""
    engine = FakeEngine(d=4, vocabulary=VOCABULARY, seed=2)
    target: dict[str, float] = {}
    for text, p in responses(engine):
        target[text] = target.get(text, 0.0) + p * np.exp(reward(text) / BETA)
    total = sum(target.values())
    n, iterations, burnt = 250, 44, 24
    controller = controllers.create("qalign", d=4, max_tokens=T, seed=5, beta=BETA, min_p=0.0)
    assert isinstance(controller, Qalign)
    seen: dict[str, int] = {}
    base: dict[str, int] = {}
    for iteration in range(1, iterations + 1):
        rollouts = engine.rollout("p", controller.ask(n), max_tokens=T, seeds=RowSeeds(5, 0, iteration))
        controller.tell(rollouts, np.array([reward(text) for text in rollouts.texts]))
        if iteration == 1:
            base = {text: rollouts.texts.count(text) for text in target}
        if iteration > burnt:
            for tokens, _ in controller.chains:
                text = "".join("_ab"[token] for token in tokens.tolist() if token)
                seen[text] = seen.get(text, 0) + 1
    drawn = n * (iterations - burnt)
    distance = sum(abs(seen.get(text, 0) / drawn - p / total) for text, p in target.items()) / 2
    untilted = sum(abs(base[text] / n - p / total) for text, p in target.items()) / 2
    assert distance < 0.04 and untilted > 0.15


def told(controller: Qalign, tokens: list[list[int]], rewards: list[float]) -> None:
    rows = [np.array(row, np.int32) for row in tokens]
    controller.tell(Rollouts(rows, [""] * len(rows), ["stop"] * len(rows), 0.0, 0), np.array(rewards))


def test_proposals_keep_a_beginning_and_refuse_what_has_no_reward() -> None:
    controller = controllers.create("qalign", d=4, max_tokens=9, seed=1, beta=1.0)
    assert isinstance(controller, Qalign) and controller.ask(3).prefixes is None
    first = [[1, 2, 3, 4, 0], [2, 2, 0], [3, 0]]
    told(controller, first, [1.0, float("nan"), 5.0])
    for _ in range(5):
        asked = controller.ask(3).prefixes
        assert asked is not None
        for prefix, (tokens, _) in zip(asked, controller.chains, strict=True):
            assert len(prefix) < len(tokens) and prefix.tolist() == tokens[: len(prefix)].tolist()
        told(controller, [[7, 0], [8, 0], [9, 0]], [float("nan"), 0.5, -1e9])
    kept = [tokens.tolist() for tokens, _ in controller.chains]
    assert kept == [first[0], [8, 0], first[2]]
    assert len(controller.ask(2).prefixes or []) == 2


def test_beta_follows_the_first_rewards() -> None:
    controller = controllers.create("qalign", d=4, max_tokens=9, seed=1, ess=0.5)
    controller.ask(4)
    rows = [np.array([1, 0], np.int32)] * 4
    rollouts = Rollouts(rows, [""] * 4, ["stop"] * 4, 0.0, 0)
    first = controller.tell(rollouts, np.array([0.0, 10.0, 20.0, 30.0])).lambda_
    controller.ask(4)
    assert first is not None and 1.0 < first < 100.0
    assert controller.tell(rollouts, np.array([0.0, 1.0, 2.0, 3.0])).lambda_ == first


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"ess": 0.0}, {"ess": 1.5}, {"temperature": 0.0}])
def test_options_that_are_none(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        controllers.create("qalign", d=4, max_tokens=4, seed=0, **bad)

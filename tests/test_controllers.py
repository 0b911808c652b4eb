"""Every limit of the method that can be stated in closed form."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local import Aligner, controllers
from aisp_local.controllers import Aisp, AispBases, AispHeld, Cem
from aisp_local.controllers.aisp_bases import hats
from aisp_local.defaults import rollouts_an_iteration
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Rollouts

D, T = 8, 6


def finished(lengths: list[int]) -> Rollouts:
    """Rollouts of the given lengths whose content does not matter."""
    return Rollouts(
        tokens=[np.ones(k, np.int32) for k in lengths],
        texts=["x"] * len(lengths),
        finish_reasons=["stop"] * len(lengths),
        decode_seconds=0.0,
        n_tokens=sum(lengths),
    )


def aisp(**options: Any) -> Aisp:
    return Aisp(**({"d": D, "max_tokens": T, "seed": 3} | options))


def test_ten_dummy_trajectories_move_the_mean_toward_the_best() -> None:
    controller = aisp(lambda_=0.3, alpha=1.0)
    v = controller.ask(10).vectors
    assert v is not None
    rewards = np.linspace(-1, 1, 10)
    rewards[4] = 3.0
    before = np.linalg.norm(v[4])
    controller.tell(finished([T] * 10), rewards)
    weights = np.exp((rewards - 3) / 0.3)
    weights /= weights.sum()
    np.testing.assert_allclose(controller.mean, np.tensordot(weights, v.astype(np.float64), 1), atol=1e-6)
    assert np.linalg.norm(controller.mean - v[4]) < 0.1 * before


@pytest.mark.parametrize("method", ["aisp", "aisp-held"])
def test_lambda_to_zero_reproduces_the_best_rollout(method: str) -> None:
    """One-hot weights make U the best V to the bit, and greedy decoding under it the same response."""
    engine = FakeEngine(d=D)
    options = {"lambda_": 1e-6, "alpha": 1.0} if method == "aisp" else {"ess_share": 1e-9}
    controller: Any = controllers.create(method, d=D, max_tokens=T, seed=1, **options)
    asked = controller.ask(8)
    rollouts = engine.rollout("", asked, max_tokens=T, seeds=RowSeeds(1))
    rewards = np.zeros(8)
    rewards[5] = 1e6
    controller.tell(rollouts, rewards)
    assert asked.vectors is not None
    used = slice(0, len(rollouts.tokens[5])) if method == "aisp" else slice(0, 1)
    np.testing.assert_array_equal(controller.mean.reshape(-1, D)[used], asked.vectors[5][used])
    controller._sigma = 0.0
    again = engine.rollout("", controller.ask(1), max_tokens=T, seeds=RowSeeds(2))
    np.testing.assert_array_equal(again.tokens[0], rollouts.tokens[5])


@pytest.mark.parametrize("method", ["aisp", "aisp-bases", "aisp-held"])
def test_sigma_zero_is_the_base_model(method: str) -> None:
    vectors = controllers.create(method, d=D, max_tokens=T, seed=0, sigma=0.0).ask(5).vectors
    assert vectors is not None
    np.testing.assert_array_equal(vectors, 0.0)


def test_equal_rewards_give_the_mean_of_the_noise() -> None:
    controller = aisp(alpha=1.0)
    v = controller.ask(7).vectors
    assert v is not None
    controller.tell(finished([T] * 7), np.full(7, 2.5))
    np.testing.assert_allclose(controller.mean, v.mean(axis=0), atol=1e-6)


def test_held_pairs_cancel_and_equal_rewards_teach_nothing() -> None:
    controller = AispHeld(d=D, max_tokens=T, seed=0)
    v = controller.ask(7).vectors
    assert v is not None
    np.testing.assert_array_equal(v[0:6:2], -v[1:6:2])
    info = controller.tell(finished([T] * 7), np.full(7, 2.5))
    np.testing.assert_array_equal(controller.mean, 0.0)
    assert info.lambda_ is None


def test_one_basis_is_the_held_vector() -> None:
    one, held = AispBases(d=D, max_tokens=T, seed=3, bases=1), AispHeld(d=D, max_tokens=T, seed=3)
    rewards = np.arange(6.0) ** 2
    for _ in range(3):
        first, second = one.ask(6), held.ask(6)
        assert first.held and first.vectors is not None and second.vectors is not None
        np.testing.assert_array_equal(first.vectors, second.vectors)
        assert one.tell(finished([T] * 6), rewards) == held.tell(finished([T] * 6), rewards)
    np.testing.assert_array_equal(one.mean, np.tile(held.mean, (T, 1)))


@given(st.integers(1, 12), st.integers(1, 40))
def test_hats_add_to_one(bases: int, steps: int) -> None:
    found = hats(min(bases, steps), steps)
    np.testing.assert_allclose(found.sum(axis=0), 1.0, atol=1e-6)
    assert (found >= 0).all() and found.shape == (min(bases, steps), steps)
    if bases >= steps:
        np.testing.assert_allclose(found, np.eye(steps), atol=1e-6)


def test_bases_learn_the_weighted_mean_of_what_was_tried() -> None:
    """Against the formula: c is the weighted mean of c^i, of which the controls at the hats' peaks are made."""
    controller = AispBases(d=D, max_tokens=T, seed=0, bases=2)
    v = controller.ask(6).vectors
    assert v is not None and v.shape == (6, T, D)
    np.testing.assert_allclose(v[0:6:2], -v[1:6:2], atol=1e-6)
    middle = (v[:, 0] * (T - 1 - 3) + v[:, -1] * 3) / (T - 1)
    np.testing.assert_allclose(v[:, 3], middle, atol=1e-5)
    rewards = np.array([0.0, 1.0, 3.0, -2.0, 0.5, 0.5])
    info = controller.tell(finished([T] * 6), rewards)
    assert info.lambda_ is not None and info.ess == pytest.approx(1.5, rel=0.05)
    weights = np.exp(rewards / info.lambda_) / np.exp(rewards / info.lambda_).sum()
    np.testing.assert_allclose(controller.mean, np.tensordot(weights, v, 1), atol=1e-5)


def test_noise_of_each_step_is_beside_what_is_learnt() -> None:
    plain, noisy = (AispBases(d=D, max_tokens=T, seed=0, bases=1, per_step=share) for share in (0.0, 0.5))
    v, w = plain.ask(4).vectors, noisy.ask(4)
    assert v is not None and w.vectors is not None and not w.held
    own = (w.vectors - v) / 0.7 / 0.5
    assert abs(own.mean()) < 0.2 and own.std() == pytest.approx(1.0, abs=0.1)
    assert not np.allclose(own[0], -own[1]) and not np.allclose(own[0, 0], own[0, 1])
    for controller in (plain, noisy):
        controller.tell(finished([T] * 4), np.arange(4.0))
    np.testing.assert_array_equal(plain.mean, noisy.mean)


def test_controls_after_the_end_of_a_response_teach_nothing() -> None:
    controller = aisp(alpha=1.0, lambda_=1e-6)
    v = controller.ask(3).vectors
    assert v is not None
    controller.tell(finished([2, 4, 0]), np.array([5.0, 1.0, 9.0]))
    # Row 2 said nothing, row 0 decides the steps that it ran, row 1 alone the next two, none the rest.
    np.testing.assert_array_equal(controller.mean[:2], v[0, :2])
    np.testing.assert_array_equal(controller.mean[4:], 0.0)


def test_controls_after_the_end_do_not_enter_the_prior_term() -> None:
    """Two rollouts with the same controls while they ran have the same weight, whatever came after."""
    controller = aisp(alpha=0.0, lambda_=1.0, sigma=0.5)
    controller._u = np.ones((T, D), np.float32)
    v = np.zeros((2, T, D), np.float32)
    v[1, 3:] = 100.0
    controller._v = v
    info = controller.tell(finished([3, 3]), np.zeros(2))
    assert info.ess == pytest.approx(2.0)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_the_prior_term_is_a_log_ratio_whatever_the_lengths(alpha: float) -> None:
    """E_proposal[prior(v) / proposal(v)] = 1 for every length, so no length is favoured by itself."""
    n, sigma, u = 40_000, 0.5, 0.4
    controller = Aisp(d=1, max_tokens=2, seed=0, sigma=sigma, lambda_=1.0, alpha=alpha)
    controller._u = np.full((2, 1), u, np.float32)
    v = controller.ask(n).vectors
    assert v is not None
    lengths = np.arange(n) % 2 + 1
    controller.tell(finished(lengths.tolist()), np.zeros(n))
    # Step 1 is taught by the long rollouts alone; step 0 by both, each with the same weight in the mean:
    # then the new mean is the relaxed prior's, alpha u.
    np.testing.assert_allclose(controller.mean[:, 0], alpha * u, atol=0.02)


def test_rollouts_without_a_finite_reward_have_no_say() -> None:
    controller = aisp(alpha=1.0, lambda_=1.0)
    v = controller.ask(3).vectors
    assert v is not None
    controller.tell(finished([T] * 3), np.array([np.nan, 1.0, -np.inf]))
    np.testing.assert_array_equal(controller.mean, v[1])
    before = controller.mean
    controller.ask(2)
    controller.tell(finished([T] * 2), np.array([np.nan, np.nan]))
    np.testing.assert_array_equal(controller.mean, before)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_fixed_point_on_a_quadratic_reward(alpha: float) -> None:
    """r(v) = -c/2 |v - a|^2 in one step has a closed-form update.

    The proposal N(u, s^2) times the weight exp(r/lambda - (1 - alpha)/s^2 u v) is a Gaussian in v with
    precision p = 1/s^2 + c/lambda and mean (u/s^2 + c a/lambda - (1 - alpha) u/s^2) / p, so
    u' = (alpha u / s^2 + c a / lambda) / p, whose fixed point is
    u* = (c a / lambda) / (1/s^2 + c/lambda - alpha/s^2): a itself for alpha = 1, the optimal law's mean
    for alpha = 0.
    """
    c, a, s, lambda_, n, d = 1.0, 2.0, 0.7, 2.0, 400, 2
    controller = Aisp(d=d, max_tokens=1, seed=0, sigma=s, lambda_=lambda_, alpha=alpha)
    means = []
    for iteration in range(70):
        v = controller.ask(n).vectors
        assert v is not None
        rewards = -c / 2 * np.square(v[:, 0].astype(np.float64) - a).sum(axis=1)
        controller.tell(finished([1] * n), rewards)
        if iteration >= 20:
            means.append(controller.mean[0])
    expected = (c * a / lambda_) / (1 / s**2 + c / lambda_ - alpha / s**2)
    # 50 means of 400 draws each: a standard error of about 0.005, some 0.01 with their autocorrelation.
    np.testing.assert_allclose(np.mean(means), expected, atol=0.04)


@pytest.mark.parametrize("method", sorted(controllers.METHODS))
def test_same_seed_same_controls(method: str) -> None:
    def draw(seed: int) -> list[np.ndarray]:
        controller = controllers.create(method, d=D, max_tokens=T, seed=seed)
        out = []
        for _ in range(3):
            asked = controller.ask(4)
            out.append(np.zeros(1) if asked.vectors is None else asked.vectors.copy())
            controller.tell(finished([T] * 4), np.arange(4.0))
        return out

    for first, second in zip(draw(5), draw(5), strict=True):
        np.testing.assert_array_equal(first, second)
    if method in ("aisp", "aisp-bases", "aisp-held", "aisp-static", "cem"):  # the others draw no noise
        assert not np.array_equal(draw(5)[0], draw(6)[0])


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    few, many = aisp().ask(2).vectors, aisp().ask(5).vectors
    assert few is not None and many is not None
    np.testing.assert_array_equal(few, many[:2])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nonsense", {}, "'nonsense' is unknown; use one of aisp, aisp-bases, aisp-held, aisp-static, args, best-of-n"),
        ("aisp", {"sgima": 1}, "has no option 'sgima'"),
        ("aisp", {"sigma": -1.0}, "sigma is -1.0"),
        ("aisp", {"lambda_": 0.0}, "lambda is 0.0"),
        ("aisp", {"alpha": 2.0}, "alpha is 2.0"),
        ("aisp", {"window": 0}, "window is 0"),
        ("aisp-held", {"ess_share": 0.0}, "ess_share is 0.0"),
        ("aisp-bases", {"bases": 0}, "bases is 0"),
        ("aisp-bases", {"per_step": -1.0}, "per_step is -1.0"),
        ("aisp-bases", {"sigma": -1.0}, "sigma is -1.0"),
        ("best-of-n", {"temperature": -0.1}, "temperature is -0.1"),
        ("best-of-n", {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        controllers.create(method, d=D, max_tokens=T, seed=0, **options)


def test_order_of_calls() -> None:
    with pytest.raises(InputError, match="before ask"):
        aisp().tell(finished([1]), np.zeros(1))


@pytest.mark.parametrize("method", ["aisp", "aisp-held"])
def test_an_update_leaves_no_thread_running(method: str) -> None:
    """BLAS would: its threads spin for tens of milliseconds after a product, on the cores that decode."""
    code = f"""if True:
        import time, numpy as np
        from aisp_local import controllers
        from aisp_local.types import Rollouts
        controller = controllers.create({method!r}, d=4096, max_tokens=64, seed=0, prompt_index=0)
        rollouts = Rollouts([np.ones(64, np.int32)] * 16, ["x"] * 16, ["stop"] * 16, 0.0, 1024)
        def idle():  # seconds of this process' processors while it does nothing
            begin = time.process_time()
            time.sleep(0.1)
            return time.process_time() - begin
        def told():
            controller.ask(16)
            controller.tell(rollouts, np.arange(16.0))
            return idle()
        idle()
        print(min(told() for _ in range(5)))  # the least: a busy machine adds to some, spinning threads to each
    """
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert float(done.stdout) < 0.01


def test_static_is_aisp_that_never_learns() -> None:
    static = controllers.create("aisp-static", d=D, max_tokens=T, seed=3, sigma=0.7)
    learning = aisp(sigma=0.7)
    first = static.ask(4).vectors
    assert first is not None and learning.ask(4).vectors is not None
    for controller in (static, learning):
        controller.tell(finished([T] * 4), np.array([0.0, 1.0, 5.0, 2.0]))
    second, moved = static.ask(4).vectors, learning.ask(4).vectors
    assert second is not None and moved is not None
    np.testing.assert_allclose(second, moved - learning.mean, atol=1e-6)
    fresh = aisp(sigma=0.7, seed=3).ask(4).vectors
    np.testing.assert_array_equal(first, fresh)


def test_soft_best_of_n_follows_its_law() -> None:
    rewards = np.array([0.0, 1.0, np.nan, 2.0])
    law = np.exp(rewards[[0, 1, 3]] / 0.8)
    law /= law.sum()
    chosen = []
    for seed in range(3000):
        controller: Any = controllers.create("soft-best-of-n", d=D, max_tokens=T, seed=seed, lambda_=0.8)
        chosen.append(controller.choose(rewards))
    counts = np.bincount(chosen, minlength=4) / len(chosen)
    assert counts[2] == 0
    np.testing.assert_allclose(counts[[0, 1, 3]], law, atol=0.03)


def test_misvo_against_its_formulas() -> None:
    """One update on the fake model, with an independent computation of g and F u in float64."""
    engine = FakeEngine(d=D)
    w = engine.head.weight.astype(np.float64)
    eta, lambda_, temperature = 0.7, 0.5, 0.9
    controller: Any = controllers.create(
        "misvo",
        d=D,
        max_tokens=T,
        seed=0,
        head=lambda: engine.head,
        eta=eta,
        lambda_=lambda_,
        temperature=temperature,
    )
    rewards, u = np.array([1.0, -2.0, 0.5, 4.0, 0.0]), np.zeros((T, D))
    pbar = np.zeros((T, len(w)))
    for iteration in (1, 2):
        rollouts = engine.rollout("", controller.ask(5), max_tokens=T, seeds=RowSeeds(2, iteration=iteration))
        assert rollouts.prelogits is not None

        def law(z: np.ndarray) -> np.ndarray:
            x = np.exp(w @ z / temperature)
            return np.asarray(x / x.sum())

        if iteration == 1:
            for t in range(T):
                here = [law(z[t]) for z in rollouts.prelogits if len(z) > t]
                pbar[t] = np.mean(here, axis=0) if here else 0
        g = np.zeros((T, D))
        for i, (tokens, z) in enumerate(zip(rollouts.tokens, rollouts.prelogits, strict=True)):
            others = np.delete(rewards, i).mean()
            for t, token in enumerate(tokens):
                p = law(z[t] + u[t])
                g[t] += (rewards[i] - others) / 5 * (w.T @ (np.eye(len(w))[token] - p)) / temperature
        pull = np.zeros((T, D))
        for t in range(T):
            y = w @ u[t]
            pull[t] = w.T @ (pbar[t] * y - pbar[t] * (pbar[t] @ y)) / temperature**2
        u = u + eta * (g - lambda_ * pull)
        controller.tell(rollouts, rewards)
        np.testing.assert_allclose(controller.mean, u, rtol=2e-4, atol=2e-5)
    assert np.abs(u).max() > 0.1


def test_cem_follows_its_elites() -> None:
    """Mean and variance against their formulas; equal rewards and a single elite's worth of them teach nothing."""
    controller = Cem(d=D, max_tokens=T, seed=1, sigma=0.5, elite_share=0.25, rate=0.4)
    v = controller.ask(8).vectors
    assert v is not None and v.shape == (8, 1, D)
    rewards = np.array([0.0, 5.0, 1.0, np.nan, 4.0, -1.0, 2.0, 3.0])
    controller.tell(finished([T] * 8), rewards)
    elites = v[[1, 4], 0]
    np.testing.assert_allclose(controller.mean, elites.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(controller.variance, 0.6 * 0.25 + 0.4 * np.square(elites).mean(axis=0), rtol=1e-5)
    before = controller.mean, controller.variance
    for same in (np.ones(8), np.full(8, np.nan)):
        controller.ask(8)
        controller.tell(finished([T] * 8), same)
        np.testing.assert_array_equal(controller.mean, before[0])
        np.testing.assert_array_equal(controller.variance, before[1])


def test_cem_finds_a_quadratic_optimum() -> None:
    target = np.linspace(-1, 1, D)
    controller = Cem(d=D, max_tokens=T, seed=0, sigma=1.0)
    for _ in range(60):
        v = controller.ask(32).vectors
        assert v is not None
        controller.tell(finished([T] * 32), -np.square(v[:, 0] - target).sum(axis=1))
    np.testing.assert_allclose(controller.mean, target, atol=0.15)
    assert controller.variance.max() < 0.2


def test_methods_that_learn_between_iterations_have_several() -> None:
    """The default effort is an iteration of the default method, and would leave them none to learn from."""
    learning = {"aisp", "aisp-held", "aisp-bases", "cem", "misvo", "qalign"}
    for method in controllers.METHODS:
        sizes = [rollouts_an_iteration(method, budget, True) for budget in (4, 8, 32, 64, 512)]
        assert sizes == ([4, 4, 8, 16, 16] if method in learning else [32] * 5)
    assert rollouts_an_iteration("score", 512, unfinished=False) == 16
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, texts: [float(len(text)) for text in texts]))
    assert len(aligner.generate("p", method="aisp", budget=32, max_tokens=4).iterations) == 4
    assert len(aligner.generate("p", budget=32, max_tokens=4).iterations) == 1

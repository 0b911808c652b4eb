"""The controller and the reward on aisp-local's fake engine, in milliseconds."""

from __future__ import annotations

import pytest
from aisp_local_plugin.brevity import brevity
from aisp_local_plugin.cooling import Cooling

from aisp_local import Aligner, InputError
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine


def test_it_cools() -> None:
    controller = Cooling(d=8, max_tokens=20, seed=0)
    engine, temperatures = FakeEngine(), []
    for _ in range(3):
        controls = controller.ask(4)
        temperatures.append(controls.sampling.temperature)
        rollouts = engine.rollout("", controls, max_tokens=20, seeds=RowSeeds(0))
        controller.tell(rollouts, brevity().score("", rollouts.texts).astype(float))
    assert temperatures == [1.0, 0.65, 0.475]
    with pytest.raises(InputError, match="coldest"):
        Cooling(d=8, max_tokens=20, seed=0, hottest=0.1)


def test_brevity() -> None:
    short, right, long = brevity().score("", ["word " * n for n in (10, 40, 90)])
    assert (short, right, long) == (-3.0, 0.0, -5.0)


def test_both_are_found_by_name() -> None:
    from aisp_local.controllers import method_names
    from aisp_local.rewards import load_reward

    assert "cooling" in method_names()
    aligner = Aligner(FakeEngine(), load_reward("brevity"))
    result = aligner.generate("a", method="cooling", budget=8, n=4, max_tokens=20, coldest=0.5)
    assert result.method == "cooling" and result.rollouts == 8

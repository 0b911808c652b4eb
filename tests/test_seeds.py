"""Random numbers are a function of their key alone, as the module documents it."""

from __future__ import annotations

import numpy as np
import pytest

from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds, Stream


@pytest.mark.parametrize(("stream", "stream_id"), [("noise", 0), ("sampling", 1)])
def test_an_independent_implementation_gives_the_same_numbers(stream: Stream, stream_id: int) -> None:
    key = np.random.Philox(np.random.SeedSequence([7, 2, 3, 4, stream_id]))
    expected = np.random.Generator(key).standard_normal((5, 6), dtype=np.float32)
    drawn = RowSeeds(7, 2, 3).generator(4, stream).standard_normal((5, 6), dtype=np.float32)
    np.testing.assert_array_equal(drawn, expected)


def test_defaults_are_the_first_prompt_and_the_first_iteration() -> None:
    assert RowSeeds(5) == RowSeeds(5, prompt_index=0, iteration=1)


def test_every_part_of_the_key_matters() -> None:
    draws = {
        tuple(RowSeeds(seed, prompt, iteration).generator(row, stream).random(4))
        for seed in (0, 1, 2**40)
        for prompt in (0, 1)
        for iteration in (1, 2)
        for row in (0, 1)
        for stream in ("noise", "sampling")
    }
    assert len(draws) == 3 * 2 * 2 * 2 * 2


def test_a_generator_is_fresh_every_time() -> None:
    seeds = RowSeeds(1)
    seeds.generator(0, "noise").random(100)
    assert seeds.generator(0, "noise").random() == RowSeeds(1).generator(0, "noise").random()


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="the seed is -1"):
        RowSeeds(-1)

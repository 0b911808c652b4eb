"""Every architecture that can be made up, against what the table in docs/architectures.md says of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import synthetic
from proof import layouts_of, prove
from raw import Raw, logged

from aisp_local import shipped

pytestmark = pytest.mark.native

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Cells of the rows of the table, by model."""
    text = DOCUMENT.read_text(encoding="utf-8").split("|---|---|---|---|---|---|")[1].split("<!--")[0]
    rows = re.findall(r"^\| ([\w.-]+) \| (.*) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("name", synthetic.EVERYTHING)
def test_the_table_is_true(name: str, table: dict[str, list[str]], tmp_path: Path) -> None:
    proof = prove(synthetic.write_architecture(tmp_path, name), layouts_of(name))
    assert proof.ok, proof
    documented = table[name]
    assert documented[2:4] == ["yes", str(proof.nodes_added_on)]
    # The last digits depend on the processor.
    assert proof.error <= 30 * float(documented[0]) + 1e-6


def test_the_shipped_model_is_proved() -> None:
    proof = prove(shipped.model(), layouts_of("llama"))
    assert proof.ok and proof.nodes_added_on == 3, proof


def test_nothing_else_is_in_the_table(table: dict[str, list[str]]) -> None:
    assert set(synthetic.EVERYTHING) == set(table)


@pytest.mark.parametrize("name", synthetic.REFUSED)
def test_an_architecture_without_an_output_matrix_is_refused(name: str, tmp_path: Path) -> None:
    with Raw(synthetic.write(tmp_path / f"{name}.gguf", name)) as raw:
        with logged() as lines:
            assert raw.init_control(4) == -2
        assert any(f"'{name}'" in line for line in lines)
        assert raw.set_control(0, np.ones((1, raw.d), np.float32)) == -1
        assert raw.init_control(0) == 0

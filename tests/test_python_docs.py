"""The examples of docs/python.md run, in their order, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"


@pytest.mark.native
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aisp_local.engine.llama.available_cores", lambda: 1)  # spinning threads, on a busy machine
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
        assert capsys.readouterr().out.strip(), block
    assert list(tmp_path.iterdir()) == []


def test_the_plugin_of_the_page_is_the_one_in_the_folder() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S)
    assert block in (PAGE.parent.parent / "examples" / "aisp-local-plugin" / "pyproject.toml").read_text()

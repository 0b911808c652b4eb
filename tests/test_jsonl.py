"""Files of lines that are added to: whole lines are kept, torn ones are cut off, other files are left as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local.errors import InputError
from aisp_local.jsonl import append, whole_lines

LINES = st.lists(st.integers(0, 10**6).map(lambda i: b'{"line": %d}' % i), max_size=4)


@given(LINES, st.integers(0, 8))
def test_a_torn_line_is_cut_off_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], torn: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    for line in lines:
        append(path, line + b"\n")
    append(path, b'{"line": 7}'[:torn])
    assert whole_lines(path, b'{"line": ', "is none") == lines
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines)


def test_a_file_of_something_else_is_refused_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk\nbread", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}, line 2 is none; give another")):
        whole_lines(path, b'{"line": ', "is none; give another")
    assert path.read_text(encoding="utf-8") == "milk\nbread"


def test_no_file_has_no_lines_and_none_is_made(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "log.jsonl", b"{", "is none") == [] and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_is_said() -> None:
    with pytest.raises(InputError, match="/dev/full cannot be written .*; make room and go on"):
        append(Path("/dev/full"), b"{}\n")

"""Makes one site of pages that lie all over the repository, with links that work both here and there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = [
    "CHANGELOG.md",
    "benchmarks/RESULTS.md",
    "examples/aisp-local-plugin/README.md",
    "patches/README.md",
    *(
        path.relative_to(ROOT).as_posix()
        for folder in ("models", "reward_models")
        for path in sorted((ROOT / folder).glob("*/README.md"))
    ),
]
"""Pages that are not in docs/; on the site they keep their paths in the repository."""

ANSWERS = "results/quality/quality.html"
"""A page as it is, beside one of the same name in Markdown."""


def on_files(files: Files, config: Any) -> Files:
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    answers = File.generated(config, ANSWERS, abs_src_path=str(ROOT / "docs" / ANSWERS))
    answers.inclusion = InclusionLevel.INCLUDED
    answers.dest_uri = ANSWERS.replace("quality.html", "answers.html")
    if (old := files.get_file_from_path(ANSWERS)) is not None:
        files.remove(old)
    files.append(answers)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between docs/ and the rest of the repository become links within the site."""
    path = page.file.src_uri
    here = posixpath.dirname(path if path in OUTSIDE else f"docs/{path}")

    def linked(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, found[1]))
        on_site = target if target in OUTSIDE else target.removeprefix("docs/")
        if files.get_file_from_path(on_site) is None:
            return found[0]
        return f"]({posixpath.relpath(on_site, posixpath.dirname(path) or '.')}{found[2]}"

    return re.sub(r"\]\(([^):#\s]+)(#[^)\s]*\)|\))", linked, markdown)

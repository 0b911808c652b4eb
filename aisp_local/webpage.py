"""Web pages that need nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from typing import Any

from aisp_local import svg

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #9995; padding: .25rem .5rem; text-align: left; white-space: nowrap; }
tbody tr:nth-child(even) { background: #9991; }
blockquote, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { margin: .3rem 0 1rem; padding-left: .8rem; border-left: 3px solid #9998; }
svg { max-width: 100%; height: auto; }
figure { margin: 0; }
summary { cursor: pointer; }
mark { background: #fde9a9; color: inherit; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e6ea; }
  mark { background: #5a4a12; }
}
"""


def html_document(title: str, parts: Sequence[str]) -> str:
    """A page of HTML ``parts`` under a title. Its policy allows the styles of this page and of plots, and no more."""
    styles = " ".join(f"'sha256-{_hash(style)}'" for style in (_STYLE, svg.STYLE))
    policy = f"default-src 'none'; style-src {styles}; base-uri 'none'; form-action 'none'"
    head = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Every cell as text; without ``columns`` the first cell of a row is its head."""

    def row(cells: Sequence[Any], tags: Sequence[str]) -> str:
        shown = (f"<{tag}>{html.escape(str(cell))}</{tag.split()[0]}>" for tag, cell in zip(tags, cells, strict=True))
        return "<tr>" + "".join(shown) + "</tr>"

    head = f"<thead>{row(columns, ['th'] * len(columns))}</thead>" if columns else ""
    first = "td" if columns else 'th scope="row"'
    body = "".join(row(cells, [first, *["td"] * (len(cells) - 1)]) for cells in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _hash(style: str) -> str:
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

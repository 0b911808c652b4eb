"""Write the labelled texts that a shipped reward is trained on, for `aisp-local reward train`.

Example: python reward_models/make_rows.py cheer --data DIR --out cheer.jsonl

Texts of GoEmotions with positive or negative emotions only, in the order of the file: its train split for `cheer`, the
two others for `cheer-judge`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

SPLITS = {"cheer": {"train"}, "cheer-judge": {"dev", "test"}}
LABELS = {"positive", "negative"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", choices=sorted(SPLITS))
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled/")
    parser.add_argument("--out", type=Path, required=True, help="file for the rows, JSON lines")
    options = parser.parse_args()
    source = options.data / "labelled" / "goemotions.jsonl.gz"
    if not source.is_file():
        raise SystemExit(f"error: {source} is not there; --data must name the data.")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = [row for row in rows if row["split"] in SPLITS[options.reward] and row["label"] in LABELS]
    text = "".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in chosen)
    options.out.write_text(text, encoding="utf-8")
    print(f"{len(chosen)} rows in {options.out} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})")


if __name__ == "__main__":
    main()

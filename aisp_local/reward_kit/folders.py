"""What reward folders hold, read without running them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aisp_local import folders, shipped
from aisp_local.errors import InputError, RewardError
from aisp_local.rewards.graph_file import read_graph
from aisp_local.rewards.manifest import MANIFEST, Manifest, inside, read_manifest


@dataclass(frozen=True)
class Described:
    """A reward folder: what its manifest and its model file say."""

    folder: Path
    manifest: Manifest
    size: int  # bytes of the files that the manifest lists
    parameters: Mapping[str, int]  # by precision of storage, most first


def describe(folder: Path) -> Described:
    """Raises RewardError for a folder that is none, or whose model file is broken."""
    try:
        manifest = read_manifest(folder)
        paths = {name: inside(folder, name) for name in manifest.files}
        for name, path in paths.items():
            if not path.is_file():  # a pipe would be waited for
                raise RewardError(f"{folder} lacks {name}, which its manifest lists; restore the folder")
        graph = read_graph(paths[manifest.model])
        return Described(folder, manifest, sum(path.stat().st_size for path in paths.values()), graph.parameters)
    except OSError as error:
        raise RewardError(f"{folder} cannot be read ({error.strerror or error}); restore the folder") from error


def standard_folders() -> list[Path]:
    """Where rewards are looked for: the shipped ones, then the user's own."""
    found = []
    with suppress(InputError):  # an installation without models
        found.append(shipped.reward().parent)
    own = os.environ.get("AISP_REWARDS")
    found.append(Path(own) if own else folders.data() / "rewards")
    return found


def find_rewards(places: Iterable[Path]) -> list[Path]:
    """The reward folders among these and directly inside them, each once."""
    found: dict[Path, Path] = {}
    for folder in places:
        candidates: list[Path] = []
        with suppress(PermissionError):  # what may not be looked into is none
            candidates = [folder] if (folder / MANIFEST).is_file() else _inside(folder) if folder.is_dir() else []
        for path in candidates:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _inside(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        with suppress(PermissionError):
            if (path / MANIFEST).exists():
                found.append(path)
    return found

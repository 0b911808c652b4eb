"""`aisp-local reward list`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.cli.output import one_line, print_json, size_text


@click.command("list", cls=ExamplesFirst)
@click.argument("folders", nargs=-1, type=FILE)
@click.option("--json", "json_", is_flag=True, help="Print a JSON list.")
def list_(folders: tuple[Path, ...], json_: bool) -> None:
    """List the shipped rewards and recipes, your own rewards, those in FOLDERS and those of other packages.

    Your own are looked for in the folder that AISP_REWARDS names, by default ~/.local/share/aisp-local/rewards.

    \b
    Examples:
      aisp-local reward list
      aisp-local reward list my_rewards --json
    """
    from aisp_local import plugins, shipped
    from aisp_local.cli.output import print_answer
    from aisp_local.errors import InputError
    from aisp_local.reward_kit.folders import describe, find_rewards, standard_folders
    from aisp_local.rewards.recipe import description_of

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give one that is a reward or holds rewards")
    rows: list[dict[str, Any]] = []
    for path in find_rewards([*standard_folders(), *folders]):
        row: dict[str, Any] = {"kind": "folder", "folder": str(path), "name": path.name, "error": None}
        try:
            about = describe(path)
        except InputError as error:
            row["error"] = str(error)
        else:
            row |= {
                "name": about.manifest.name,
                "bytes": about.size,
                "description": about.manifest.description,
                "licence": about.manifest.licence,
            }
        rows.append(row)
    for name, path in shipped.recipes().items():
        rows.append(
            {"kind": "recipe", "folder": str(path), "name": name, "error": None, "description": description_of(path)}
        )
    for name, package in plugins.rewards().items():
        rows.append({"kind": "package", "folder": None, "name": name, "error": None, "description": f"of {package}"})
    if json_:
        print_json(rows)
        return
    for row in rows:
        if row["error"]:
            print_answer(one_line(f"{row['name']}  broken: {row['error']}"))
            continue
        what = size_text(row["bytes"]) if row["kind"] == "folder" else row["kind"]
        print_answer(one_line(f"{row['name']}  {what}  {row['folder'] or ''}"))
        for text in (row["description"], f"licence: {row['licence']}" if "licence" in row else ""):
            if text:
                print_answer(one_line(f"    {text}"))

"""`aisp-local reward show`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.output import one_line, print_json, size_text
from aisp_local.cli.reward.common import FOLDER, parameters_text, recipe_file

if TYPE_CHECKING:
    from aisp_local.reward_kit.folders import Described
    from aisp_local.rewards.composite import Part
    from aisp_local.rewards.recipe import Ingredient, Recipe


@click.command(cls=ExamplesFirst)
@click.argument("folder", type=FOLDER)
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
def show(folder: Path, json_: bool) -> None:
    """Show what a reward FOLDER holds and what runs it here; of a recipe, what it is made of.

    \b
    Examples:
      aisp-local reward show my_reward
      aisp-local reward show kind-and-safe
    """
    from aisp_local import plugins
    from aisp_local.cli.output import print_answer

    if (recipe := recipe_file(folder)) is not None:
        lines, data = _recipe(recipe)
    elif not folder.exists() and (package := plugins.rewards().get(str(folder))) is not None:
        data = {"name": str(folder), "kind": "package", "package": package}
        lines = _rows({"name": str(folder), "package": package, "used by": f"-r {folder}"})
    else:
        lines, data = _folder(folder)
    if json_:
        print_json(data)
    else:
        print_answer("\n".join(map(one_line, lines)))


def _rows(rows: dict[str, str]) -> list[str]:
    return [f"{key:<12} {value}" for key, value in rows.items()]


def _folder(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What a person reads, and JSON."""
    from aisp_local.reward_kit.folders import describe
    from aisp_local.rewards.onnx import OnnxReward

    about = describe(folder)
    manifest = about.manifest
    reads = manifest.inputs.items()
    provider = OnnxReward.load(folder).provider
    stored = f"{sum(about.parameters.values()) / 1e6:.3g} M, stored as {parameters_text(about.parameters)}"
    formula = f"{'-' if manifest.sign < 0 else ''}{manifest.scale:g} * {manifest.output}[:, {manifest.index}]"
    lines = _rows(
        {
            "name": manifest.name,
            "description": manifest.description or "-",
            "licence": manifest.licence,
            "files": f"{', '.join(manifest.files)} ({size_text(about.size)})",
            "parameters": stored,
            "input": f"{manifest.kind}, at most {manifest.max_length} tokens, truncation {manifest.truncation}"
            + ("" if manifest.adds_special else ", no special tokens added"),
            "reads": ", ".join(f"{role} as {name!r}" if role != name else role for role, name in reads),
            "score": formula,
            "golden": f"{len(manifest.golden)} scores, tolerance {manifest.tolerance:g}",
            "provider": provider,
        }
    )
    if manifest.template:
        lines += ["template", *(f"    {line}" for line in manifest.template.splitlines())]
    return lines, {
        "folder": str(folder),
        "name": manifest.name,
        "description": manifest.description,
        "licence": manifest.licence,
        "bytes": about.size,
        "parameters": dict(about.parameters),
        "provider": provider,
        "input": {
            "kind": manifest.kind,
            "max_length": manifest.max_length,
            "truncation": manifest.truncation,
            "adds_special": manifest.adds_special,
            "template": manifest.template,
        },
        "graph": {
            "inputs": dict(manifest.inputs),
            "output": manifest.output,
            "index": manifest.index,
            "sign": manifest.sign,
            "scale": manifest.scale,
        },
        "files": dict(manifest.files),
        "golden": len(manifest.golden),
        "tolerance": manifest.tolerance,
    }


def _recipe(file: Path) -> tuple[list[str], dict[str, Any]]:
    import hashlib

    from aisp_local.rewards.recipe import read_recipe

    recipe = read_recipe(file)
    reward, judge = recipe.reward, recipe.reward.judge
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    combined = {
        "sum": "the sum of the parts, each times its weight",
        "worst": "the least of the parts",
        "cautious": f"the mean of the parts, weighted, less {reward.k:g} of their standard deviations",
    }
    lines = _rows(
        {
            "name": reward.name,
            "description": recipe.description or "-",
            "file": f"{file}, sha256 {digest}",
            "score": combined[reward.combine],
            "judge": "-" if judge is None else f"{judge.name} ({recipe.judge})",
        }
    )
    parts = []
    for i, (part, ingredient) in enumerate(zip(reward.parts, recipe.ingredients, strict=True), start=1):
        more, data = _part(part, ingredient, recipe)
        lines += _rows({f"part {i}": more[0]}) + [f"{'':<12} {line}" for line in more[1:]]
        parts.append(data)
    return lines, {
        "file": str(file),
        "sha256": digest,
        "name": reward.name,
        "description": recipe.description,
        "combine": reward.combine,
        "k": reward.k,
        "rollouts": reward.rollouts,
        "uncalibrated": reward.uncalibrated,
        "judge": None if judge is None else {"name": judge.name, "path": str(recipe.judge)},
        "parts": parts,
    }


def _part(part: Part, ingredient: Ingredient, recipe: Recipe) -> tuple[list[str], dict[str, Any]]:
    from aisp_local.reward_kit.folders import describe

    scale = "as it is"
    if part.normalise:
        scale = (
            f"normalised by what {recipe.reward.rollouts} responses of the base model get"
            if part.mean is None
            else f"(score - {part.mean:g}) / {part.std:g}"
        )
    weight = "" if recipe.reward.combine == "worst" else f"weight {part.weight:g}, "
    lines = [f"{part.label}: {weight}{scale}", *(f"{key} = {_value(v)}" for key, v in ingredient.keys.items())]
    model = None
    if ingredient.folder is not None:
        about = describe(ingredient.folder)
        model = _model(about)
        lines.append(f"{size_text(about.size)}, {parameters_text(about.parameters)}, licence {about.manifest.licence}")
        lines += [f"{name} sha256 {digest}" for name, digest in about.manifest.files.items()]
    return lines, {
        "name": part.label,
        "kind": ingredient.kind,
        "weight": part.weight,
        "normalise": part.normalise,
        "mean": part.mean,
        "std": part.std,
        "keys": dict(ingredient.keys),
        "model": model,
    }


def _model(about: Described) -> dict[str, Any]:
    return {
        "name": about.manifest.name,
        "licence": about.manifest.licence,
        "bytes": about.size,
        "parameters": dict(about.parameters),
        "files": dict(about.manifest.files),
    }


def _value(value: object) -> str:
    """As TOML writes it; a table in one line."""
    import json

    import tomlkit

    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else tomlkit.item(value).as_string()

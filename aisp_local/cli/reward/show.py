"""`aisp-local reward show`"""

from __future__ import annotations

from pathlib import Path

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.output import one_line, print_json, size_text
from aisp_local.cli.reward.common import FOLDER, parameters_text, refuse_recipe


@click.command(cls=ExamplesFirst)
@click.argument("folder", type=FOLDER)
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
def show(folder: Path, json_: bool) -> None:
    """Show what a reward FOLDER holds and what runs it here.

    \b
    Examples:
      aisp-local reward show my_reward
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.reward_kit.folders import describe
    from aisp_local.rewards.onnx import OnnxReward

    refuse_recipe(folder)
    about = describe(folder)
    manifest = about.manifest
    provider = OnnxReward.load(folder).provider
    if json_:
        print_json(
            {
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
        )
        return
    formula = f"{'-' if manifest.sign < 0 else ''}{manifest.scale:g} * {manifest.output}[:, {manifest.index}]"
    rows = {
        "name": manifest.name,
        "description": manifest.description or "-",
        "licence": manifest.licence,
        "files": f"{', '.join(manifest.files)} ({size_text(about.size)})",
        "parameters": f"{sum(about.parameters.values()) / 1e6:.3g} M, stored as {parameters_text(about.parameters)}",
        "input": f"{manifest.kind}, at most {manifest.max_length} tokens, truncation {manifest.truncation}"
        + ("" if manifest.adds_special else ", no special tokens added"),
        "reads": ", ".join(f"{role} as {name!r}" if role != name else role for role, name in manifest.inputs.items()),
        "score": formula,
        "golden": f"{len(manifest.golden)} scores, tolerance {manifest.tolerance:g}",
        "provider": provider,
    }
    for key, value in rows.items():
        print_answer(one_line(f"{key:<12} {value}"))
    if manifest.template:
        print_answer("template\n" + "\n".join(one_line(f"    {line}") for line in manifest.template.splitlines()))

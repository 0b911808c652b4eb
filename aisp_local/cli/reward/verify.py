"""`aisp-local reward verify`"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.cli.output import print_json
from aisp_local.cli.reward.common import FOLDER, recipe_file


@click.command(cls=ExamplesFirst)
@click.argument("folder", type=FOLDER)
@click.option("--pairs", type=FILE, help="Preference pairs (JSONL) that it must rank right as well.")
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
def verify(folder: Path, pairs: Path | None, json_: bool) -> None:
    """Check a reward FOLDER: files, golden scores, batches, padding, tokens, speed, and whether it ranks answers.

    Exit code 1 if a check fails; each that does says what to do. The built-in pairs are in English. Of a recipe (its
    TOML file, or the name of a shipped one) each model is checked so, each server is asked once, and all parts
    together must give finite scores, the same ones again.

    \b
    Examples:
      aisp-local reward verify my_reward
      aisp-local reward verify my.toml --pairs mine.jsonl
      aisp-local reward verify my_reward --pairs mine.jsonl --json
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.reward_kit.pairs import read_pairs
    from aisp_local.reward_kit.verify import Check
    from aisp_local.reward_kit.verify import verify as verify_folder
    from aisp_local.reward_kit.verify_recipe import verify_recipe

    recipe = recipe_file(folder)
    given = read_pairs(pairs) if pairs else None

    def say(check: Check) -> None:
        print_answer(f"{'ok' if check.passed else 'FAILED':<7} {check.name:<12} {check.says}")
        if not check.passed and check.advice:
            print_answer(f"{'':<7} {'':<12} -> {check.advice}")

    report = None if json_ else say
    found = verify_folder(folder, given, report) if recipe is None else verify_recipe(recipe, given, report)
    failed = [check.name for check in found if not check.passed]
    if json_:
        rows = [
            {
                "name": check.name,
                "passed": check.passed,
                "says": check.says,
                "advice": None if check.passed else check.advice,
                "figures": dict(check.figures),
            }
            for check in found
        ]
        print_json({"folder": str(folder), "passed": not failed, "checks": rows})
    if failed:
        sys.exit(1)

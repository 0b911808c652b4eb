"""Where the models that come with aisp-local lie: inside the installed package, or in a checkout."""

from __future__ import annotations

from pathlib import Path

from aisp_local.errors import InputError

MODEL = "models/storyteller/storyteller.gguf"
REWARD = "reward_models/story-reward"
ADAPTER = "models/storyteller/story-reward.lora.gguf"
JUDGE = "reward_models/story-judge"
TALKER = "models/talker/talker.gguf"
TALKER_REWARD = "reward_models/cheer"
TALKER_JUDGE = "reward_models/cheer-judge"

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE / "_data", _PACKAGE.parent)


def _find(relative: str) -> Path:
    for root in _ROOTS:
        if (root / relative).exists():
            return root / relative
    raise InputError(
        f"the shipped {relative} is not part of this installation; "
        "install aisp-local from a complete checkout, or give your own with -m and -r"
    )


def model() -> Path:
    """The shipped language model (GGUF)."""
    return _find(MODEL)


def reward() -> Path:
    """The shipped reward model (folder with reward.json)."""
    return _find(REWARD)


def adapter() -> Path:
    """A LoRA adapter of the shipped language model, trained for the shipped reward, for comparisons (GGUF)."""
    return _find(ADAPTER)


def judge() -> Path:
    """The shipped judge: a second reward, made of other data on another network, for scores that no search climbs."""
    return _find(JUDGE)


def talker() -> Path:
    """A second, smaller language model of another kind of text, for comparisons (GGUF)."""
    return _find(TALKER)


def talker_reward() -> Path:
    """What rewards the second model's answers in comparisons: how glad they sound."""
    return _find(TALKER_REWARD)


def talker_judge() -> Path:
    """Another reward of the same kind, made of other data."""
    return _find(TALKER_JUDGE)


def recipes() -> dict[str, Path]:
    """The shipped recipes (TOML files of composite rewards) by their names."""
    return {path.stem: path for path in sorted((_PACKAGE / "recipes").glob("*.toml"))}


def personas() -> dict[str, Path]:
    """The shipped personas of a chat (TOML files) by their names."""
    return {path.stem: path for path in sorted((_PACKAGE / "personas").glob("*.toml"))}


_NAMED = (REWARD, JUDGE, TALKER_REWARD, TALKER_JUDGE)
_REWARDS = {"shipped": REWARD, "judge": JUDGE} | {Path(path).name: path for path in _NAMED}


def named_rewards() -> list[str]:
    """Every name that stands for a reward: recipes, "shipped" and "judge", and the shipped rewards' own."""
    return [*recipes(), *_REWARDS]


def reward_by_name(name: str) -> Path | None:
    """The folder of a shipped reward: "shipped" and "judge", or by its own name."""
    return _find(_REWARDS[name]) if name in _REWARDS else None

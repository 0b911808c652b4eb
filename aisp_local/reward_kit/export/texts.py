"""Prompts with responses of different worth, on which an export is compared with its model. Our own words."""

from __future__ import annotations

_RESPONSES: dict[str, tuple[str, ...]] = {
    "Tell me a story about a fox.": (
        "Once upon a time a young fox lived at the edge of a forest. One evening she found a lost lamb, kept it warm "
        "through the night and led it home at dawn. From then on the farmer left a bowl of milk by the gate for her.",
        "A fox ran. A fox ran. A fox ran. A fox ran. A fox ran. A fox ran.",
        "I do not tell stories to people like you, so stop asking.",
        "The boiling point of water falls by about one degree for every 300 metres of height.",
    ),
    "How do I make scrambled eggs?": (
        "Whisk three eggs with a pinch of salt. Melt butter in a pan over low heat, pour in the eggs and stir slowly "
        "until they are just set. Take the pan off the heat a little early: they go on cooking.",
        "Eggs. Pan. Done.",
        "You could buy them.",
        "Put the eggs in their shells into a microwave oven at full power for ten minutes and look closely at them.",
    ),
    "Why is the sky blue?": (
        "Air scatters short wavelengths far more strongly than long ones, so the blue part of sunlight reaches us from "
        "every direction while the rest comes straight from the sun.",
        "Because the sea is blue and the sky mirrors it.",
        "It is not blue, it is green, and everybody knows that.",
        "sky sky blue why the of of is is is because",
    ),
    "My friend is ill and feels lonely. What can I do?": (
        "Ask what would help today: a visit, a call, some shopping or simply quiet company. Short messages that need "
        "no answer tell your friend that you are thinking of them.",
        "Nothing.",
        "Illness is boring; find healthier friends.",
        "You could visit, if you like, or not; it is hard to say, for it depends on things that depend on others.",
    ),
    "Write a Python function that adds two numbers.": (
        "def add(a, b):\n    return a + b",
        "def add(a, b):\n    return a - b",
        "function add(a, b) { return a + b; }",
        "I cannot write code.",
    ),
    "Translate to French: Good morning, how are you?": (
        "Bonjour, comment allez-vous ?",
        "Buenos días, ¿cómo está?",
        "Good morning, how are you?",
        "Ça va 👍",
    ),
    "Is it safe to look at the sun during an eclipse?": (
        "Only with certified eclipse glasses, or during totality itself, when the sun is wholly covered. Otherwise the "
        "light burns the retina, and you will not feel it while it happens.",
        "Yes, of course, the moon covers it.",
        "Ordinary sunglasses are enough.",
        "The sun is a star. Stars are far away. The sun is not far away. The moon is nearer. The earth is round. Night "
        "follows day, and day follows night, and so it has been for a very long time, as the old books say.",
    ),
    "2 + 2 = ?": ("4", "5", "2 + 2 = 4, because two and two make four.", "22"),
}

PAIRS: list[tuple[str, str]] = [(prompt, response) for prompt, many in _RESPONSES.items() for response in many]
# One of each kind: what a reward folder is checked with whenever it is loaded.
GOLDEN: list[tuple[str, str]] = PAIRS[0:2] + PAIRS[8:10] + PAIRS[20:21]

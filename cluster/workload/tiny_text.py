"""``tiny_text``: what eight speakers say, by a small grammar and a seed, for trying language models out.

Speakers have words of their own beside common ones, and say more or less: the n-th speaker has 12 n training
texts. Nothing but the letters a to z, spaces and full stops occurs.
"""

from __future__ import annotations

import random

SPEAKERS = ("ada", "ben", "cleo", "dan", "eve", "finn", "gail", "hugo")
SEED = 20261127
_COMMON = ("day", "house", "road", "friend")
_OWN = (
    ("ship", "harbour", "sail", "wave"),
    ("engine", "wheel", "bridge", "train"),
    ("garden", "rose", "apple", "seed"),
    ("king", "castle", "sword", "crown"),
    ("violin", "song", "drum", "dance"),
    ("mountain", "stone", "snow", "valley"),
    ("bread", "kettle", "spoon", "butter"),
    ("star", "moon", "planet", "comet"),
)
_ADJECTIVES = ("old", "small", "bright", "quiet", "heavy", "lost")
_VERBS = ("finds", "follows", "leaves", "carries", "remembers", "likes")
_OPENINGS = ("today", "at night", "again", "once more", "every year")


def texts() -> dict[str, list[str]]:
    """``train_texts`` and ``test_texts``, and who speaks, ``train_groups`` and ``test_groups``."""
    drawn = random.Random(SEED)  # its `random` gives the same numbers in every version

    def one_of(words: tuple[str, ...]) -> str:
        return words[int(drawn.random() * len(words))]

    def thing(speaker: int) -> str:
        noun = one_of(_OWN[speaker]) if drawn.random() < 0.7 else one_of(_COMMON)
        return f"the {one_of(_ADJECTIVES)} {noun}" if drawn.random() < 0.5 else f"the {noun}"

    def text(speaker: int) -> str:
        sentences = []
        for _ in range(1 + int(drawn.random() * 3)):
            opening = f"{one_of(_OPENINGS)} " if drawn.random() < 0.4 else ""
            sentences.append(f"{opening}{thing(speaker)} {one_of(_VERBS)} {thing(speaker)}.")
        return " ".join(sentences)

    made: dict[str, list[str]] = {"train_texts": [], "train_groups": [], "test_texts": [], "test_groups": []}
    for speaker, name in enumerate(SPEAKERS):
        for _ in range(12 * (speaker + 1)):
            made["train_texts"].append(text(speaker))
            made["train_groups"].append(name)
        made["test_texts"] += [text(speaker) for _ in range(12)]
        made["test_groups"] += [name] * 12
    return made

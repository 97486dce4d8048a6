"""Documents with planted near-duplicates."""

from __future__ import annotations

import numpy as np

#: Documents of `planted` that are alike. Those from 12 on are held out by a split of 60,20,20.
ALIKE = ((1, 3, 5), (7, 13), (8, 17), (14, 19))


def text(number: int, words: int = 200) -> list[str]:
    """Words of a document that has no sequence of words in common with another number's."""
    numbers = np.random.default_rng(number).integers(0, 5000, words).tolist()
    return [np.base_repr(each, 36).lower() for each in numbers]


def near(words: list[str], number: int, places: tuple[int, ...] = (50, 120)) -> list[str]:
    """With a word changed at each place; two of 200 leave a similarity of 186 / 206."""
    changed = [*words]
    for place in places:
        changed[place] = f"changed{number}"
    return changed


def planted() -> list[str]:
    """20 documents: exact copies but for case and punctuation, near ones, and half copies."""
    words = [text(number) for number in range(20)]
    words[3], words[7] = near(words[1], 3), near(words[13], 7)
    words[8], words[19] = near(words[17], 8), near(words[14], 19)
    words[9][:100] = words[2][:100]
    texts = [" ".join(each) for each in words]
    texts[5] = ", ".join(words[1]).upper() + "!"
    return texts

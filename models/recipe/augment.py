"""Imitates simple attempts to get a hateful text past a filter.

Casing, accents, full-width letters and invisible characters are not imitated, because the normaliser and the tokenizer
remove them before the network runs.
"""

import random

from vocabulary import HOMOGLYPHS

LOOKALIKES = {}
for glyph, letter in HOMOGLYPHS.items():
    LOOKALIKES.setdefault(letter, []).append(glyph)
LEET = {"a": "@4", "e": "3", "i": "1!", "o": "0", "s": "$5", "t": "7", "g": "9", "b": "8"}


def words(random, text, share, change):
    """Changes a share of the words that have at least three letters, and at least one word."""
    parts = text.split(" ")
    long = [n for n, part in enumerate(parts) if sum(map(str.isalpha, part)) >= 3]
    if not long:
        return text
    for n in random.sample(long, max(1, round(len(long) * share))):
        parts[n] = change(parts[n])
    return " ".join(parts)


def spaced(random, text):
    """Sets the letters of some words apart: `w o r d s`."""
    return words(random, text, 0.2, lambda word: random.choice([" ", " ", ".", "-", "_"]).join(word))


def elongated(random, text):
    """Repeats a letter of some words: `wooords`."""

    def change(word):
        at = random.randrange(len(word))
        return word[:at] + word[at] * random.randint(3, 6) + word[at + 1 :]

    return words(random, text, 0.3, change)


def replaced(table):
    """Returns a disguise that replaces letters of words by the alternatives in a table."""

    def disguise(random, text):
        def change(word):
            return "".join(
                random.choice(table[char]) if char in table and random.random() < 0.5 else char for char in word.lower()
            )

        return words(random, text, 0.4, change)

    return disguise


def misspelled(random, text):
    """Drops, doubles or masks a letter of some words, or swaps it with its neighbour."""

    def change(word):
        at = random.randrange(len(word) - 1)
        a, b = word[at], word[at + 1]
        return word[:at] + random.choice([b, b + a, a + a + b, f"{a}*"]) + word[at + 2 :]

    return words(random, text, 0.3, change)


def joined(random, text):
    """Leaves out some spaces."""
    return "".join("" if char == " " and random.random() < 0.3 else char for char in text)


DISGUISES = [spaced, elongated, replaced(LOOKALIKES), replaced(LEET), misspelled, misspelled, joined]


def disguise(seed, text):
    """Returns the text under a randomly chosen disguise."""
    chance = random.Random(seed)
    return chance.choice(DISGUISES)(chance, text)


def pad(seed, text, benign):
    """Returns the text among harmless sentences. Its label stays the same."""
    chance = random.Random(seed)
    before = [chance.choice(benign) for _ in range(chance.randint(0, 2))]
    after = [chance.choice(benign) for _ in range(chance.randint(0 if before else 1, 2))]
    return " ".join([*before, text, *after])

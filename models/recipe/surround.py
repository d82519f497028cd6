"""Hides texts among harmless words, as windows cut from a longer comment show them."""

import random

# The most words of a row, its text included: about 100 tokens. The daemon's windows are shorter.
MAX_WORDS = 70


class Harmless:
    """Harmless words in one long line of sentences, from which pieces are cut anywhere, also within a sentence."""

    def __init__(self, texts, seed):
        texts = sorted(texts)
        random.Random(seed).shuffle(texts)
        self.words = [word for text in texts for word in text.split()]

    def cut(self, chance, count):
        """Returns `count` words in a row, as text."""
        start = chance.randrange(len(self.words) - count)
        return " ".join(self.words[start : start + count])

    def window(self, seed):
        """Returns a piece of 8 to `MAX_WORDS` words."""
        chance = random.Random(seed)
        return self.cut(chance, chance.randint(8, MAX_WORDS))

    def around(self, seed, text):
        """Returns the text with 5 to 60 harmless words before it, after it, or on both sides. Its label stays."""
        chance = random.Random(seed)
        count = min(chance.randint(5, 60), MAX_WORDS - len(text.split()))
        if count < 2:
            return text
        before = chance.choice([0, count, chance.randint(1, count)])
        parts = [self.cut(chance, before)] if before else []
        parts.append(text)
        if count > before:
            parts.append(self.cut(chance, count - before))
        return " ".join(parts)

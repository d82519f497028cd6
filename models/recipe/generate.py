"""Draws labelled sentences from `hateful.py` and `harmless.py`, and splits templates into training and development.

    python generate.py [COUNT]

prints COUNT sentences of each part, as lines of part, label, kind and sentence.
"""

import hashlib
import random
import re
import sys

from harmless import EMOJI_HARMLESS, HARMLESS, KIND
from hateful import EMOJI_HATEFUL, HATEFUL, HOSTILE, HOSTILE_BY_CATEGORY
from targets import EMOJI, HELD_OUT, NAMES, OTHERS, TARGETS, THINGS
from words import WORDS

WORDS = WORDS | {
    "vote_like": "vote|marry|work|speak|have children|drive|teach|own a house|study|travel".split("|"),
    "a_decent": ["a good", "an honest", "a decent", "a clever", "a kind", "a harmless"],
    "suffer_bad": ["suffer", "die", "be hurt", "be beaten", "be insulted", "live in fear", "lose their rights"],
    "a_bad_bare": "idiot|moron|loser|clown|liar|coward|freak|piece of crap|scum|rat|pig".split("|"),
    "a_vermin_bare": ["rat", "pig", "dog", "monkey", "snake", "worm", "piece of dirt", "parasite", "beast"],
    "wrongly_one": ["is wrong", "should be ashamed", "is a bigot", "needs help", "makes me angry", "knows nothing"],
    "harm_mild": ["slap", "kick", "strangle", "murder", "punch", "beat", "destroy"],
    "mood_good": ["happy", "proud", "thrilled", "excited", "grateful"],
    "name": NAMES,
    "thing": THINGS,
}

# The share of templates that is not used for training.
DEVELOPMENT_SHARE = 0.12
SLOT = re.compile(r"\{(\w+)\}")
# Kinds of HOSTILE that are said of other groups as well, without being hate speech. Threats are not.
RUDE = ("emotion", "attribute", "dehumanise", "implied", "negated")


def held_out(template):
    """Says whether a template belongs to the development part. It depends only on the template."""
    return hashlib.sha256(template.encode()).digest()[0] < 256 * DEVELOPMENT_SHARE


def parse(kinds):
    """Returns (training templates, development templates) by kind."""
    out = {}
    for kind, text in kinds.items():
        lines = text.splitlines()
        out[kind] = [x for x in lines if not held_out(x)], [x for x in lines if held_out(x)]
    return out


def groups(development):
    """Returns (category, plural, singulars) of the targets of one part."""
    for category, text in TARGETS.items():
        for line in text.splitlines():
            plural, singulars = line.split("|")
            if (plural in HELD_OUT) == development:
                yield category, plural, singulars.split(",")


def article(noun):
    """Returns a noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" and not noun.startswith("euro") else "a ") + noun


class Grammar:
    """Draws sentences with their labels and kinds.

    `new_templates` and `new_targets` say whether to draw those that are not used for training.
    """

    def __init__(self, seed, new_templates=False, new_targets=False):
        self.random = random.Random(seed)
        part = 1 if new_templates else 0
        self.hostile = parse(HOSTILE)
        self.by_category = parse(HOSTILE_BY_CATEGORY)
        self.kind = parse(KIND)
        self.groups = {}
        for category, plural, singulars in groups(new_targets):
            self.groups.setdefault(category, []).append((plural, singulars))
        self.others = [line.split("|") for line in OTHERS.splitlines()]
        table = [(f"hostile: {k}", 1, v[part], 3) for k, v in self.hostile.items()]
        table += [(f"hateful: {k}", 1, v[part], 2) for k, v in parse(HATEFUL).items()]
        table += [("hostile: own", 1, None, 2)]
        table += [(f"kind: {k}", 0, v[part], 4) for k, v in self.kind.items()]
        table += [(f"harmless: {k}", 0, v[part], 1 if k == "reclaimed" else 3) for k, v in parse(HARMLESS).items()]
        emoji = parse({"hateful": EMOJI_HATEFUL, "harmless": EMOJI_HARMLESS})
        table += [("emoji: hateful", 1, emoji["hateful"][part], 3), ("emoji: harmless", 0, emoji["harmless"][part], 3)]
        # A kind whose templates are all in the other part is left out. Statements that fit one category are drawn
        # from their own lists, so they are in both parts only as fillers.
        self.table = [row for row in table if row[2] or (row[2] is None and not new_templates)]
        self.weights = [row[3] for row in self.table]

    def target(self, category=None):
        """Draws a group: its category, plural and one of its singulars."""
        category = category or self.random.choice(list(self.groups))
        plural, singulars = self.random.choice(self.groups[category])
        return category, plural, self.random.choice(singulars)

    def fill(self, template, target):
        """Fills the slots of a template, again and again until none is left."""
        category, plural, singular = target
        choose = self.random.choice

        def word(match):
            slot = match[1]
            if slot == "G":
                return plural
            if slot == "P":
                return singular
            if slot == "aP":
                return article(singular)
            if slot == "E":
                return choose(EMOJI[category])
            if slot == "hostile":
                return self.fill(self.statement(category), target)
            if slot == "kind":
                return self.fill(choose(self.kind[choose(list(self.kind))][0]), target)
            if slot == "kind_other":
                return self.fill(choose(self.kind[choose(["neutral", "positive"])][0]), self.target())
            if slot == "hostile_other":
                other = choose(self.others)
                return self.fill(choose(self.hostile[choose(RUDE)][0]), ("", *other))
            if slot in ("N", "N_one"):
                return choose(self.others)[slot == "N_one"]
            return choose(WORDS[slot])

        while SLOT.search(template):
            template = SLOT.sub(word, template)
        return template

    def statement(self, category):
        """Draws a hostile template of training that fits a category."""
        choose = self.random.choice
        own = self.by_category.get(category)
        if own and own[0] and self.random.random() < 0.15:
            return choose(own[0])
        return choose(self.hostile[choose(list(self.hostile))][0])

    def draw(self):
        """Draws (sentence, label, kind)."""
        kind, label, templates, _ = self.random.choices(self.table, self.weights)[0]
        if templates is None:
            category = self.random.choice([c for c in self.groups if self.by_category.get(c, ([],))[0]])
            target, template = self.target(category), self.random.choice(self.by_category[category][0])
        else:
            target, template = self.target(), self.random.choice(templates)
        return self.styled(self.fill(template, target)), label, kind

    def styled(self, text):
        """Varies punctuation, apostrophes and openings, none of which changes the label."""
        chance = self.random.random
        if chance() < 0.12:
            text = text.replace("'", "")
        if chance() < 0.06:
            text = re.sub(r"\byou\b", "u", re.sub(r"\bare\b", "r", text))
        if chance() < 0.12:
            openings = "lol|wow|well|ok|look|yeah|so|tbh|listen|man|@USER|today i say:".split("|")
            text = f"{self.random.choice(openings)} {text}"
        if text[-1] not in ".?!" and chance() < 0.5:
            text += self.random.choice([".", ".", ".", "!", "!!", " lol", "...", " tbh", " smh", ", believe me", "!!!"])
        return text


def main(count=40):
    for new_templates, new_targets in [(False, False), (True, False), (False, True)]:
        grammar = Grammar("show", new_templates, new_targets)
        part = f"{'new' if new_templates else 'known'} templates, {'new' if new_targets else 'known'} targets"
        for _ in range(int(count)):
            sentence, label, kind = grammar.draw()
            print(part, label, kind, sentence, sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])

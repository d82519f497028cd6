"""Measures what disguises of a text do to a model's judgement, and what the normaliser does to harmless texts.

    python attacks.py MODERATORD CORPORA [--model FOLDER] [--normalize nfc|full] [--markup html|markdown] [--rows N]

MODERATORD is the program, CORPORA the folder of the corpora (see README.md). A fixed sample of labelled development rows is
scored plain and under each disguise. For each disguise, the first table shows the ROC-AUC, the share of the plain AUC that
is kept, the recall at the model's review threshold, and its difference from the plain recall, with the rules `nfc` and
with all rules (`full`), or with one of them. The second table shows how many harmless texts all rules change for
the model, and how many of them are flagged only because of that.

Rows come from the development part of the corpora, which the recipe selects the model with. None is similar to a comment
of ETHOS.
"""

import argparse
import json
import os
import random
import subprocess

from corpora import lines, read

SOURCES = ("mhs", "hatexplain", "davidson", "implicithate", "mlma", "toxigen")
HARMLESS = (("surge", 0), ("goemotions", None), ("wikitalk_cat", 0), ("civil_toxic", 0))
HARMLESS_ROWS = 1500

LEET = dict(zip("aeiost", "431057", strict=True))
SIGNS = {"a": "@", "s": "$", "i": "!", "e": "3", "o": "0"}
CYRILLIC = dict(zip("aceijopsxyhdqw", "асеіјорѕхуһԁԛԝ", strict=True))
GREEK = dict(zip("aeiknoptuvwx", "αεικηορτυνωχ", strict=True))
SMALL_CAPITALS = dict(zip("abcdefghijklmnoprstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", strict=True))
RAISED = dict(zip("abcdefghijklmnoprstuvwxyz", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", strict=True))
EMOJI = "😀😂🔥👏💀🙏✨🤡"
MIRRORED = str.maketrans("()[]{}<>", ")(][}{><")


def replaced(table, share=1.0):
    """Returns a disguise that replaces letters by those of a table, each with a probability of `share`."""

    def disguise(chance, text):
        def swap(char):
            other = table.get(char.lower())
            return other if other and chance.random() < share else char

        return "".join(map(swap, text))

    return disguise


def shifted(small, capital=None):
    """Returns a disguise that moves letters to another alphabet, which begins at the code point `small`."""
    table = {chr(97 + n): chr(small + n) for n in range(26)}
    capitals = {chr(65 + n): chr((capital or small) + n) for n in range(26)}
    return lambda chance, text: "".join(table.get(char) or capitals.get(char) or char for char in text)


def letters_parted(separator):
    """Returns a disguise that puts a separator between all characters. Each character of a text may be chosen from."""
    return lambda chance, text: "".join(
        char + (chance.choice(separator) if n + 1 < len(text) else "") for n, char in enumerate(text)
    )


def words_parted(separator):
    """Returns a disguise that puts a separator between the letters of each word."""
    return lambda chance, text: " ".join(separator.join(word) for word in text.split())


def some_words_parted(chance, text):
    """Sets the letters of a third of the longer words apart."""
    return " ".join(
        " ".join(word) if len(word) > 3 and word.isalpha() and chance.random() < 1 / 3 else word for word in text.split()
    )


def between_words(separator):
    """Returns a disguise that puts another separator between words."""
    return lambda chance, text: separator.join(text.split())


def piled(chance, text):
    """Puts three to six marks on each letter."""
    marks = [chr(code) for code in range(0x300, 0x34F)]
    pile = lambda char: char + "".join(chance.choices(marks, k=chance.randint(3, 6))) if char.isalpha() else char
    return "".join(map(pile, text))


def marked(mark):
    """Returns a disguise that puts a mark on each letter."""
    return lambda chance, text: "".join(char + mark if char.isalpha() else char for char in text)


def overridden(chance, text):
    """Stores the text backwards under an override, so that it is shown as it was."""
    return "\u202e" + text[::-1].translate(MIRRORED) + "\u202c"


ATTACKS = {
    "spaces between all characters": letters_parted(" "),
    "spaces between letters, words run together": lambda chance, text: " ".join("".join(text.split())),
    "spaces between letters of some words": some_words_parted,
    "dots between letters": words_parted("."),
    "dashes between letters": words_parted("-"),
    "line breaks between letters": letters_parted("\n"),
    "emoji between letters": letters_parted(EMOJI),
    "U+2800 between letters": letters_parted("\u2800"),
    "zero-width between letters": letters_parted("\u200b"),
    "tabs between words": between_words("\t"),
    "line breaks between words": between_words("\n"),
    "U+1680 between words": between_words("\u1680"),
    "digits for half the letters": replaced(LEET, 0.5),
    "digits for all letters that have one": replaced(LEET),
    "signs for half the letters": replaced(SIGNS, 0.5),
    "Cyrillic look-alikes, half": replaced(CYRILLIC, 0.5),
    "Cyrillic look-alikes, all": replaced(CYRILLIC),
    "Greek look-alikes, all": replaced(GREEK),
    "small capitals": replaced(SMALL_CAPITALS),
    "raised letters": replaced(RAISED),
    "mathematical letters": shifted(0x1D41A, 0x1D400),
    "full width": shifted(0xFF41, 0xFF21),
    "circled letters": shifted(0x24D0, 0x24B6),
    "squared letters": shifted(0x1F170),
    "reversed under an override": overridden,
    "piled marks": piled,
    "struck through": marked("\u0336"),
}
MARKUP = {
    "entities": lambda chance, text: "".join(f"&#{ord(char)};" for char in text),
    "tags between letters": lambda chance, text: "".join(f"<b>{char}</b>" for char in text),
    "paragraphs between words": lambda chance, text: "".join(f"<p>{word}</p>" for word in text.split()),
}


def sample(folder, count):
    """Returns as many hateful as harmless development rows, the same ones every time."""
    rows = [row for row in read(folder) if row.development and row.corpus in SOURCES]
    rows.sort(key=lambda row: row.text)
    random.Random(17).shuffle(rows)
    texts = [[row.text for row in rows if row.label == label][:count] for label in (1, 0)]
    if min(map(len, texts)) < count:
        print(f"only {len(texts[0])} hateful and {len(texts[1])} harmless rows")
    return texts


def score(options, normalize, texts):
    """Returns the decisions of the program about texts."""
    environment = os.environ | {"MODERATORD__PROMPT__NORMALIZE": normalize, "MODERATORD__LOG__LEVEL": "error"}
    if options.markup:
        environment["MODERATORD__INPUT__MARKUP"] = options.markup
    command = [options.moderatord, "score", "--input", "-"]
    if options.model:
        command += ["--model", options.model]
    events = "\n".join(json.dumps({"text": text}) for text in texts)
    found = subprocess.run(command, input=events, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    decisions = [json.loads(line) for line in found.stdout.splitlines()]
    if len(decisions) != len(texts):
        raise SystemExit(f"{len(decisions)} decisions about {len(texts)} texts")
    return decisions


def is_flagged(decision):
    return decision["probability"] >= decision["thresholds"]["review"]


def auc(hateful, harmless):
    """Returns the ROC-AUC: the share of pairs that are in the right order, with ties as half a pair."""
    margins = sorted([(d["margin"], 1) for d in hateful] + [(d["margin"], 0) for d in harmless])
    ranks, start = 0.0, 0
    while start < len(margins):
        end = start
        while end < len(margins) and margins[end][0] == margins[start][0]:
            end += 1
        ranks += sum(label for _, label in margins[start:end]) * (start + end + 1) / 2
        start = end
    return (ranks - len(hateful) * (len(hateful) + 1) / 2) / (len(hateful) * len(harmless))


def measures(decisions, count):
    hateful, harmless = decisions[:count], decisions[count:]
    return auc(hateful, harmless), sum(map(is_flagged, hateful)) / len(hateful)


def attack_table(options, rules):
    hateful, harmless = sample(options.corpora, options.rows)
    attacks = {"plain": lambda chance, text: text} | ATTACKS | (MARKUP if options.markup else {})
    print(f"{len(hateful)} hateful and {len(harmless)} harmless development rows\n")
    columns = "".join(f"{rule:>10} AUC   kept  recall  diff." for rule in rules)
    print(f"{'disguise':<44}{columns}")
    plain = {}
    worst = dict.fromkeys(rules, (2.0, 2.0))
    for name, attack in attacks.items():
        chance = random.Random(name)
        texts = [attack(chance, text) for text in hateful + harmless]
        cells = ""
        for rule in rules:
            found, recall = measures(score(options, rule, texts), len(hateful))
            clean, clean_recall = plain.setdefault(rule, (found, recall))
            worst[rule] = (min(worst[rule][0], found / clean), min(worst[rule][1], recall - clean_recall))
            cells += f"{found:14.3f}{found / clean:7.3f}{recall:8.3f}{recall - clean_recall:+7.3f}"
        print(f"{name:<44}{cells}", flush=True)
    for rule, (kept, difference) in worst.items():
        print(f"{rule}: at least {kept:.3f} of the AUC kept, recall at worst {difference:+.3f}")


def harmless_table(options):
    print(f"\n{'harmless rows':<20}{'rows':>6}{'changed':>9}{'newly flagged':>15}{'no longer':>11}")
    for name, label in HARMLESS:
        texts = [line["text"] for line in lines(options.corpora, name) if line["label"] == label]
        random.Random(17).shuffle(texts)
        texts = texts[:HARMLESS_ROWS]
        pairs = list(zip(score(options, "nfc", texts), score(options, "full", texts), strict=True))
        changed = sum(before["margin"] != after["margin"] for before, after in pairs)
        newly = sum(is_flagged(after) and not is_flagged(before) for before, after in pairs)
        cleared = sum(is_flagged(before) and not is_flagged(after) for before, after in pairs)
        shares = f"{changed / len(texts):9.2%}{newly / len(texts):15.2%}{cleared / len(texts):11.2%}"
        print(f"{name:<20}{len(texts):>6}{shares}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("moderatord", help="the program")
    parser.add_argument("corpora", help="the folder of the corpora")
    parser.add_argument("--model", help="another model than the bundled one")
    parser.add_argument("--normalize", choices=["nfc", "full"], help="only these rules, and no second table")
    parser.add_argument("--markup", choices=["html", "markdown"], help="also disguise texts with markup, and decode it")
    parser.add_argument("--rows", type=int, default=400, help="rows of each label (default: 400)")
    options = parser.parse_args()
    attack_table(options, [options.normalize] if options.normalize else ["nfc", "full"])
    if not options.normalize:
        harmless_table(options)


if __name__ == "__main__":
    main()

"""Measures how many texts count as in the scope of an English model: of English corpora, which should, and of sentences in other languages.

    python languages.py MODERATORD CORPORA [--model FOLDER] [--rows N]

MODERATORD is the program, and CORPORA the folder of README.md. Without FOLDER, the bundled model is measured. The sentences are those of
`tests/fixtures/languages.jsonl`, which are our own.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from corpora import lines, normalize
from padding import Program

ENGLISH = ("goemotions", "surge", "hatexplain", "mhs", "davidson", "hatemojibuild", "wikitalk_cat")
COMPETENCES = ("in_scope", "unsure", "out_of_scope")
SENTENCES = Path(__file__).parent.parent.parent / "tests" / "fixtures" / "languages.jsonl"


def texts(corpora, count):
    """Returns the texts by the name of their corpus, of which there are at most so many each, or language."""
    groups = {}
    for name in ENGLISH:
        rows = [normalize(line["text"]).strip() for line in lines(corpora, name) if line["label"] != 1]
        groups[name] = random.Random(1).sample(rows, min(count, len(rows)))
    for line in SENTENCES.read_text().splitlines():
        sentence = json.loads(line)
        groups.setdefault(sentence["language"], []).append(sentence["text"])
    return groups


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("moderatord")
    parser.add_argument("corpora")
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    program = Program(arguments.moderatord, arguments.model)
    print(f"{'texts':<16}{'rows':>6}" + "".join(f"{name:>14}" for name in COMPETENCES))
    others = Counter()
    for name, group in texts(arguments.corpora, arguments.rows).items():
        found = Counter(decision.get("competence", "absent") for decision in program.score(group))
        if name not in (*ENGLISH, "en"):
            others += found
        print(f"{name:<16}{len(group):>6}" + "".join(f"{found[one] / len(group):>14.4f}" for one in COMPETENCES))
    total = sum(others.values())
    print(f"{'other languages':<16}{total:>6}" + "".join(f"{others[one] / total:>14.4f}" for one in COMPETENCES))


if __name__ == "__main__":
    main()

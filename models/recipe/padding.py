"""Measures whether harmless words hide a hateful comment, and whether length alone gets a comment flagged.

    python padding.py MODERATORD CORPORA [--model FOLDER] [--rows N]
    python padding.py MODERATORD CORPORA --fit [--model FOLDER]

MODERATORD is the program, and CORPORA the folder of README.md. Without FOLDER, the bundled model is measured.

The hateful rows are those of the development part. They are put behind or among harmless rows of Surge AI's sample, of
GoEmotions (those with friendly emotions only) and of Wikipedia talk pages (`wikitalk_cat`). Long harmless comments are several
such rows, and whole comments of `wikitalk_dixon`. Half of the harmless texts, chosen by their hash, are used by `--fit` and the other half
to measure, so no text is used for both.

`--fit` prints the correction for `moderatord.json`: for each number of windows, how much has to be subtracted from the largest margin so that
at most 3 % of harmless texts of that length reach the review threshold.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

from corpora import fraction, lines, normalize, read

FRIENDLY = {
    "admiration", "amusement", "approval", "caring", "excitement", "gratitude", "joy", "love", "optimism", "pride", "relief",
}  # fmt: skip
WORDS = (10, 50, 200, 2000)
LONG_COMMENTS = 60
# The share of harmless texts of any length that may be flagged after --fit.
TOLERATED = 0.03
# About the numbers of windows that --fit measures.
WINDOWS = (2, 4, 8, 16, 32, 64, 96)
# The texts per number of windows.
FIT_TEXTS = 200


class Program:
    """Scores texts with a binary, a model and settings."""

    def __init__(self, binary, model, settings=None):
        self.command = [binary, "score"] + (["--model", model] if model else [])
        self.environment = {**os.environ, "MODERATORD__LOG__LEVEL": "error", **(settings or {})}
        self.seconds = 0.0

    def score(self, texts):
        """Returns the decision about each text."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "texts.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            before = os.times()
            run = subprocess.run(
                [*self.command, "--input", path], env=self.environment, check=True, stdout=subprocess.PIPE, text=True
            )
            after = os.times()
            self.seconds += after.children_user - before.children_user + after.children_system - before.children_system
        decisions = [json.loads(line) for line in run.stdout.splitlines()]
        if len(decisions) != len(texts):
            raise SystemExit(f"{len(decisions)} decisions about {len(texts)} texts")
        return decisions


def harmless(corpora, for_fit):
    """Returns harmless rows by corpus, and long harmless comments, of one half of all texts."""
    rows, long = {}, []
    for name in ("surge", "goemotions", "wikitalk_cat", "wikitalk_dixon"):
        for line in lines(corpora, name):
            text = normalize(line["text"]).strip()
            if name == "goemotions":
                kept = set(re.findall(r"\w+", str(line["orig"]))) <= FRIENDLY
            else:
                kept = line["label"] == 0
            if not kept or (fraction(text) < 0.5) != for_fit:
                continue
            if name != "wikitalk_dixon":
                rows.setdefault(name, []).append(text)
            elif 300 <= len(text.split()) <= 2000:
                long.append(text)
    return rows, long


def words(text):
    """Returns the number of words of a text."""
    return len(text.split())


def some(rows, count, dice):
    """Returns harmless rows, of any corpus with equal probability, with at least so many words together."""
    names, parts, total = sorted(rows), [], 0
    while total < count:
        parts.append(dice.choice(rows[dice.choice(names)]))
        total += words(parts[-1])
    return parts


def padded(text, rows, count, place, dice):
    """Returns a text behind or among harmless rows."""
    parts = some(rows, count, dice)
    parts.insert(len(parts) if place == "after" else dice.randint(0, len(parts)), text)
    return " ".join(parts)


def long_comments(rows, long, count, dice):
    """Returns long harmless comments: a third are whole ones, the others consist of rows."""
    chosen = dice.sample(long, min(count // 3, len(long)))
    while len(chosen) < count:
        chosen.append(" ".join(some(rows, dice.randint(300, 2000), dice)))
    return chosen


def is_flagged(decision):
    """Returns whether the probability reaches the review threshold, whatever else would have the comment reviewed."""
    return decision["probability"] >= decision["thresholds"]["review"]


def share(decisions):
    """Returns the share of flagged decisions."""
    return sum(map(is_flagged, decisions)) / len(decisions)


def measure(arguments):
    """Prints the table."""
    dice = random.Random(1)
    program = Program(arguments.moderatord, arguments.model)
    hateful = [row.text for row in read(arguments.corpora) if row.development and row.label == 1]
    dice.shuffle(hateful)
    hateful = hateful[: arguments.rows]
    rows, long = harmless(arguments.corpora, for_fit=False)
    alone = program.score(hateful)
    kept = [text for text, decision in zip(hateful, alone, strict=True) if is_flagged(decision)]
    print(f"{len(hateful)} hateful rows of the development part, review threshold {alone[0]['thresholds']['review']}")
    print(f"{'harmless words':<22}{'recall':>10}{'after':>10}{'among':>10}   of those flagged alone{'':>4}windows")
    print(f"{'none':<22}{share(alone):>10.3f}")
    for count in WORDS:
        places = {}
        for place in ("after", "among"):
            texts = [padded(text, rows, count, place, dice) for text in hateful]
            places[place] = program.score(texts)
        both = places["after"] + places["among"]
        found = [decision for decisions in places.values() for text, decision in zip(hateful, decisions, strict=True) if text in set(kept)]
        windows = sum(decision["windows"] for decision in both) / len(both)
        print(
            f"{count:<22}{share(both):>10.3f}{share(places['after']):>10.3f}{share(places['among']):>10.3f}"
            f"{share(found) if found else math.nan:>12.3f}{windows:>25.1f}"
        )
    comments = long_comments(rows, long, LONG_COMMENTS, dice)
    decisions = program.score(comments)
    print(
        f"\nlong harmless comments flagged: {sum(map(is_flagged, decisions))} of {len(comments)}"
        f" ({sum(map(words, comments)) / len(comments):.0f} words, {sum(d['windows'] for d in decisions) / len(decisions):.1f} windows)"
    )
    print(f"reviewed because they have too many windows: {sum(d['action'] == 'review' and not is_flagged(d) for d in decisions)}")
    single = [text for texts in rows.values() for text in texts]
    print(f"single harmless rows flagged: {share(program.score(dice.sample(single, min(3000, len(single))))):.4f}")
    cpu(arguments, comments)


def cpu(arguments, comments):
    """Prints the CPU time of long comments relative to windows of 512 tokens, of which there are at most 8."""
    old = {"MODERATORD__PROMPT__MAX_WINDOW_TOKENS": "512", "MODERATORD__PROMPT__MAX_WINDOWS": "8"}
    programs = [Program(arguments.moderatord, arguments.model, settings) for settings in (None, old)]
    starts = [Program(arguments.moderatord, arguments.model, settings) for settings in (None, old)]
    ratios = []
    for _ in range(5):
        for program, start in zip(programs, starts, strict=True):
            program.seconds = start.seconds = 0.0
            start.score(["a fine day"])
            program.score(comments)
        new, before = (program.seconds - start.seconds for program, start in zip(programs, starts, strict=True))
        ratios.append(new / before)
    print(f"CPU time of the long comments relative to 8 windows of 512 tokens: {sorted(ratios)[2]:.2f} (median of 5 rounds)")


def fit(arguments):
    """Prints the correction, and the window that it was measured with."""
    dice = random.Random(2)
    program = Program(arguments.moderatord, arguments.model)
    rows, long = harmless(arguments.corpora, for_fit=True)
    defaults = Path(arguments.model or Path(__file__).parent.parent / "moderatord-mini") / "moderatord.json"
    window = json.loads(defaults.read_text())["window"] if defaults.exists() else {}
    # A quarter of the tokens of a window are those of its overlap, and English has 1.3 tokens for each word here.
    words_per_window = window.get("max_tokens", 512) * 0.75 / 1.3
    before = window.get("correction", [])
    points, least = [], 0.0
    for windows in WINDOWS:
        if windows > window.get("max_windows", 8):
            break
        count = int(words_per_window * windows)
        texts = [" ".join(some(rows, count, dice)) for _ in range(FIT_TEXTS)]
        decisions = program.score(texts)
        found = sorted(decision["windows"] for decision in decisions)[len(decisions) // 2]
        # What the program has subtracted is added again.
        margins = sorted((d["margin"] + correction(before, d["windows"]) - threshold(d) for d in decisions), reverse=True)
        margin = max(least, margins[int(TOLERATED * len(margins))])
        least = margin
        points.append({"windows": found, "margin": round(margin, 2)})
        flagged = sum(value >= 0 for value in margins) / len(margins)
        print(f"{found:>4} windows: {flagged:.3f} flagged without a correction, margin {margin:.2f}")
    whole = [d["margin"] + correction(before, d["windows"]) - correction(points, d["windows"]) - threshold(d) for d in program.score(long)]
    print(f"whole long comments flagged with it: {sum(value >= 0 for value in whole)} of {len(whole)}")
    print(json.dumps({"max_tokens": window.get("max_tokens", 512), "max_windows": window.get("max_windows", 8), "correction": points}, indent=1))


def correction(points, windows):
    """Returns what moderatord subtracts from the largest margin of so many windows (`config/windows`)."""
    before = (1, 0.0)
    for point in points:
        here = (point["windows"], point["margin"])
        if windows <= here[0]:
            way = (math.log2(max(windows, 1)) - math.log2(before[0])) / (math.log2(here[0]) - math.log2(before[0]))
            return before[1] + way * (here[1] - before[1])
        before = here
    return before[1]


def threshold(decision):
    """Returns the margin at which the probability is the review threshold, from the slope of a calibrated margin."""
    review = decision["thresholds"]["review"]
    if decision["model"]["calibration"] != "identity":
        raise SystemExit("--fit needs a model without a calibration, because it measures margins")
    return math.log(review / (1 - review))


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("moderatord")
    parser.add_argument("corpora")
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    (fit if arguments.fit else measure)(arguments)


if __name__ == "__main__":
    main()

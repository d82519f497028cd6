"""Measures a classifier on a suite of functional tests, as HateCheck and HatemojiCheck are published.

    python functional.py MODERATORD SUITE.csv [OPTION...]

SUITE.csv has the columns `functionality`, `test_case` (or `text`), `label_gold` ("hateful" and "non-hateful", or 1 and
0) and, if the suite has one, `target_ident`. The script prints the accuracy at a probability of 0.5 and the ROC-AUC,
the accuracy if everything were called hateful, and the accuracy for each functionality and each target. The options
are passed to `moderatord score`.
"""

import collections
import csv
import json
import subprocess
import sys

from sklearn.metrics import roc_auc_score

LABELS = {"hateful": 1, "non-hateful": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def read(path):
    """Returns the rows of the suite as (functionality, target, text, label)."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    out = []
    for number, row in enumerate(rows, 2):
        text = row.get("test_case") or row.get("text")
        if not text or row.get("label_gold") not in LABELS:
            raise SystemExit(
                f"{path}, row {number}: expected a test_case and a label_gold of {', '.join(LABELS)}, "
                f"found {text!r} and {row.get('label_gold')!r}"
            )
        out.append((row.get("functionality") or "-", row.get("target_ident") or "-", text, LABELS[row["label_gold"]]))
    return out


def probabilities(moderatord, texts, *options):
    """Returns the probability of each text, as `moderatord score` prints it."""
    events = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    scored = subprocess.run(
        [moderatord, "score", "--input", "-", *options], input=events, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line)["probability"] for line in scored.stdout.splitlines()]


def main(moderatord, path, *options):
    rows = read(path)
    scores = probabilities(moderatord, [row[2] for row in rows], *options)
    truth = [row[3] for row in rows]
    right = [(score >= 0.5) == bool(label) for score, label in zip(scores, truth, strict=True)]
    print(f"{len(rows)} cases: accuracy {sum(right) / len(rows):.3f}, ROC-AUC {roc_auc_score(truth, scores):.3f}")
    print(f"always hateful: accuracy {sum(truth) / len(rows):.3f}")
    for name, column in [("functionality", 0), ("target", 1)]:
        parts = collections.defaultdict(list)
        for row, correct in zip(rows, right, strict=True):
            # The label is shown for a functionality, because each is a test of one label.
            parts[row[column], "hateful" if row[3] else "not hateful"].append(correct)
        print(f"\n{name:<40}{'label':<14}{'cases':>6}{'accuracy':>10}")
        for (part, label), correct in parts.items():
            print(f"{part:<40}{label:<14}{len(correct):>6}{sum(correct) / len(correct):>10.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

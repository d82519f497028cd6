#!/usr/bin/env python3
"""Compares the probabilities of the bundled model over 8-bit weights with those in f32.

    int8_accuracy.py MODERATORD CORPUS.jsonl...

MODERATORD is the program. Each line of a corpus is an object with `text` and `label` (1 or 0; other lines are skipped).
Of more than 6,000 lines, every n-th is taken. Prints the 99th percentile and the maximum of the differences, and the
ROC-AUC of both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_ROWS = 6000


def probabilities(program, quantize, rows, folder):
    config, comments = Path(folder, "config.toml"), Path(folder, "comments.jsonl")
    config.write_text(f'[model]\nquantize = "{quantize}"\n', encoding="utf-8")
    comments.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows), encoding="utf-8")
    command = [program, "score", "--config", config, "--input", comments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line)["probability"] for line in output.splitlines()]


def auc(labels, scores):
    """Returns the area under the ROC curve, from the ranks of the scores (ties share their mean rank)."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks, start = [0.0] * len(scores), 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end + 1) / 2
        start = end
    positives = sum(labels)
    rank_sum = sum(rank for rank, label in zip(ranks, labels) if label)
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def read(corpus):
    """Returns the labelled rows of a corpus, or a part of them if there are many."""
    with corpus.open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["label"] in (0, 1)]
    return rows[:: len(rows) // MAX_ROWS + 1] if len(rows) > MAX_ROWS else rows


def main():
    program, *corpora = sys.argv[1:]
    for corpus in map(Path, corpora):
        rows = read(corpus)
        labels = [row["label"] for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            exact, int8 = (probabilities(program, quantize, rows, folder) for quantize in ("none", "int8"))
        differences = sorted(abs(a - b) for a, b in zip(exact, int8, strict=True))
        print(
            f"{corpus.name}: {len(rows)} rows, p99 {differences[int(len(rows) * 0.99)]:.4f}, max {differences[-1]:.4f}, "
            f"AUC {auc(labels, exact):.4f} in f32 and {auc(labels, int8):.4f} in int8"
        )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares the probabilities of the bundled model over 8-bit weights, or on a GPU, with those in f32 on the CPU.

    quantised_accuracy.py MODERATORD [--device cpu|cuda:N] [--quantize none|int8|fp8]... CORPUS.jsonl...

MODERATORD is the program; int8 on the CPU is the default. Each line of a corpus is an object with `text` and `label` (1 or
0; other lines are skipped). Of more than 6,000 lines, every n-th is taken. Prints the 99th percentile and the maximum of
the differences, and the ROC-AUC of both.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

MAX_ROWS = 6000


def probabilities(program, device, quantize, rows, folder):
    config, comments = Path(folder, "config.toml"), Path(folder, "comments.jsonl")
    config.write_text(f'[model]\ndevice = "{device}"\nquantize = "{quantize}"\n', encoding="utf-8")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantize", action="append", choices=("none", "int8", "fp8"))
    arguments = parser.parse_args()
    for corpus in arguments.corpora:
        rows = read(corpus)
        labels = [row["label"] for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            exact = probabilities(arguments.program, "cpu", "none", rows, folder)
            print(f"{corpus.name}: {len(rows)} rows, AUC {auc(labels, exact):.4f} in f32")
            for quantize in arguments.quantize or ["int8"]:
                found = probabilities(arguments.program, arguments.device, quantize, rows, folder)
                differences = sorted(abs(a - b) for a, b in zip(exact, found, strict=True))
                print(
                    f"    quantize {quantize} on {arguments.device}: p99 {differences[int(len(rows) * 0.99)]:.4f}, "
                    f"max {differences[-1]:.4f}, AUC {auc(labels, found):.4f}"
                )


if __name__ == "__main__":
    main()

"""Measures the thresholds that `moderatord retrain` derives from 200, 800 and 5,000 labelled rows, on held-out rows.

    python thresholds.py MODERATORD CORPORA [ROWS ...]

MODERATORD is the path of the binary, and CORPORA the folder that README.md describes. The rows are a mix of the labelled
corpora, and 2,000 others are held out. Most of them were used to train the bundled model, so precision and recall are
higher than on comments of your own; what the table shows is how close they come to their targets (0.95 and 0.9) and to
the intervals that `retrain` states. Each number of rows is drawn three times (5,000 once), in a registry of its own.
"""

import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CORPORA = ["mhs", "hatexplain", "foxnews", "davidson", "hatemojibuild", "implicithate", "toxigen", "civil_toxic"]
# The largest number of rows from one corpus, so that none of them dominates.
MOST = 1500
HELD_OUT = 2000
SETTINGS = """
[registry]
url = "file://{registry}"
[retrain]
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
learning_rate = 3e-3
epochs = 4
min_rows = 50
seed = {seed}
"""


def read(folder):
    rows = []
    for name in CORPORA:
        lines = (json.loads(line) for line in open(folder / f"{name}.jsonl"))
        labelled = [line for line in lines if line["label"] in (0, 1)]
        random.Random(1).shuffle(labelled)
        rows += [{"text": row["text"], "label": ["ok", "hateful"][row["label"]]} for row in labelled[:MOST]]
    random.Random(2).shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(moderatord, *arguments):
    result = subprocess.run([moderatord, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"moderatord {arguments[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def probability(margin, calibration):
    if calibration != "identity":
        margin = calibration["platt"]["slope"] * margin + calibration["platt"]["intercept"]
    return 1 / (1 + math.exp(-margin))


def measure(threshold, probabilities, hateful):
    above = [label for value, label in zip(probabilities, hateful) if value >= threshold]
    precision = sum(above) / len(above) if above else math.nan
    return precision, sum(above) / sum(hateful), len(above) / len(hateful)


def interval(figures, name):
    bounds = (figures or {}).get(name)
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "-"


def retrain(moderatord, folder, rows, held_out, seed):
    """Returns the lines of the table for one retraining."""
    registry = folder / f"registry-{len(rows)}-{seed}"
    registry.mkdir()
    settings = folder / "moderatord.toml"
    settings.write_text(SETTINGS.format(registry=registry, seed=seed))
    labelled = folder / "labelled.jsonl"
    write(labelled, rows)
    output = run(moderatord, "retrain", "--config", settings, "--input", labelled, "--no-promote")
    version = next(line.split()[1] for line in output.splitlines() if line.startswith("version"))
    manifest = json.loads(run(moderatord, "adapters", "--config", settings, "show", version))
    # The daemon would serve the version from the registry; scoring it as a folder gives the same margins.
    scored = run(moderatord, "score", "--adapter", registry / "versions" / version, "--input", held_out[0])
    margins = [json.loads(line)["margin"] for line in scored.splitlines()]
    probabilities = [probability(margin, manifest["calibration"]) for margin in margins]
    hateful = held_out[1]
    loss = -sum(math.log(max(p if label else 1 - p, 1e-12)) for p, label in zip(probabilities, hateful)) / len(hateful)
    for kind in ("block", "review"):
        threshold = manifest["thresholds"][kind]
        outcome = manifest.get("threshold_derivation", {}).get(kind, {})
        start = f"| {len(rows)} | {seed} | {loss:.3f} | {kind} |"
        if threshold is None:
            print(f"{start} none | | | | | |", flush=True)
            continue
        precision, recall, share = measure(threshold, probabilities, hateful)
        precision = f"{precision:.3f}" if share > 0 else "-"
        remark = "provisional" if outcome.get("provisional") else ""
        figures = outcome.get("figures")
        print(
            f"{start} {threshold:.3f} {remark} | {precision} | {interval(figures, 'precision_interval')} | "
            f"{recall:.3f} | {interval(figures, 'recall_interval')} | {share:.3f} |",
            flush=True,
        )


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    moderatord, corpora = sys.argv[1], Path(sys.argv[2])
    counts = [int(count) for count in sys.argv[3:]] or [200, 800, 5000]
    rows = read(corpora)
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    hateful = [int(row["label"] == "hateful") for row in held_out]
    print(f"{HELD_OUT} held-out rows, {sum(hateful)} of them hateful\n")
    print("| rows | draw | log-loss | threshold | value | precision | stated | recall | stated | share |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = folder / "held-out.jsonl"
        write(path, [{"text": row["text"]} for row in held_out])
        for count in counts:
            for seed in range(1, 4 if count < 5000 else 2):
                drawn = random.Random(seed).sample(rest, count)
                retrain(moderatord, folder, drawn, (path, hateful), seed)


main()

#!/usr/bin/env python3
"""Checks that transformers and moderatord compute the same probabilities with the bundled model, in f32.

    same_probabilities.py [--moderatord BINARY] [--model FOLDER] [--input TEXTS.jsonl]

Needs a recent version of torch and transformers (see models/recipe/requirements.txt). Each line of TEXTS.jsonl is an
object with `text`. By default, the script uses its own sentences and target/release/moderatord.
Exit code: 0 all probabilities agree within 1e-4, 1 some differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models/recipe"))
from corpora import normalize  # noqa: E402
from frame import HEAD, TAIL  # noqa: E402

TOLERANCE = 1e-4
TEXTS = [
    "you look very nice today",
    "See you at the garden on Sunday?",
    "Immigrants are ruining our town, every one of them should be sent away.",
    "THIS IS SHOUTED, in part!",
    "Ünïcode, 🎉 and ｆｕｌｌ-width letters",
    "42",
    "a long walk along the river " * 40,
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--moderatord", type=Path, default=ROOT / "target/release/moderatord")
    parser.add_argument("--model", type=Path, default=ROOT / "models/moderatord-mini")
    parser.add_argument("--input", type=Path)
    settings = parser.parse_args()
    texts = TEXTS
    if settings.input:
        with open(settings.input, encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
    events = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    scored = subprocess.run(
        [settings.moderatord, "score", "--model", settings.model, "--input", "-"],
        input=events, capture_output=True, text=True, check=True,
        # The rules that `corpora.normalize` imitates.
        env=os.environ | {"MODERATORD__PROMPT__NORMALIZE": "nfc"},
    )  # fmt: skip
    decisions = [json.loads(line) for line in scored.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    hateful, other = (tokenizer.convert_tokens_to_ids(label) for label in ("Negative", "Positive"))
    worst = 0.0
    for number, (text, decision) in enumerate(zip(texts, decisions, strict=True)):
        if decision["windows"] != 1:
            print(f"text {number}: not compared, because it has {decision['windows']} windows")
            continue
        ids = tokenizer(f"{HEAD}{normalize(text)}{TAIL}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids, logits_to_keep=1).logits[0, -1]
        theirs = torch.softmax(logits[[hateful, other]], 0)[0].item()
        worst = max(worst, abs(theirs - decision["score"]))
        if not settings.input:
            print(f"{theirs:.6f}  {decision['score']:.6f}  {text[:60]}")
    print(f"{len(texts)} texts, largest difference between probabilities {worst:.1e}, allowed {TOLERANCE:.0e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

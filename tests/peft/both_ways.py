"""Checks that PEFT and moderatord compute the same margins with each other's adapters. Run it through `both_ways`.

On each checkpoint, for q and v and for all seven linear layers with rslora:

    retrain -> PEFT   `moderatord retrain` writes an adapter and PEFT loads it
    PEFT -> score     PEFT writes an adapter with random A and B and `moderatord score --adapter` loads it

Both then score the same texts in f32. The script prints the largest difference between their margins, logit(Negative) -
logit(Positive) at the last position, and compares it with TOLERANCE. It also prints the smallest and largest shift of a
margin that the adapter causes. An adapter that shifts no margin by more than LEAST_SHIFT would prove nothing, so it
counts as a failure. The base without an adapter is compared first, so that a difference between the bases is not taken
for a difference between the adapters. The frame is written out here instead of being read from moderatord. A new
registry draws its own split, so retrained adapters differ from run to run; everything else is the same.

Writes only to its temporary folder. Exit code: 0 all margins agree, 1 some margins differ or a step failed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

# Prevents downloads: an adapter's config names a base that is not on the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

TOLERANCE = 1e-4
# The smallest value of the largest shift of a margin with which an adapter still proves something.
LEAST_SHIFT = 100 * TOLERANCE

FRAME = (
    "Classify the following text into one of the following classes:[Positive,Negative]"
    "<separator>Text:{comment}<separator>Prediction:"
)

TEXTS = [
    "",
    "see you at the garden",
    "Rain, rain, rain: the river is over the bridge again!",
    "tea or coffee? 3 cups, please",
    "Grüße aus dem Café am Fluß 🌻",
    "the train to the village leaves in the morning and comes back in the evening " * 6,
]

TARGETS = {
    "q, v": (["q_proj", "v_proj"], False),
    "all seven, rslora": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        True,
    ),
}

WORDS = (
    "garden river house train captain soup street bread window friend morning evening letter music bridge market "
    "apple tea coffee table chair forest mountain lake boat ship island summer winter flower tree grass stone road"
).split()


def labelled(rows):
    """Yields lines of feedback with a rule that a few hundred rows can teach: texts about rain are "hateful"."""
    draw = random.Random(1)
    for number in range(rows):
        words = draw.choices(WORDS, k=draw.randint(6, 11))
        rain = number % 2 == 0
        words.insert(draw.randrange(len(words)), "rain rain rain" if rain else "sunny")
        yield json.dumps({"text": " ".join(words), "label": "hateful" if rain else "ok"})


class Moderatord:
    """Runs the moderatord binary."""

    def __init__(self, binary):
        self.binary = binary
        # Ignores the caller's settings, and turns off the normaliser, which PEFT does not have.
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MODERATORD__")}
        self.env["MODERATORD__PROMPT__NORMALIZE"] = "false"

    def run(self, *arguments, stdin=None):
        done = subprocess.run(
            [self.binary, *map(str, arguments)], env=self.env, input=stdin, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"moderatord {arguments[0]} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def margins(self, model, adapter=None):
        events = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        adapter = ["--adapter", "" if adapter is None else adapter]
        lines = self.run("score", "--model", model, *adapter, "--input", "-", stdin=events).splitlines()
        decisions = [json.loads(line) for line in lines]
        if len(decisions) != len(TEXTS):
            sys.exit(f"moderatord score printed {len(decisions)} decisions for {len(TEXTS)} texts")
        for decision in decisions:
            if decision["model"]["dtype"] != "f32" or decision["windows"] != 1:
                sys.exit(f"expected f32 and one window, got {decision['model']} and {decision['windows']} windows")
        return torch.tensor([decision["margin"] for decision in decisions], dtype=torch.float64)

    def retrain(self, folder, model, targets, rslora):
        """Retrains in `folder` and returns the folder of the adapter that was published."""
        (folder / "registry").mkdir(parents=True)
        (folder / "labels.jsonl").write_text("".join(line + "\n" for line in labelled(400)))
        (folder / "moderatord.toml").write_text(
            f'[model]\npath = "{model}"\n[registry]\nurl = "file://{folder}/registry"\n'
            f"[retrain]\nlearning_rate = 0.01\nepochs = 3\ntargets = {json.dumps(targets)}\n"
            f"rslora = {json.dumps(rslora)}\n"
        )
        self.run("retrain", "--config", folder / "moderatord.toml", "--input", folder / "labels.jsonl")
        (version,) = (folder / "registry" / "versions").iterdir()
        return version


class Reference:
    """Computes margins of a checkpoint with transformers."""

    def __init__(self, path):
        self.path = path
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.labels = [self.tokenizer.token_to_id(label) for label in ("Positive", "Negative")]
        self.bos = self.tokenizer.token_to_id("<bos>")

    def base(self):
        # Eager attention computes the plain formula, including Gemma 2's soft-capping.
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def margins(self, model):
        found = []
        for text in TEXTS:
            ids = self.tokenizer.encode(FRAME.format(comment=text), add_special_tokens=False).ids
            logits = model(input_ids=torch.tensor([[self.bos, *ids]])).logits[0, -1].double()
            positive, negative = self.labels
            found.append(logits[negative] - logits[positive])
        return torch.stack(found)

    def load(self, adapter):
        """Loads an adapter of ours with PEFT and checks that every tensor of the file was loaded."""
        model = PeftModel.from_pretrained(self.base(), adapter).eval()
        written = load_file(adapter / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model)
        if written.keys() != loaded.keys():
            sys.exit(f"PEFT loaded other tensors than were written: {sorted(written.keys() ^ loaded.keys())}")
        for name, tensor in written.items():
            if not torch.equal(tensor, loaded[name]):
                sys.exit(f"PEFT loaded `{name}` with other values than were written")
        return model

    def write(self, folder, targets, rslora):
        """Creates PEFT's model with a random adapter and also saves the adapter to `folder`."""
        torch.manual_seed(7)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
        model = get_peft_model(self.base(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.05)
        model.save_pretrained(folder)
        return model


class Table:
    """Prints one line per comparison and records whether any of them failed."""

    def __init__(self):
        self.failed = False

    def add(self, family, way, targets, expected, found, base=None):
        difference = (expected - found).abs().max().item()
        shifts = None if base is None else (expected - base).abs()
        # Written so that NaN counts as a failure.
        good = difference <= TOLERANCE and (shifts is None or shifts.max().item() >= LEAST_SHIFT)
        self.failed |= not good
        shift = "" if shifts is None else f"shifts {shifts.min():.3f} to {shifts.max():.3f}"
        row = f"{family:<8} {way:<16} {targets:<18} {difference:.2e}  {'ok' if good else 'FAILED':<6}  {shift}"
        print(row.rstrip(), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--moderatord", required=True)
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("families", nargs="*", default=["gemma", "gemma2", "gemma3"])
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    moderatord = Moderatord(arguments.moderatord)
    table = Table()
    with tempfile.TemporaryDirectory() as temporary:
        for family in arguments.families:
            folder = Path(temporary) / family
            reference = Reference(arguments.fixtures / family)
            base = reference.margins(reference.base())
            table.add(family, "base", "none", base, moderatord.margins(reference.path))
            for number, (title, (targets, rslora)) in enumerate(TARGETS.items()):
                ours = moderatord.retrain(folder / f"retrain{number}", reference.path, targets, rslora)
                expected = reference.margins(reference.load(ours))
                table.add(family, "retrain -> PEFT", title, expected, moderatord.margins(reference.path, ours), base)

                theirs = folder / f"peft{number}"
                expected = reference.margins(reference.write(theirs, targets, rslora))
                table.add(family, "PEFT -> score", title, expected, moderatord.margins(reference.path, theirs), base)
    print(f"{len(TEXTS)} texts each, f32, tolerance {TOLERANCE:.0e}: {'FAILED' if table.failed else 'all agree'}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())

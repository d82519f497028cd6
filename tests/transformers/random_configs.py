"""Compares moderatord with transformers on random valid configurations. Run it through `random_configs`.

Each round draws a family, sizes, windows, ropes, caps and ties, and sometimes a classification head; fills the model with
random weights; and saves it with transformers. Half of the time, `config.json` is then rewritten to the form of older
checkpoints and without keys that have their defaults. transformers reads the final files, and its margins are compared
with those of `moderatord score` in f32. The largest margin must be large enough for the comparison to mean something.

Writes only to its temporary folder. Exit code: 0 all margins agree, 1 some margins differ or a step failed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
)
from transformers.utils import logging

# Relative to the largest margin, and at least this much in absolute terms.
TOLERANCE = 3e-5
LEAST_MARGIN = 0.01

FRAME = (
    "Classify the following text into one of the following classes:[Positive,Negative]"
    "<separator>Text:{comment}<separator>Prediction:"
)
TEXTS = [
    "see you at the garden",
    "Rain, rain, rain: the river is over the bridge again!",
    "the train to the village leaves in the morning and comes back in the evening " * 4,
]
CLASSES = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}


def draw_text_config(draw, family):
    """Returns keyword arguments for the config of a text decoder."""
    heads = draw.choice([1, 2, 4])
    layers = draw.randint(1, 7)
    config = {
        "vocab_size": 1024,
        "hidden_size": draw.choice([32, 64]),
        "intermediate_size": draw.choice([48, 96]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "head_dim": draw.choice([16, 32]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "max_position_embeddings": draw.choice([1024, 4096]),
        "tie_word_embeddings": draw.random() < 0.7,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    linear = {"rope_type": "linear", "factor": draw.choice([2.0, 8.0])}
    if family != "gemma":
        config["sliding_window"] = draw.choice([3, 16, 64])
        config["query_pre_attn_scalar"] = draw.choice([16, 24, 256])
        config["final_logit_softcapping"] = draw.choice([None, 2.0, 30.0])
        config["attn_logit_softcapping"] = draw.choice([None, 4.0, 50.0])
        if draw.random() < 0.4:
            config["layer_types"] = [draw.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]
        elif family == "gemma3_text" and draw.random() < 0.5:
            config["sliding_window_pattern"] = draw.choice([2, 3])
    if family == "gemma3_text":
        config["rope_parameters"] = {
            "full_attention": {"rope_theta": draw.choice([1e6, 1e4, 3e5]), **draw.choice([{"rope_type": "default"}, linear])},
            "sliding_attention": {"rope_theta": draw.choice([1e4, 777.0]), "rope_type": "default"},
        }
    else:
        config["rope_parameters"] = {
            "rope_theta": draw.choice([1e4, 5e5]),
            **draw.choice([{"rope_type": "default"}, linear]),
        }
    return config


def rewrite(draw, config, family):
    """Returns a config in the form of older files, without keys that have their defaults."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if rope is not None and draw.random() < 0.7:
        del config["rope_parameters"]
        if family == "gemma3_text":
            full, sliding = rope["full_attention"], rope["sliding_attention"]
            config["rope_theta"], config["rope_local_base_freq"] = full["rope_theta"], sliding["rope_theta"]
        else:
            full = rope
            config["rope_theta"] = full["rope_theta"]
        if full["rope_type"] != "default":
            config["rope_scaling"] = {"rope_type": full["rope_type"], "factor": full["factor"]}
            if draw.random() < 0.5:
                config["rope_scaling"]["type"] = full["rope_type"]
    defaults = CLASSES[family]().to_dict()
    for key in list(config):
        if key in defaults and config[key] == defaults[key] and key != "model_type" and draw.random() < 0.8:
            del config[key]
    if draw.random() < 0.3:
        config.pop("architectures", None)
    return config


def build(draw, folder):
    """Saves a random model to `folder`, and returns its description and whether it has a head."""
    family = draw.choice(["gemma", "gemma2", "gemma3_text", "gemma3"])
    text_family = "gemma3_text" if family == "gemma3" else family
    arguments = draw_text_config(draw, text_family)
    has_head = family != "gemma3" and draw.random() < 0.3
    if family == "gemma3":
        tie = arguments.pop("tie_word_embeddings")
        vision = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
        }
        config = Gemma3Config(
            text_config=Gemma3TextConfig(**arguments), vision_config=vision, tie_word_embeddings=tie,
            mm_tokens_per_image=1,
        )
        model = AutoModelForImageTextToText.from_config(config)
    elif has_head:
        labels = draw.choice([["ok", "hateful"], ["hateful", "ok"], None, ["one"]])
        named = {} if labels is None else {"id2label": dict(enumerate(labels))}
        config = CLASSES[family](**arguments, **named)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(CLASSES[family](**arguments))
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    rewritten = draw.random() < 0.5
    if rewritten:
        if family == "gemma3":
            saved["text_config"] = rewrite(draw, saved["text_config"], text_family)
        else:
            heads = saved["architectures"]
            saved = rewrite(draw, saved, text_family)
            # Without this, nothing says that the model has a head.
            if has_head:
                saved["architectures"] = heads
        path.write_text(json.dumps(saved))
    return f"{family}{' head' if has_head else ''}{' rewritten' if rewritten else ''}", family, has_head


@torch.no_grad()
def margins(folder, family, has_head, tokenizer):
    """Returns the margins that transformers computes from the files."""
    loader = {
        True: AutoModelForSequenceClassification,
        False: AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM,
    }[has_head]
    # Eager attention computes the plain formula, including Gemma 2's soft-capping.
    model = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    positive, negative, bos = (tokenizer.token_to_id(name) for name in ("Positive", "Negative", "<bos>"))
    found = []
    for text in TEXTS:
        prompt = text if has_head else FRAME.format(comment=text)
        ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        logits = model(input_ids=torch.tensor([ids])).logits.double()
        if not has_head:
            found.append(logits[0, -1, negative] - logits[0, -1, positive])
            continue
        logits = logits[0]
        if len(logits) == 1:
            found.append(logits[0])
        else:
            hateful = 0 if model.config.id2label[0] == "hateful" else 1
            found.append(logits[hateful] - logits[1 - hateful])
    return torch.stack(found)


def scored(binary, folder, adapter=""):
    """Returns the margins of `moderatord score`, or its error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MODERATORD__")}
    env["MODERATORD__PROMPT__NORMALIZE"] = "false"
    events = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    command = [binary, "score", "--model", str(folder), "--adapter", str(adapter), "--input", "-"]
    done = subprocess.run(command, env=env, input=events, capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip()
    return torch.tensor([json.loads(line)["margin"] for line in done.stdout.splitlines()]).double(), None


def read_arguments():
    """Returns the arguments of a comparison, and silences transformers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moderatord", required=True)
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    parser.add_argument("count", nargs="?", type=int, default=40)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return arguments


def main():
    arguments = read_arguments()
    source = arguments.fixtures / "gemma3" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(source))
    failed, worst = 0, 0.0
    for number in range(arguments.count):
        draw = random.Random(f"{arguments.seed}/{number}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            what, family, has_head = build(draw, folder)
            shutil.copy(source, folder / "tokenizer.json")
            expected = margins(folder, family, has_head, tokenizer)
            found, error = scored(arguments.moderatord, folder)
            if error is not None:
                print(f"{number:3} {what:<24} FAILED\n{error}\n{(folder / 'config.json').read_text()}")
                failed += 1
                continue
            largest = expected.abs().max().item()
            difference = (found - expected).abs().max().item() / max(largest, 1.0)
            # Written so that NaN counts as a failure.
            good = difference <= TOLERANCE and largest >= LEAST_MARGIN
            print(f"{number:3} {what:<24} margins up to {largest:8.3f}, difference {difference:.1e} {'ok' if good else 'FAILED'}",
                  flush=True)
            if good:
                worst = max(worst, difference)
            else:
                failed += 1
                print((folder / "config.json").read_text())
    print(f"seed {arguments.seed}: {arguments.count} configurations, {failed} failed, largest difference {worst:.1e}, "
          f"tolerance {TOLERANCE:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

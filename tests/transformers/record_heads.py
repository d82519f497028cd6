"""Writes tests/fixtures/gemma3/seq_cls: a PEFT adapter for SEQ_CLS with random weights on the Gemma 3 fixture, and the
logits that transformers and PEFT compute with it. Run it with the Python environment of `tests/peft/both_ways`:

    target/peft/venv-*/bin/python tests/transformers/record_heads.py tests/fixtures/gemma3

`base` are the logits of `Gemma3TextForSequenceClassification` with the adapter's `score.weight` and without its deltas;
`adapter` are those with both.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

TEXTS = ["", "see you at the garden", "rain, rain, rain: the river is over the bridge again!", "a b c " * 40]

base = Path(sys.argv[1])
folder = base / "seq_cls"
tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
torch.manual_seed(11)
model = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=2, dtype=torch.float32, attn_implementation="eager"
)
with torch.no_grad():
    model.score.weight.normal_(0.0, 0.1)


@torch.no_grad()
def logits(model):
    model.eval()
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    return [model(input_ids=torch.tensor([row])).logits[0].double().tolist() for row in ids]


expected = {"texts": TEXTS, "base": logits(model)}
config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
adapted = get_peft_model(model, config)
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.05)
expected["adapter"] = logits(adapted)
adapted.save_pretrained(folder)
(folder / "README.md").unlink(missing_ok=True)
# The name of the base is a path on the machine that ran this.
path = folder / "adapter_config.json"
saved = json.loads(path.read_text())
saved["base_model_name_or_path"] = "gemma3"
path.write_text(json.dumps(saved, indent=2) + "\n")
(folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")

"""Writes the folders `seq_cls` of the fixtures: a PEFT adapter for SEQ_CLS with random weights on Gemma 2, on Gemma 3 and
on a multimodal Gemma 3, and the logits that transformers and PEFT compute with it. Run it with the Python environment of
`tests/peft/both_ways`:

    target/peft/venv-*/bin/python tests/transformers/record_heads.py tests/fixtures

`base` are the logits of the `Gemma…ForSequenceClassification` with the adapter's `score.weight` and without its deltas;
`adapter` are those with both.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from random_adapters import build_base
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

TEXTS = ["", "see you at the garden", "rain, rain, rain: the river is over the bridge again!", "a b c " * 40]


@torch.no_grad()
def logits(model, tokenizer):
    model.eval()
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    return [model(input_ids=torch.tensor([row])).logits[0].double().tolist() for row in ids]


def record(base, folder, target_modules):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.1)
    print(f"{folder}: {type(model).__name__}")
    expected = {"texts": TEXTS, "base": logits(model, tokenizer)}
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=target_modules))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    expected["adapter"] = logits(adapted, tokenizer)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # The name of the base is a path on the machine that ran this.
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["base_model_name_or_path"] = folder.parent.name
    path.write_text(json.dumps(saved, indent=2) + "\n")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


fixtures = Path(sys.argv[1])
for name in ["gemma2", "gemma3"]:
    record(fixtures / name, fixtures / name / "seq_cls", ["q_proj", "v_proj"])
with tempfile.TemporaryDirectory() as temporary:
    base = Path(temporary) / "base"
    build_base(fixtures, base, True)
    # Without the vision tower, whose weights are random and not kept.
    modules = r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    record(base, fixtures / "gemma3" / "multimodal" / "seq_cls", modules)

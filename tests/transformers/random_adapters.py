"""Compares moderatord with PEFT on adapters with random options. Run it through `random_configs --adapters`.

Each round draws `target_modules` as a list, a pattern or `all-linear`, and with it `exclude_modules`, layers, patterns of
ranks and alphas, rsLoRA, and a classification head. PEFT creates the adapter on the Gemma 3 fixture, alone or inside a
multimodal model with a vision tower, with random weights, and saves it. Its margins are compared with those of
`moderatord score --adapter` in f32.

Writes only to its temporary folder. Exit code: 0 all margins agree, 1 some margins differ or a step failed.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import random_configs as common
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers import Gemma3Config, Gemma3TextConfig

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 4


def draw_options(draw, is_multimodal):
    """Returns keyword arguments for LoraConfig."""
    options = {"r": draw.choice([2, 4]), "lora_alpha": draw.choice([4, 8]), "use_rslora": draw.random() < 0.3}
    inner = "language_model." if is_multimodal else ""
    kind = draw.choice(["names", "names", "pattern", "all"])
    if kind == "names":
        options["target_modules"] = draw.sample(NAMES, draw.randint(1, 4))
        if draw.random() < 0.4:
            options["layers_to_transform"] = draw.choice([1, draw.sample(range(LAYERS), 2)])
            options["layers_pattern"] = draw.choice([None, "layers", ["h", "layers"]])
    elif kind == "pattern":
        options["target_modules"] = draw.choice([
            rf".*{inner}layers\.[02]\.self_attn\.[qv]_proj",
            rf"model\.{inner}layers\.\d+\.(self_attn|mlp)\.(q|k|up)_proj",
            r"(?!.*vision).*\.(o|down)_proj",
            rf"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:k_proj|gate_proj).*?)|(?:\bmodel\.{inner}layers\.1\.mlp\.up_proj)",
        ])
    else:
        options["target_modules"] = "all-linear"
    if draw.random() < 0.4:
        options["exclude_modules"] = draw.choice([r".*layers\.3\..*", ["k_proj", "1.self_attn.q_proj"], ".*vision.*"])
    keys = [
        "q_proj", "mlp.up_proj", r"layers\.[01]\..*", f"model.{inner}layers.2.self_attn.v_proj", ".*_proj",
        rf"{inner}layers\.\d\.mlp\.(gate|down)_proj", "v_proj|o_proj",
    ]
    for name, values in (("rank_pattern", [1, 3, 8]), ("alpha_pattern", [2, 16, 64])):
        if draw.random() < 0.6:
            options[name] = {key: draw.choice(values) for key in draw.sample(keys, draw.randint(1, 3))}
    return options


def build_base(fixtures, folder, is_multimodal):
    """Writes the base model to `folder` and returns it."""
    folder.mkdir()
    shutil.copy(fixtures / "gemma3" / "tokenizer.json", folder / "tokenizer.json")
    text = AutoModelForCausalLM.from_pretrained(fixtures / "gemma3", dtype=torch.float32)
    if is_multimodal:
        vision = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
        }
        config = Gemma3Config(
            text_config=Gemma3TextConfig(**text.config.to_dict()), vision_config=vision, mm_tokens_per_image=1
        )
        model = AutoModelForImageTextToText.from_config(config)
        model.model.language_model.load_state_dict(text.model.state_dict())
        model.tie_weights()
        text = model
    text.save_pretrained(folder)


@torch.no_grad()
def margins(model, tokenizer, has_head):
    model.eval()
    positive, negative, bos = (tokenizer.token_to_id(name) for name in ("Positive", "Negative", "<bos>"))
    found = []
    for text in common.TEXTS:
        prompt = text if has_head else common.FRAME.format(comment=text)
        ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        logits = model(input_ids=torch.tensor([ids])).logits.double()
        found.append(logits[0, 1] - logits[0, 0] if has_head else logits[0, -1, negative] - logits[0, -1, positive])
    return torch.stack(found)


def main():
    arguments = common.read_arguments()
    tokenizer = Tokenizer.from_file(str(arguments.fixtures / "gemma3" / "tokenizer.json"))
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        bases = {kind: Path(temporary) / str(kind) for kind in (False, True)}
        for kind, folder in bases.items():
            build_base(arguments.fixtures, folder, kind)
        for number in range(arguments.count):
            draw = random.Random(f"{arguments.seed}/{number}")
            is_multimodal = draw.random() < 0.5
            has_head = draw.random() < 0.3
            options = draw_options(draw, is_multimodal)
            base = bases[is_multimodal]
            loader, more = AutoModelForCausalLM, {}
            if has_head:
                loader, more = AutoModelForSequenceClassification, {"num_labels": 2}
            elif is_multimodal:
                loader = AutoModelForImageTextToText
            model = loader.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **more)
            try:
                task = "SEQ_CLS" if has_head else "CAUSAL_LM"
                adapted = get_peft_model(model, LoraConfig(task_type=task, **options))
            except ValueError as error:
                print(f"{number:3} PEFT refuses {options}: {str(error)[:90]}")
                continue
            generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0.0, 0.1, generator=generator)
            adapter = Path(temporary) / f"adapter{number}"
            adapted.save_pretrained(adapter)
            # PEFT writes the keys of patterns in another order, so the file is what counts.
            model = loader.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **more)
            found, error = common.scored(arguments.moderatord, base, adapter)
            try:
                loaded = PeftModel.from_pretrained(model, adapter)
            except RuntimeError as refusal:
                # With that order, a rank is not that of the tensor.
                good = error is not None and "has shape" in error and "size mismatch" in str(refusal)
                failed += not good
                print(f"{number:3} PEFT cannot read its own file, moderatord refuses it {'ok' if good else 'FAILED'}")
                continue
            expected = margins(loaded, tokenizer, has_head)
            what = ("multimodal" if is_multimodal else "text") + (" head" if has_head else "") + f" {json.dumps(options)}"
            if error is not None:
                print(f"{number:3} {what} FAILED\n{error}")
                failed += 1
                continue
            difference = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
            good = difference <= common.TOLERANCE
            failed += not good
            print(f"{number:3} difference {difference:.1e} {'ok' if good else 'FAILED'} {what}", flush=True)
    print(f"seed {arguments.seed}: {arguments.count} adapters, {failed} failed, tolerance {common.TOLERANCE:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures Hugging Face transformers on the same GPU in bf16, with the same shapes, lengths and random weights.

    peer.py OUT.json LENGTHS.json [--device cuda] [--shape NAME] [--seconds S]

Comments run in sorted, padded batches of several sizes, and only the logits of the last token are computed: once with
the whole prompt in each row, and once with the prefix's keys and values computed in advance. Training is measured with
PEFT if it is installed. Each figure is written as soon as it is measured.
"""

import argparse
import itertools
import json
import os
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig, GemmaConfig

PREFIX, SUFFIX = 24, 8
COMMENTS = 4096
BATCHES = (16, 32, 64, 128, 256)
COMMON = {"head_dim": 256, "max_position_embeddings": 8192, "use_cache": True}
GEMMA2 = {"query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA3 = {"query_pre_attn_scalar": 256, "sliding_window": 512}
SHAPES = {
    "gemma-2b": lambda: GemmaConfig(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, **COMMON),
    "gemma-2-2b": lambda: Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, **COMMON, **GEMMA2),
    "gemma-3-270m": lambda: Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, **COMMON, **GEMMA3),
    "gemma-3-1b": lambda: Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, **COMMON, **GEMMA3),
}  # fmt: skip


class Results:
    """The figures by name. The whole file is written again after each figure."""

    def __init__(self, path):
        self.path, self.figures = path, {}

    def set(self, name, value):
        print(f"{name}: {json.dumps(value)}", flush=True)
        self.figures[name] = value
        with open(f"{self.path}.unfinished", "w", encoding="utf-8") as file:
            json.dump(self.figures, file, indent=2)
        os.replace(f"{self.path}.unfinished", self.path)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def padded(rows, device, left):
    """Returns the token ids and the mask of rows, padded to the longest row."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for f, r in zip(fill, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.inference_mode()
def comments_per_second(model, prefix, comments, size, shares_prefix, device, seconds):
    """Scores comments in batches of `size`, sorted by length. The time includes padding and copying to the device."""
    ordered = sorted(comments, key=len)
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    # Shuffles the batches, so that the mix of lengths does not depend on when the time is up.
    batches = [batches[i] for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(1)).tolist()]
    cached = None
    if shares_prefix:
        cached = model(torch.tensor([prefix], device=device), use_cache=True).past_key_values
        cached = [(layer.keys, layer.values) for layer in cached.layers]

    def run(batch):
        if not shares_prefix:
            ids, mask = padded([prefix + comment for comment in batch], device, left=True)
            return model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1, :8].float().cpu()
        ids, mask = padded(batch, device, left=False)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(cached):
            cache.update(keys.expand(len(batch), -1, -1, -1), values.expand(len(batch), -1, -1, -1), number)
        whole = torch.cat([torch.ones(len(batch), PREFIX, dtype=mask.dtype, device=device), mask], dim=1)
        positions = torch.arange(PREFIX, PREFIX + ids.shape[1], device=device)[None]
        hidden = model.model(ids, attention_mask=whole, past_key_values=cache, position_ids=positions).last_hidden_state
        last = hidden[torch.arange(len(batch), device=device), mask.sum(1) - 1]
        return model.lm_head(last)[:, :8].float().cpu()

    run(batches[0])
    synchronize(device)
    start, done = time.monotonic(), 0
    for batch in itertools.cycle(batches):
        run(batch)
        done += len(batch)
        if time.monotonic() - start >= seconds:
            return done / (time.monotonic() - start)


def training_tokens_per_second(model, prefix, comments, device, seconds):
    """Trains LoRA of rank 8 on q and v with batches of 8 and the loss at the last token. Counts only own tokens."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    batches = itertools.cycle([comments[i : i + 8] for i in range(0, 800, 8)])

    def step(batch):
        ids, mask = padded([prefix + comment for comment in batch], device, left=True)
        logits = model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
        torch.nn.functional.cross_entropy(logits, torch.full((len(batch),), 1001, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(map(len, batch))

    step(next(batches))
    synchronize(device)
    start, tokens = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        tokens += step(next(batches))
        synchronize(device)
    return tokens / (time.monotonic() - start)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("lengths")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape")
    parser.add_argument("--seconds", type=float, default=2.0)
    settings = parser.parse_args()
    results = Results(settings.out)
    results.set("attention", "sdpa; eager for gemma-2-2b")
    results.set("versions", {"torch": torch.__version__, "transformers": transformers.__version__})
    with open(settings.lengths, encoding="utf-8") as file:
        lengths = json.load(file)["tokens"]
    generator = torch.Generator().manual_seed(7)
    shapes = [settings.shape] if settings.shape else list(SHAPES)
    for shape in shapes:
        try:
            measure(shape, lengths, generator, settings, results)
        except Exception as error:  # A shape that fails must not stop the others.
            results.set(f"{shape} failed", repr(error))
            if len(shapes) == 1:
                raise


def measure(shape, lengths, generator, settings, results):
    """Measures all figures of one shape."""
    torch.manual_seed(1)
    config = SHAPES[shape]()
    # transformers does not support sdpa with soft-capped scores.
    config._attn_implementation = "eager" if config.model_type == "gemma2" else "sdpa"
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def ids(count, config=config):
        return torch.randint(config.vocab_size, (count,), generator=generator).tolist()

    prefix = ids(PREFIX)
    comments = [ids(length + SUFFIX) for _, length in zip(range(COMMENTS), itertools.cycle(lengths))]
    for shares_prefix in (False, True):
        figures = []
        for size in BATCHES:
            rate = comments_per_second(
                model, prefix, comments, size, shares_prefix, settings.device, settings.seconds
            )
            figures.append({"batch": size, "comments_per_s": rate})
            results.set(f"{shape} {'prefix KV' if shares_prefix else 'whole prompts'}", figures)
    try:
        rate = training_tokens_per_second(model, prefix, comments, settings.device, settings.seconds)
        results.set(f"{shape} training", {"own_tokens_per_s": rate})
    except ImportError as error:
        results.set(f"{shape} training", {"not measured": str(error)})


if __name__ == "__main__":
    main()

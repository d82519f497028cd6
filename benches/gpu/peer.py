#!/usr/bin/env python3
"""Measures Hugging Face transformers on the same GPU in bf16, with the same shape, lengths and random weights.

    peer.py OUT.json LENGTHS.json --shape NAME [--device cuda|cpu] [--seconds S] [--budget SECONDS] [--comments N]

Scoring runs over a fixed set of comments, sorted by length and padded in batches of several sizes. A figure is the rate
over whole passes of the set, after one pass that is not measured: a run that stops within a pass has another mix of
lengths. The set is so large that a pass takes about a second (`--comments` sets its size). Only the logits of the last
token are computed. The combinations are: the whole prompt in each row, or the prefix's keys and values computed in
advance; and each of them as it is, or with the layers compiled by `torch.compile`.

Training is a step of LoRA on all seven projections, of rank 8 in f32 over a base in bf16, through PEFT, or through
layers of the same mathematics if PEFT is not installed, with and without gradient checkpointing.

Each figure is written as soon as it is measured. What the budget leaves no time for is listed as not measured.
"""

import argparse
import itertools
import json
import math
import os
import signal
import time

# Importing PyTorch takes seconds, which count towards the budget.
START = time.monotonic()

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig, GemmaConfig

try:
    import peft
except ImportError:
    peft = None

PREFIX, SUFFIX = 24, 8
BATCHES = (64, 128, 256, 32)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
TRAINING_ROWS = 8
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
    # For tests of this script.
    "tiny": lambda: Gemma3TextConfig(
        vocab_size=16384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **COMMON, **GEMMA3),
}  # fmt: skip


class Results:
    """The figures by name. The whole file is written again after each figure."""

    def __init__(self, path):
        self.path, self.figures = path, {}

    def set(self, name, value):
        newest = value[-1] if isinstance(value, list) else value
        print(f"{name}: {json.dumps(newest)}", flush=True)
        self.figures[name] = value
        with open(f"{self.path}.unfinished", "w", encoding="utf-8") as file:
            json.dump(self.figures, file, indent=2)
        os.replace(f"{self.path}.unfinished", self.path)


class OutOfTime(BaseException):
    """The budget is used up. It is not an `Exception`, which the compiler would wrap in another one."""


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


class PrefixCache(DynamicCache):
    """A prefix that one piece of compiled code can read in every layer: `update` does not depend on the layer's number,
    which would be compiled again for each layer. The keys and values that it returns are those of `DynamicCache`."""

    prefix = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.prefix is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = self.prefix
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class ChoosesPrefix(torch.nn.Module):
    """A layer that chooses its part of a `PrefixCache` outside of the compiled code."""

    def __init__(self, layer, number):
        super().__init__()
        self.layer, self.number = layer, number

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("layer", "number") else getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        cache = kwargs.get("cache") or kwargs.get("past_key_values")
        if cache is not None:
            own = cache.layers[self.number]
            cache.prefix = (own.keys, own.values)
        return self.layer(*args, **kwargs)


class Scorer:
    """Scores comments after a shared prefix. The time of a batch includes padding and copying to and from the device."""

    def __init__(self, model, prefix, shares_prefix, device):
        self.model, self.prefix, self.device = model, prefix, device
        self.cached, self.cache_class = None, DynamicCache
        if shares_prefix:
            with torch.inference_mode():
                cache = model(torch.tensor([prefix], device=device), use_cache=True).past_key_values
            self.cached = [(layer.keys, layer.values) for layer in cache.layers]

    @torch.inference_mode()
    def score(self, batch):
        if self.cached is None:
            ids, mask = padded([self.prefix + comment for comment in batch], self.device, left=True)
            logits = self.model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits
            return logits[:, -1, :8].float().cpu()
        ids, mask = padded(batch, self.device, left=False)
        count = len(batch)
        cache = self.cache_class()
        for number, (keys, values) in enumerate(self.cached):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
        whole = torch.cat([torch.ones(count, PREFIX, dtype=mask.dtype, device=self.device), mask], dim=1)
        positions = torch.arange(PREFIX, PREFIX + ids.shape[1], device=self.device)[None]
        hidden = self.model.model(
            ids, attention_mask=whole, past_key_values=cache, position_ids=positions, use_cache=True
        ).last_hidden_state
        last = hidden[torch.arange(count, device=self.device), mask.sum(1) - 1]
        return self.model.lm_head(last)[:, :8].float().cpu()

    def one_pass(self, comments, size):
        """Scores all comments in batches of `size`, sorted by length, and returns the seconds that it took."""
        ordered = sorted(comments, key=len)
        start = time.monotonic()
        for first in range(0, len(ordered), size):
            self.score(ordered[first : first + size])
        synchronize(self.device)
        return time.monotonic() - start

    def rate(self, comments, size, seconds):
        """Returns the comments per second over at least one whole pass, and the seconds of the pass before it."""
        warm, passes, took = self.one_pass(comments, size), 0, 0.0
        while took < seconds:
            took += self.one_pass(comments, size)
            passes += 1
        return {
            "batch": size,
            "comments_per_s": passes * len(comments) / took,
            "passes": passes,
            "unmeasured_pass_s": warm,
        }


def compile_layers(scorer):
    """Compiles the layers of a scorer's model, for any size of batch. The layers share their code, so this is much faster
    than compiling the whole model, which would only add the embedding and the last norm."""
    layers = scorer.model.model.layers
    scorer.cache_class = PrefixCache
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for number, layer in enumerate(layers):
        layer.compile(dynamic=True)
        layers[number] = ChoosesPrefix(layer, number)


class PlainLora(torch.nn.Module):
    """A linear layer with a low-rank delta: `y = W x + (alpha / rank) B A x`, with A and B in f32, as PEFT computes it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        device = base.weight.device
        a = torch.empty(RANK, base.in_features, device=device)
        self.a = torch.nn.Parameter(torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK, device=device))

    def forward(self, x):
        y = self.base(x)
        linear = torch.nn.functional.linear
        return (y + linear(linear(x.to(self.a.dtype), self.a), self.b) * (ALPHA / RANK)).to(y.dtype)


def with_lora(model):
    """Returns the model with trainable deltas on all projections and everything else frozen, and how it was made."""
    if peft:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
        return peft.get_peft_model(model, config), f"PEFT {peft.__version__}"
    model.requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in PROJECTIONS:
                if hasattr(parent, name):
                    setattr(parent, name, PlainLora(getattr(parent, name)))
    return model, "plain PyTorch"


def training(model, prefix, comments, device, seconds):
    """Trains with the loss at the last token. Returns the own tokens per second, without the first two steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    model.train()
    batches = [comments[i : i + TRAINING_ROWS] for i in range(0, 100 * TRAINING_ROWS, TRAINING_ROWS)]

    def step(batch):
        start = time.monotonic()
        ids, mask = padded([prefix + comment for comment in batch], device, left=True)
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.full((len(batch),), 1001, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.monotonic() - start

    first = [step(batch) for batch in batches[:2]]
    # The unsorted comments of a few dozen steps have the lengths of all.
    batches = batches[: min(max(int(seconds / first[1]), 4), len(batches))]
    took = sum(map(step, batches))
    tokens = sum(len(comment) for batch in batches for comment in batch)
    return {
        "own_tokens_per_s": tokens / took,
        "step_ms": took / len(batches) * 1e3,
        "steps": len(batches),
        "first_step_s": first[0],
    }


def new_model(shape, device):
    torch.manual_seed(1)
    config = SHAPES[shape]()
    # transformers does not support sdpa with soft-capped scores.
    config._attn_implementation = "eager" if config.model_type == "gemma2" else "sdpa"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(settings, results):
    """Measures all combinations, first those that take the least time to prepare."""
    shape, device = settings.shape, settings.device
    results.set("versions", {"torch": torch.__version__, "transformers": transformers.__version__})
    with open(settings.lengths, encoding="utf-8") as file:
        lengths = json.load(file)["tokens"]
    generator = torch.Generator().manual_seed(7)
    model = new_model(shape, device)
    results.set("attention", model.config._attn_implementation)

    def ids(count):
        return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()

    prefix = ids(PREFIX)
    comments = [ids(length + SUFFIX) for _, length in zip(range(8192), itertools.cycle(lengths))]
    with_prefix, whole = (Scorer(model, prefix, shares, device) for shares in (True, False))
    count = settings.comments
    if count is None:
        with_prefix.one_pass(comments[:256], 64)
        count = 256 / with_prefix.one_pass(comments[:256], 64)
        count = min(max(math.ceil(count / 256) * 256, 512), len(comments))
    results.set("comments", count)
    figures, trained, failed, best = [], [], {}, None

    def score(scorer, name, size):
        nonlocal best
        figure = {"mode": name, **scorer.rate(comments[:count], size, settings.seconds)}
        figures.append(figure)
        results.set("scoring", figures)
        if best is None or figure["comments_per_s"] > best["comments_per_s"]:
            best = {key: figure[key] for key in ("mode", "batch", "comments_per_s")}
            results.set("best", best)

    def train(checkpointing):
        trainable, library = with_lora(new_model(shape, device))
        if checkpointing:
            trainable.gradient_checkpointing_enable({"use_reentrant": False})
            # Checkpoints that keep no input with a gradient would compute none.
            trainable.enable_input_require_grads()
        figure = training(trainable, prefix, comments, device, settings.seconds)
        trained.append({"library": library, "gradient_checkpointing": checkpointing, **figure})
        results.set("training", trained)

    modes = [(with_prefix, "prefix KV"), (whole, "whole prompts")]
    tasks = [(f"eager, {name}, {size}", lambda s=scorer, n=name, z=size: score(s, f"eager, {n}", z))
             for scorer, name in modes for size in BATCHES]  # fmt: skip
    tasks += [(f"training, checkpointing {on}", lambda on=on: train(on)) for on in (False, True)]
    tasks.append(("compiling", lambda: compile_layers(with_prefix)))
    tasks += [(f"compiled, {name}, {size}", lambda s=scorer, n=name, z=size: score(s, f"compiled, {n}", z))
              for scorer, name in modes for size in BATCHES]  # fmt: skip
    for number, (name, task) in enumerate(tasks):
        try:
            task()
        except OutOfTime:
            results.set("not measured for lack of time", [name for name, _ in tasks[number:]])
            return
        except Exception as error:  # A combination that fails must not stop the others.
            failed[name] = repr(error)[:500]
            results.set("failed", failed)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("lengths")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=600.0)
    parser.add_argument("--comments", type=int)
    settings = parser.parse_args()
    results = Results(settings.out)

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(settings.budget - (time.monotonic() - START), 0.1))
    try:
        measure(settings, results)
    except OutOfTime:
        results.set("not measured for lack of time", "everything else")
    return 1 if "failed" in results.figures else 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""Scores the same comments with PyTorch and Hugging Face transformers on the CPU, one round for each line of input.

    pytorch.py CHECKPOINT WORK.json [--threads N] [--compile]

CHECKPOINT is a Hugging Face folder. WORK.json has `prefix` (token ids), `comments` (lists of token ids) and `labels` (two
token ids). The keys and values of the prefix are computed once, comments run in sorted, padded batches, and only the
logits of the two labels at the last token are computed. `int8` is PyTorch's dynamic quantisation, and `torchao` that of
torchao (weights per channel, inputs per token), which needs a compiler to be fast. With `--compile`, there are also
variants that `torch.compile` has compiled for any shape, which takes minutes. The batch size is chosen for each variant
at the start: the fastest of several.

Each line of input names one of the `variants` that the script says it has, or `products`. The answer is one line of JSON: for a variant, `wall` and `cpu` in
seconds, `batch`, and `logits` for each comment; for `products`, the rate of a matrix product in operations per second
for each type that this machine's PyTorch multiplies.
"""

import argparse
import json
import sys
import time
import warnings

import torch
from transformers import AutoModelForCausalLM, DynamicCache

BATCHES = (4, 8, 16, 32)
# The shapes of products: rows, inputs and outputs.
PRODUCTS = ((512, 640, 2048), (512, 2048, 640), (512, 2048, 2048))


class Variant:
    """One model in one arithmetic, with the prefix's keys and values."""

    def __init__(self, name, folder, prefix, labels):
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self.labels = self.model.get_input_embeddings().weight[labels].detach().clone()
        if name == "int8":
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8)
        if "torchao" in name:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(self.model, Int8DynamicActivationInt8WeightConfig())
        with torch.inference_mode():
            cache = self.model.model(torch.tensor([prefix]), use_cache=True).past_key_values
        self.prefix = len(prefix)
        self.cached = [(layer.keys, layer.values) for layer in cache.layers]
        self.batch = BATCHES[0]
        self.decoder = self.model.model
        if "compiled" in name:
            self.decoder = torch.compile(self.decoder, dynamic=True)

    @torch.inference_mode()
    def score(self, comments):
        """Returns the logits of the labels for each comment."""
        order = sorted(range(len(comments)), key=lambda index: len(comments[index]))
        logits = [None] * len(comments)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            longest = max(len(comments[row]) for row in rows)
            ids = torch.tensor([comments[row] + [0] * (longest - len(comments[row])) for row in rows])
            lengths = torch.tensor([len(comments[row]) for row in rows])
            mask = (torch.arange(longest)[None] < lengths[:, None]).long()
            mask = torch.cat([torch.ones(len(rows), self.prefix, dtype=mask.dtype), mask], 1)
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self.cached):
                shape = (len(rows), -1, -1, -1)
                cache.update(keys.expand(shape), values.expand(shape), layer)
            positions = torch.arange(self.prefix, self.prefix + longest)[None]
            output = self.decoder(ids, attention_mask=mask, past_key_values=cache, position_ids=positions)
            last = output.last_hidden_state[torch.arange(len(rows)), lengths - 1]
            for row, pair in zip(rows, (last @ self.labels.T).float().tolist()):
                logits[row] = pair
        return logits

    def choose_batch(self, comments):
        """Takes the fastest batch size, after a warm-up."""
        times = {}
        for batch in BATCHES:
            self.batch = batch
            self.score(comments)
            times[batch] = timed(lambda: self.score(comments))["wall"]
        self.batch = min(times, key=times.get)


def timed(work):
    """Returns the wall-clock time and the CPU time of all threads, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "result": result}


def product_rate(multiply, operations):
    """Returns the operations per second of a product: the median of several calls."""
    multiply()
    times = sorted(timed(multiply)["wall"] for _ in range(9))
    return operations / times[4]


def products():
    """Returns the highest rate of a matrix product for each type."""
    rates = {}
    for rows, inputs, outputs in PRODUCTS:
        operations = 2 * rows * inputs * outputs
        x, linear = torch.rand(rows, inputs), torch.nn.Linear(inputs, outputs, bias=False)
        half, half_linear = x.bfloat16(), torch.nn.Linear(inputs, outputs, bias=False).bfloat16()
        int8 = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
        )
        with torch.inference_mode():
            for name, multiply in [
                ("f32", lambda: linear(x)),
                ("bf16", lambda: half_linear(half)),
                ("int8", lambda: int8(x)),
            ]:
                rates[name] = max(rates.get(name, 0.0), product_rate(multiply, operations))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    with open(arguments.work, encoding="utf-8") as file:
        work = json.load(file)
    variants = {}
    names = ["f32", "bf16", "int8"]
    if arguments.compile:
        names += ["f32, compiled", "bf16, compiled", "int8, torchao, compiled"]
    for name in names:
        print(f"preparing PyTorch, {name}", file=sys.stderr, flush=True)
        variants[name] = Variant(name, arguments.checkpoint, work["prefix"], work["labels"])
        variants[name].choose_batch(work["comments"])
    print(json.dumps({"version": torch.__version__, "variants": names}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name == "products":
            answer = products()
        else:
            answer = timed(lambda: variants[name].score(work["comments"]))
            answer["logits"] = answer.pop("result")
            answer["batch"] = str(variants[name].batch)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

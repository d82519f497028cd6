#!/usr/bin/env python3
"""Simulates `model.quantize = "fp8"` on the CPU and compares the probabilities of a model with those in f32.

    fp8_accuracy.py CHECKPOINT CORPUS.jsonl...

CHECKPOINT is the folder of a Gemma for which the default prompt was made, such as models/moderatord-mini. The corpora are
those of quantised_accuracy.py. Needs PyTorch and transformers.

`bf16` rounds as the pass on a GPU does: weights, inputs and outputs of all linear layers are bf16, sums and everything
else f32. `fp8` is that, except for gate, up and down: their weights have a scale for each output, and their inputs one
for each row. Both are the largest magnitude / 448, and values are rounded to e4m3. The outputs are sums in f32, times
both scales, rounded to bf16.

Prints the median, the 99th percentile and the maximum of the differences from f32, and the ROC-AUC.
"""

import sys
import unicodedata
from pathlib import Path

import torch
from quantised_accuracy import auc, read
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parent.parent / "models/recipe"))
from frame import HATEFUL, HEAD, LABELS, TAIL

E4M3_MAX = 448.0
BATCH = 32


def bf16(x):
    return x.bfloat16().float()


def quantised(x):
    """Returns x (rows, columns) as e4m3 and the scale of each row: (rows, 1)."""
    scales = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    inverse = torch.where(scales > 0, 1 / scales, 0)
    # PyTorch's conversion does not saturate, and rounding can bring the largest value of a row above the limit.
    codes = (x * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float(), scales


class Bf16Linear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = bf16(linear.weight.detach())

    def forward(self, x):
        return bf16(bf16(x) @ self.weight.T)


class Fp8Linear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight, self.scales = quantised(bf16(linear.weight.detach()))

    def forward(self, x):
        # The kernels before these products write e4m3 from f32, without a step in bf16.
        x, scales = quantised(x)
        return bf16(x @ self.weight.T * scales * self.scales.T)


def load(checkpoint, arithmetic):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for layer in model.model.layers if arithmetic != "f32" else []:
        mlp = Fp8Linear if arithmetic == "fp8" else Bf16Linear
        for part, new in ((layer.self_attn, Bf16Linear), (layer.mlp, mlp)):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, new(module))
    return model


@torch.inference_mode()
def probabilities(model, labels, rows):
    """Returns the probability of the hateful label for each row of token ids."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found = [0.0] * len(rows)
    unembedding = model.get_output_embeddings().weight[labels]
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        width = len(rows[batch[-1]])
        ids = torch.tensor([rows[index] + [0] * (width - len(rows[index])) for index in batch])
        mask = torch.tensor([[1] * len(rows[index]) + [0] * (width - len(rows[index])) for index in batch])
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(batch)), mask.sum(1) - 1]
        for index, row in zip(batch, (last @ unembedding.T).softmax(-1).tolist()):
            found[index] = row[LABELS.index(HATEFUL)]
    return found


def main():
    checkpoint, *corpora = sys.argv[1:]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(checkpoint, "tokenizer.json")))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    labels = [encode(label)[0] for label in LABELS]
    models = {arithmetic: load(checkpoint, arithmetic) for arithmetic in ("f32", "bf16", "fp8")}
    for corpus in map(Path, corpora):
        rows = read(corpus)
        truth = [row["label"] for row in rows]
        frames = [HEAD + unicodedata.normalize("NFC", row["text"]) + TAIL for row in rows]
        ids = [[tokenizer.convert_tokens_to_ids("<bos>"), *encode(frame)] for frame in frames]
        found = {name: probabilities(model, labels, ids) for name, model in models.items()}
        print(f"{corpus.name}: {len(rows)} rows, AUC {auc(truth, found['f32']):.4f} in f32")
        for name in ("bf16", "fp8"):
            differences = sorted(abs(a - b) for a, b in zip(found["f32"], found[name], strict=True))
            print(
                f"    {name}: median {differences[len(rows) // 2]:.4f}, p99 {differences[int(len(rows) * 0.99)]:.4f}, "
                f"max {differences[-1]:.4f}, AUC {auc(truth, found[name]):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

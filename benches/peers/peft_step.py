#!/usr/bin/env python3
"""Trains a LoRA adapter with PyTorch, transformers and PEFT on the CPU, one step for each line of input.

    peft_step.py CHECKPOINT WORK.json [--threads N]

CHECKPOINT is a Hugging Face folder. WORK.json has `rows` (lists of token ids of one length), `labels` (the token id that
should follow each row) and `rank`. The adapter is on q_proj and v_proj and never changes, because
the learning rate is zero. The arithmetic is f32, and the loss that of the label alone: the logits of the last position over the whole vocabulary. Each answer is one line of JSON: `wall` and `cpu`
in seconds, `loss`, and `peak`, the largest resident memory so far in bytes.
"""

import argparse
import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with open(arguments.work, encoding="utf-8") as file:
        work = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    lora = LoraConfig(
        r=work["rank"], lora_alpha=2 * work["rank"], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    rows, labels = torch.tensor(work["rows"]), torch.tensor(work["labels"])

    def step():
        optimizer.zero_grad()
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""The sentence encoder that the model is distilled from: all-MiniLM-L6-v2 (Apache-2.0), mean-pooled.

Only its outputs are used for training. No part of it is shipped, but its word embeddings initialise the model's.
"""

import time

import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 128


class Encoder:
    """Maps texts to unit vectors of 384 numbers."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def word_embeddings(self):
        """Returns the embeddings of all word pieces, (word pieces, 384)."""
        return self.model.embeddings.word_embeddings.weight.detach()

    def word_pieces(self, text):
        """Returns the ids of a text's word pieces, without control tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode(self, texts, batch_tokens=8192):
        """Returns unit vectors of the texts, (texts, 384) in f16, and prints its progress once a minute."""
        ids = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.model.config.hidden_size, dtype=torch.float16)
        start, reported, at = time.monotonic(), time.monotonic(), 0
        while at < len(order):
            count = max(1, batch_tokens // max(len(ids[order[min(at + 64, len(order) - 1)]]), 1))
            batch = order[at : at + count]
            tokens, mask = padded([ids[i] for i in batch])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[torch.tensor(batch)] = torch.nn.functional.normalize(mean, dim=1).half()
            at += count
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                print(f"encoded {at} of {len(order)} in {reported - start:.0f} s", flush=True)
        return out


def fine_tune(encoder, texts, labels, weights, seed, batch_tokens=2048, rate=8e-5):
    """Fine-tunes the encoder and a new linear head in one pass over labelled texts, and returns the head."""
    torch.manual_seed(seed)
    model = encoder.model.train()
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    ids = encoder.tokenizer(texts, truncation=True, max_length=MAX_TOKENS // 2)["input_ids"]
    batches = buckets([len(row) for row in ids], batch_tokens, torch.Generator().manual_seed(seed))
    groups = [
        {"params": model.parameters(), "lr": rate, "weight_decay": 0.01},
        {"params": head.parameters(), "lr": rate * 30, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, rate * 30], total_steps=len(batches), pct_start=0.06, anneal_strategy="linear"
    )
    start, reported, losses = time.monotonic(), time.monotonic(), []
    for step, batch in enumerate(batches):
        tokens, mask = padded([ids[i] for i in batch])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = head(torch.nn.functional.normalize(mean, dim=1))[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[batch], weight=weights[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step} of {len(batches)}, loss {recent:.4f}, {reported - start:.0f} s", flush=True)
    model.eval()
    return head


def padded(rows):
    """Returns the padded token ids and their mask, each (rows, longest)."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return tokens, mask


def buckets(lengths, batch_tokens, generator):
    """Groups rows of similar length into batches of at most `batch_tokens` padded tokens, in random order."""
    noise = torch.rand(len(lengths), generator=generator)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * (1 + 0.2 * noise[i].item()))
    batches, batch, longest = [], [], 0
    for i in order:
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(torch.tensor(batch))
            batch, longest = [], lengths[i]
        batch.append(i)
    batches.append(torch.tensor(batch))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

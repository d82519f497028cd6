"""The sentence encoder that the model is distilled from: all-MiniLM-L6-v2 (Apache-2.0), mean-pooled.

Only its outputs train the model; nothing of it is shipped but what its word embeddings started.
"""

import time

import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 128


class Encoder:
    """Texts to unit vectors of 384 numbers."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def word_embeddings(self):
        """(word pieces, 384)"""
        return self.model.embeddings.word_embeddings.weight.detach()

    def word_pieces(self, text):
        """Ids of a text's word pieces, no control tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode(self, texts, tokens_a_batch=8192):
        """(texts, 384) in f16, rows of length one; progress once a minute."""
        ids = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.model.config.hidden_size, dtype=torch.float16)
        start, said, at = time.monotonic(), time.monotonic(), 0
        while at < len(order):
            count = max(1, tokens_a_batch // max(len(ids[order[min(at + 64, len(order) - 1)]]), 1))
            batch = order[at : at + count]
            tokens, mask = padded([ids[i] for i in batch])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[torch.tensor(batch)] = torch.nn.functional.normalize(mean, dim=1).half()
            at += count
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"encoded {at} of {len(order)} in {said - start:.0f} s", flush=True)
        return out


def fine_tune(encoder, texts, labels, weights, seed, tokens_a_batch=2048, rate=8e-5):
    """One pass of the encoder with a linear head over labelled texts; returns the head."""
    torch.manual_seed(seed)
    model = encoder.model.train()
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    ids = encoder.tokenizer(texts, truncation=True, max_length=MAX_TOKENS // 2)["input_ids"]
    batches = buckets([len(row) for row in ids], tokens_a_batch, torch.Generator().manual_seed(seed))
    groups = [
        {"params": model.parameters(), "lr": rate, "weight_decay": 0.01},
        {"params": head.parameters(), "lr": rate * 30, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, rate * 30], total_steps=len(batches), pct_start=0.06, anneal_strategy="linear"
    )
    start, said, losses = time.monotonic(), time.monotonic(), []
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
        if time.monotonic() - said > 60:
            said = time.monotonic()
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step} of {len(batches)}, loss {recent:.4f}, {said - start:.0f} s", flush=True)
    model.eval()
    return head


def padded(rows):
    """Token ids and mask, (rows, longest)."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return tokens, mask


def buckets(lengths, tokens_a_batch, generator):
    """Batches of rows of like length, at most `tokens_a_batch` padded tokens each, in random order."""
    noise = torch.rand(len(lengths), generator=generator)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * (1 + 0.2 * noise[i].item()))
    batches, batch, longest = [], [], 0
    for i in order:
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > tokens_a_batch:
            batches.append(torch.tensor(batch))
            batch, longest = [], lengths[i]
        batch.append(i)
    batches.append(torch.tensor(batch))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

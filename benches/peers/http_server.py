#!/usr/bin/env python3
"""Scores comments over HTTP with FastAPI, uvicorn, PyTorch and Hugging Face transformers on the CPU.

    http_server.py CHECKPOINT --port N [--model gemma|roberta] [--dtype f32|bf16|int8] [--threads N] [--processes N]
                   [--rows N] [--tokens N] [--linger MS] [--no-prefix] [--compile]

CHECKPOINT is a Hugging Face folder. `POST /score` takes `{"text": ...}`, and answers with `margin` and `probability`.
`GET /stats` answers with the number of `passes` and `rows` so far, and with `versions`. The options that `./dev bench
http` uses are the fastest that were found (benches/results/http-peer-options.md).

Requests wait in a queue. One worker thread takes what waits, up to `--rows`; sorts it by length; and scores it in passes
of up to `--tokens` padded tokens. The keys and values of the prompt's first part are computed once, and only the logits
of the two labels at the last token of each comment are computed. With `--linger`, the worker waits so long after the
first request for others.

`--model roberta` is a classifier of the shape of Detoxify with random weights. Its weights cannot change how long it
takes. It reads the comment alone, without a prompt. The tokens are those of CHECKPOINT's tokenizer, so that the number
of tokens is comparable, modulo its own vocabulary.
"""

import argparse
import asyncio
import collections
import contextlib
import importlib.metadata
import math
import os
import socket
import threading
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, RobertaConfig, RobertaForSequenceClassification

HEAD = "Classify the following text into one of the following classes:[Positive,Negative]<separator>Text:"
TAIL = "<separator>Prediction:"
# The label that means hateful, and the other one.
LABELS = ("Negative", "Positive")
# The outputs of Detoxify's `unbiased` model.
ROBERTA_LABELS = 16
ROBERTA_VOCABULARY = 50265
VERSIONS = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")}
# Longer comments are cut. RoBERTa has no more positions.
ROBERTA_TOKENS = 512


def prepare(model, options):
    """Returns the model in the arithmetic that was asked for."""
    if options.dtype == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return torch.compile(model, dynamic=True) if options.compile else model


def padded(rows, longest):
    """Returns the ids of rows, padded on the right, and their lengths."""
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


class Gemma:
    """A Gemma that says one of two labels."""

    def __init__(self, options):
        self.tokenizer = Tokenizer.from_file(os.path.join(options.checkpoint, "tokenizer.json"))
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=dtype, attn_implementation="sdpa").eval()
        labels = [self.tokenizer.token_to_id(label) for label in LABELS]
        self.labels = model.get_input_embeddings().weight[labels].detach().clone()
        self.decoder = prepare(model.model, options)
        self.bos = self.tokenizer.token_to_id("<bos>")
        self.prefix, self.cached = [], []
        if not options.no_prefix:
            # What the prompts of all comments begin with.
            self.prefix = os.path.commonprefix(self.encode(["a", "The garden", " 1", "\n", "..."]))
            with torch.inference_mode():
                cache = model.model(torch.tensor([self.prefix]), use_cache=True).past_key_values
            self.cached = [(layer.keys, layer.values) for layer in cache.layers]

    def encode(self, texts):
        """Returns the token ids of each prompt."""
        prompts = self.tokenizer.encode_batch([HEAD + text + TAIL for text in texts], add_special_tokens=False)
        return [[self.bos, *prompt.ids] for prompt in prompts]

    def own(self, row):
        """Returns the number of tokens that have to be computed."""
        return len(row) - len(self.prefix)

    @torch.inference_mode()
    def margins(self, rows):
        """Returns the margin of each row."""
        size = len(self.prefix)
        if any(row[:size] != self.prefix for row in rows):
            raise ValueError("a prompt does not begin with the common prefix")
        rows = [row[size:] for row in rows]
        longest = max(map(len, rows))
        ids, lengths = padded(rows, longest)
        mask = cache = None
        if min(map(len, rows)) < longest:
            mask = (torch.arange(longest)[None] < lengths[:, None]).long()
            mask = torch.cat([torch.ones(len(rows), size, dtype=mask.dtype), mask], 1)
        if size:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self.cached):
                cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        positions = torch.arange(size, size + longest)[None]
        states = self.decoder(
            ids, attention_mask=mask, past_key_values=cache, position_ids=positions, use_cache=cache is not None
        ).last_hidden_state
        logits = (states[torch.arange(len(rows)), lengths - 1] @ self.labels.T).float()
        return (logits[:, 0] - logits[:, 1]).tolist()


class Roberta:
    """A classifier of Detoxify's shape."""

    def __init__(self, options):
        self.tokenizer = Tokenizer.from_file(os.path.join(options.checkpoint, "tokenizer.json"))
        config = RobertaConfig(
            vocab_size=ROBERTA_VOCABULARY, max_position_embeddings=ROBERTA_TOKENS + 2, num_labels=ROBERTA_LABELS
        )
        torch.manual_seed(1)
        model = RobertaForSequenceClassification(config).eval()
        self.model = prepare(model.to(torch.bfloat16) if options.dtype == "bf16" else model, options)

    def encode(self, texts):
        """Returns the token ids of each comment, between <s> and </s>."""
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        # The first ids are RoBERTa's special tokens.
        ids = ([4 + token % (ROBERTA_VOCABULARY - 4) for token in text.ids] for text in encoded)
        return [[0, *row[: ROBERTA_TOKENS - 2], 2] for row in ids]

    def own(self, row):
        """Returns the number of tokens that have to be computed."""
        return len(row)

    @torch.inference_mode()
    def margins(self, rows):
        """Returns the logit of the first output for each row."""
        longest = max(map(len, rows))
        # 1 is the id of the padding, and positions are counted from it.
        ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
        mask = None if min(map(len, rows)) == longest else (ids != 1).long()
        return self.model(ids, attention_mask=mask).logits[:, 0].float().tolist()


class Batcher:
    """The queue of requests, and the thread that scores them."""

    def __init__(self, model, options, loop):
        self.model, self.options, self.loop = model, options, loop
        self.waiting = collections.deque()
        self.is_waiting = threading.Condition()
        self.passes = self.rows = 0
        threading.Thread(target=self.run, daemon=True).start()

    def submit(self, text):
        """Returns a future of the margin."""
        future = self.loop.create_future()
        with self.is_waiting:
            self.waiting.append((text, future))
            self.is_waiting.notify()
        return future

    def take(self):
        """Waits for requests, and returns those that are scored next."""
        with self.is_waiting:
            self.is_waiting.wait_for(lambda: self.waiting)
            until = time.monotonic() + self.options.linger / 1000
            while len(self.waiting) < self.options.rows and (left := until - time.monotonic()) > 0:
                self.is_waiting.wait(left)
            return [self.waiting.popleft() for _ in range(min(len(self.waiting), self.options.rows))]

    def run(self):
        while True:
            taken = self.take()
            rows = self.model.encode([text for text, _ in taken])
            rows = sorted(zip(rows, (future for _, future in taken)), key=lambda row: len(row[0]))
            start = 0
            while start < len(rows):
                # The rows are sorted, so the last one is the longest.
                end = start + 1
                while end < len(rows) and (end + 1 - start) * self.model.own(rows[end][0]) <= self.options.tokens:
                    end += 1
                self.score(rows[start:end])
                start = end

    def score(self, rows):
        """Scores rows in one pass."""
        try:
            results = self.model.margins([row for row, _ in rows])
        except Exception as error:  # pylint: disable=broad-except
            results = [error] * len(rows)
        self.passes += 1
        self.rows += len(rows)
        # One call for all of them, because each wakes the loop.
        self.loop.call_soon_threadsafe(answer, [(future, result) for (_, future), result in zip(rows, results)])


def answer(results):
    """Answers requests, unless their callers have gone."""
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


class Comment(BaseModel):
    """The body of a request."""

    text: str


class Score(BaseModel):
    """The answer to a request."""

    margin: float
    probability: float


def application(model, options):
    """Returns the application around a model."""
    batchers = []

    @contextlib.asynccontextmanager
    async def lifespan(_):
        batchers.append(Batcher(model, options, asyncio.get_running_loop()))
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/score")
    async def score(comment: Comment) -> Score:
        margin = await batchers[0].submit(comment.text)
        return Score(margin=margin, probability=1 / (1 + math.exp(-margin)))

    @app.get("/stats")
    async def stats():
        return {"passes": batchers[0].passes, "rows": batchers[0].rows, "versions": VERSIONS}

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", choices=["gemma", "roberta"], default="gemma")
    parser.add_argument("--dtype", choices=["f32", "bf16", "int8"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--linger", type=float, default=0)
    parser.add_argument("--no-prefix", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", options.port))
    # The processes share the socket, and the kernel spreads the connections over them.
    for _ in range(options.processes - 1):
        if os.fork() == 0:
            break
    torch.set_num_threads(options.threads)
    model = {"gemma": Gemma, "roberta": Roberta}[options.model](options)
    for length in (1, 20, 200):
        model.margins(model.encode(["see you at the garden " * length] * 2))
    # uvicorn would close a connection that is idle for five seconds, and a request that is sent meanwhile would fail.
    config = uvicorn.Config(
        application(model, options),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        backlog=2048,
        timeout_keep_alive=120,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()

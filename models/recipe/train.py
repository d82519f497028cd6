"""Step 2: trains the model on the corpora and the encoder's outputs, and writes its folder in Hugging Face layout.

    python train.py CORPORA ENCODER TAUGHT OUT [--passes N] [--seed N]

TAUGHT is the file that teach.py wrote. The language-model loss dominates at first and fades. Two other losses take
over: that of the label in the daemon's frame, whose target mixes the corpora's labels with the encoder's, and that of
the encoder's vector. The script prints its progress once a minute. It evaluates the model on the development part and
never on a test set.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from augment import disguise, pad
from corpora import read
from encoder import Encoder, buckets
from frame import HATEFUL, HEAD, LABELS, TAIL
from network import Network, Shape
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from vocabulary import HOMOGLYPHS, train as train_vocabulary

BATCH_TOKENS = 6144
MAX_TOKENS = 160
# The share of positions whose next token is predicted. Not all, because the unembedding costs as much as the layers.
LANGUAGE_SHARE = 0.2
# The share of rows that are disguised, and the share of labelled rows that are padded with harmless ones.
DISGUISED, PADDED = 0.2, 0.1
# The weight of the encoder's probability in the target of a labelled row.
TAUGHT_SHARE = 0.5


def starting_embeddings(tokenizer, encoder, size, generator):
    """Returns the mean of the encoder's embeddings of each token's word pieces, reduced to `size` numbers by PCA."""
    rare = torch.randn(tokenizer.get_vocab_size(), size, generator=generator)
    table = encoder.word_embeddings()
    found, rows = [], []
    for token, place in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = HOMOGLYPHS.get(token, token).replace("▁", " ").strip()
        pieces = encoder.word_pieces(text) if text and not token.startswith("<") else []
        if pieces:
            found.append(place)
            rows.append(table[pieces].mean(0))
    rows = torch.stack(rows)
    rows = rows - rows.mean(0)
    _, _, basis = torch.pca_lowrank(rows, size, center=False, niter=4)
    rows = rows @ basis
    rare[found] = rows / rows.std()
    return rare * size**-0.5


class Examples:
    """The training data: token ids, targets and vectors, and which rows are for training or development."""

    def __init__(self, rows, taught, tokenizer, seed):
        self.rows, self.tokenizer, self.seed = rows, tokenizer, seed
        self.vectors = taught["vectors"]
        labels = torch.tensor([-1.0 if row.label is None else float(row.label) for row in rows])
        mixed = (1 - TAUGHT_SHARE) * labels + TAUGHT_SHARE * taught["probabilities"]
        self.targets = torch.where(labels < 0, taught["probabilities"], mixed)
        self.training = [i for i, row in enumerate(rows) if not row.development]
        self.development = [i for i, row in enumerate(rows) if row.development]
        self.benign = [
            row.text
            for i, row in enumerate(rows)
            if row.label == 0 and taught["probabilities"][i] < 0.15 and len(row.text) < 120 and not row.development
        ]
        tail = tokenizer.encode(HEAD + TAIL).ids
        head = tokenizer.encode(HEAD).ids
        assert tail[: len(head)] == head, "the frame's head must not merge with what follows"
        self.head = torch.tensor(head)
        label = [tokenizer.token_to_id(HATEFUL), tokenizer.token_to_id(next(x for x in LABELS if x != HATEFUL))]
        self.labels = torch.tensor(label)

    def ids(self, texts):
        """Returns the ids of each text and the frame's tail, without the head that all rows share."""
        before = len(self.head)
        encoded = self.tokenizer.encode_batch_fast([f"{HEAD}{text[:600]}{TAIL}" for text in texts])
        out = []
        for one in encoded:
            # Ignores that a first character can merge with the head's colon. It is rare, and the daemon handles it.
            ids = one.ids[before:]
            tail = ids[-16:] if len(ids) > MAX_TOKENS else []
            out.append(ids[: MAX_TOKENS - len(tail)] + tail)
        return out

    def epoch(self, number):
        """Returns ids, row numbers and whether the vector is still valid for one pass, with new disguises."""
        chance = random.Random(f"{self.seed} {number}")
        texts, fits = [], []
        for i in self.training:
            row, fit = self.rows[i], True
            text = row.text
            if row.label is not None and chance.random() < PADDED:
                text, fit = pad(f"{self.seed} {number} {i}", text, self.benign), False
            elif chance.random() < DISGUISED:
                text = disguise(f"{self.seed} {number} {i}", text)
            texts.append(text)
            fits.append(fit)
        return self.ids(texts), torch.tensor(self.training), torch.tensor(fits)


def batch_of(ids, chosen):
    """Returns the padded token ids (rows, longest) and the lengths of the chosen rows."""
    rows = [ids[i] for i in chosen.tolist()]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = torch.tensor(row)
    return tokens, lengths


@torch.no_grad()
def probabilities(network, examples, numbers):
    """Returns the probability of the hateful label, between the two labels, for rows by number."""
    network.eval()
    ids = examples.ids([examples.rows[i].text for i in numbers])
    out = torch.empty(len(numbers))
    for chosen in buckets([len(row) for row in ids], BATCH_TOKENS, torch.Generator().manual_seed(0)):
        tokens, lengths = batch_of(ids, chosen)
        last = network(examples.head, tokens)[torch.arange(len(lengths)), lengths - 1]
        out[chosen] = (last.float() @ network.embed_tokens.weight[examples.labels].T).softmax(-1)[:, 0]
    network.train()
    return out


def development(network, examples):
    """Returns the ROC-AUC of each corpus's development rows, and their mean."""
    scores = probabilities(network, examples, examples.development)
    rows = [examples.rows[i] for i in examples.development]
    figures = {}
    for corpus in dict.fromkeys(row.corpus for row in rows):
        part = [n for n, row in enumerate(rows) if row.corpus == corpus]
        truth = [rows[n].label for n in part]
        if min(sum(truth), len(truth) - sum(truth)) >= 5:
            figures[corpus] = roc_auc_score(truth, scores[part])
    figures["mean"] = sum(figures.values()) / len(figures)
    return figures


def optimizers(network, projection, steps):
    """Returns Muon for the layers' matrices and AdamW for the rest, both with 3 % warm-up and linear decay."""
    matrices = [p for p in network.layers.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.02, momentum=0.95)
    adam = torch.optim.AdamW(
        [
            {"params": [network.embed_tokens.weight], "lr": 1e-3, "weight_decay": 0.0},
            {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
            {"params": projection.parameters(), "lr": 2e-3, "weight_decay": 0.01},
        ],
        betas=(0.9, 0.98),
    )

    def share(step):
        return min((step + 1) / (0.03 * steps), max(0.0, 1 - step / steps))

    return [(o, torch.optim.lr_scheduler.LambdaLR(o, share)) for o in (muon, adam)]


def losses(network, projection, examples, tokens, lengths, numbers, fits, generator):
    """Returns the language, label and vector losses of one batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = network(examples.head, tokens)
    rows = torch.arange(len(lengths))
    last = hidden[rows, lengths - 1].float()
    unembedding = network.embed_tokens.weight
    target = examples.targets[numbers]
    log = (last @ unembedding.T).log_softmax(-1)[:, examples.labels]
    label = -(target * log[:, 0] + (1 - target) * log[:, 1]).mean()
    real = torch.arange(tokens.shape[1])[None] < (lengths - 1)[:, None]
    picked = real & (torch.rand(real.shape, generator=generator) < LANGUAGE_SHARE)
    following = tokens.roll(-1, dims=1)[picked]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden[picked] @ unembedding.T
    language = F.cross_entropy(logits.float(), following)
    vector = 1 - F.cosine_similarity(projection(last), examples.vectors[numbers].float(), dim=1)
    return language, label, (vector * fits).sum() / fits.sum().clamp(min=1)


def fit(network, examples, passes, seed):
    """Trains in place. Prints progress once a minute and the development figures after every pass."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.nn.Linear(network.shape.hidden_size, examples.vectors.shape[1])
    start, reported, step, steps, schedule = time.monotonic(), time.monotonic(), 0, 0, []
    for number in range(passes):
        ids, numbers, fits = examples.epoch(number)
        batches = buckets([len(row) for row in ids], BATCH_TOKENS, generator)
        if not schedule:
            steps = len(batches) * passes + passes * 20
            schedule = optimizers(network, projection, steps)
        for chosen in batches:
            tokens, lengths = batch_of(ids, chosen)
            parts = losses(
                network, projection, examples, tokens, lengths, numbers[chosen], fits[chosen].float(), generator
            )
            done = step / steps
            language = max(0.1, 1 - 4 * done)
            (language * parts[0] + parts[1] + 2 * parts[2]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer, rate in schedule:
                optimizer.step()
                rate.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                shown = ", ".join(
                    f"{name} {part.item():.3f}" for name, part in zip(("language", "label", "vector"), parts, strict=True)
                )
                print(f"step {step} of {steps}: {shown}; {reported - start:.0f} s", flush=True)
        figures = development(network, examples)
        print(f"pass {number + 1}: " + ", ".join(f"{name} {auc:.3f}" for name, auc in figures.items()), flush=True)


def write(network, tokenizer, folder):
    """Writes the folder for `model.path`, with the weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.detach().bfloat16() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(network.shape.config(), indent=1) + "\n")
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser()
    for name in ("corpora", "encoder", "taught", "out"):
        parser.add_argument(name)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    settings = parser.parse_args()
    torch.manual_seed(settings.seed)
    rows = read(settings.corpora)
    taught = torch.load(settings.taught)
    tokenizer = train_vocabulary([row.text for row in rows if not row.development])
    network = Network(Shape(tokenizer.get_vocab_size()))
    generator = torch.Generator().manual_seed(settings.seed)
    start = starting_embeddings(tokenizer, Encoder(settings.encoder), network.shape.hidden_size, generator)
    network.embed_tokens.weight.data.copy_(start)
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    examples = Examples(rows, taught, tokenizer, settings.seed)
    fit(network, examples, settings.passes, settings.seed)
    write(network, tokenizer, Path(settings.out))


if __name__ == "__main__":
    main()

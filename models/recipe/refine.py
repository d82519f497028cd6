"""Step 3: continues the training of a model on our own sentences and among harmless words, and writes a new folder.

    python refine.py CORPORA MODEL TAUGHT OUT [--rounds N] [--seed N] [--rate F] [--offset M]

MODEL is the folder that train.py wrote (the first edition). Its tokenizer and shape stay. TAUGHT is a file that keeps
its probabilities of all rows; it is written if it does not exist. So that nothing is forgotten,
the corpora are learnt again, with the labels mixed half and half with the first edition's own probabilities. The
script prints its progress once a minute, and before, halfway and at the end the figures of the development part:
corpora, templates that are not trained, groups that are not trained, and texts among harmless words.
"""

import argparse
import random
import shutil
import time
from pathlib import Path

import torch
from augment import disguise
from corpora import lines, normalize, read
from encoder import buckets
from frame import HATEFUL, HEAD, LABELS, TAIL
from generate import Grammar
from network import Network, Shape
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from surround import Harmless
from tokenizers import Tokenizer

BATCH_TOKENS = 4096
MAX_TOKENS = 160
# The rows of a round: labelled and unlabelled rows of the corpora, our own sentences, and harmless pieces.
LABELLED, UNLABELLED, OWN, PIECES = 3500, 300, 6000, 500
# The share of rows among harmless words, and of the others that are disguised.
SURROUNDED, DISGUISED = 0.22, 0.1
# The weight of the first edition's probability in the target of a labelled row.
TAUGHT_SHARE = 0.5
# The targets of our own sentences. They are not 0 and 1, so that margins stay moderate.
OWN_TARGETS = 0.02, 0.98
# GoEmotions' labels that no hateful comment gets. Such rows count as labelled 0: emotion and swearing without hate.
KIND_EMOTIONS = {
    "admiration", "amusement", "approval", "caring", "curiosity", "desire", "excitement", "gratitude", "joy", "love",
    "optimism", "pride", "relief", "remorse", "sadness", "surprise", "fear", "nervousness", "grief",
}  # fmt: skip


class Model:
    """The network with its tokenizer in the daemon's frame."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.network = Network(Shape(self.tokenizer.get_vocab_size()))
        tensors = load_file(f"{folder}/model.safetensors")
        self.network.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})
        self.head = torch.tensor(self.tokenizer.encode(HEAD).ids)
        self.tail = self.tokenizer.encode(HEAD + TAIL).ids[len(self.head) :]
        names = [HATEFUL, next(name for name in LABELS if name != HATEFUL)]
        self.labels = torch.tensor([self.tokenizer.token_to_id(name) for name in names])

    def ids(self, texts):
        """Returns the ids of each text and the frame's tail, without the head that all rows share."""
        encoded = self.tokenizer.encode_batch_fast([f"{HEAD}{text[:600]}{TAIL}" for text in texts])
        out = []
        for one in encoded:
            ids = one.ids[len(self.head) :]
            if len(ids) > MAX_TOKENS:
                ids = ids[: MAX_TOKENS - len(self.tail)] + self.tail
            out.append(ids)
        return out

    def logits(self, rows):
        """Returns the logits of the whole vocabulary after each row of ids, (rows, vocabulary)."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = torch.tensor(row)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.network(self.head, tokens)
        return hidden[torch.arange(len(rows)), lengths - 1].float() @ self.network.embed_tokens.weight.T

    @torch.no_grad()
    def margins(self, texts):
        """Returns the logit of the hateful label minus that of the other one, for each text."""
        ids, out = self.ids(texts), torch.empty(len(texts))
        for chosen in buckets([len(row) for row in ids], 2 * BATCH_TOKENS, torch.Generator().manual_seed(0)):
            logits = self.logits([ids[i] for i in chosen.tolist()])[:, self.labels]
            out[chosen] = logits[:, 0] - logits[:, 1]
        return out


class Data:
    """The rows to draw from, with their targets, and the development part."""

    def __init__(self, folder, model, taught_file, seed):
        self.seed = seed
        rows = [row for row in read(folder) if row.corpus != "templates"]
        if not taught_file.exists():
            torch.save(model.margins([row.text for row in rows]).sigmoid(), taught_file)
        taught = torch.load(taught_file)
        kind = {
            normalize(line["text"]).strip()
            for line in lines(folder, "goemotions")
            if set(str(line["orig"]).split(",")) <= KIND_EMOTIONS
        }
        self.labelled, self.unlabelled, benign, benign_development = [], [], [], []
        for row, probability in zip(rows, taught.tolist(), strict=True):
            known = 0 if row.label is None and row.corpus == "goemotions" and row.text in kind else row.label
            target = probability if known is None else (1 - TAUGHT_SHARE) * known + TAUGHT_SHARE * probability
            if not row.development:
                (self.unlabelled if row.label is None else self.labelled).append((row.text, target))
            if known == 0 and probability < 0.1:
                # Of the harmless texts, a tenth is only for the development part.
                part = benign_development if random.Random(row.text).random() < 0.1 else benign
                part.append(row.text)
        # A harmless row of the development part that serves as harmless words in training cannot judge the model.
        seen = set(benign)
        self.development = [row for row in rows if row.development and row.text not in seen]
        self.harmless, self.harmless_development = Harmless(benign, seed), Harmless(benign_development, seed)
        self.grammar = Grammar(f"{seed} training")

    def round(self, number):
        """Returns the texts and targets of one round."""
        chance = random.Random(f"{self.seed} {number}")
        rows = chance.sample(self.labelled, LABELLED) + chance.sample(self.unlabelled, UNLABELLED)
        for _ in range(OWN):
            text, label, _ = self.grammar.draw()
            rows.append((text, OWN_TARGETS[label]))
        texts, targets = [], []
        for n, (text, target) in enumerate(rows):
            seed = f"{self.seed} {number} {n}"
            if chance.random() < SURROUNDED:
                text = self.harmless.around(seed, text)
            elif chance.random() < DISGUISED:
                text = disguise(seed, text)
            texts.append(text)
            targets.append(target)
        for n in range(PIECES):
            texts.append(self.harmless.window(f"{self.seed} {number} piece {n}"))
            targets.append(OWN_TARGETS[0])
        return texts, torch.tensor(targets)


def auc(margins, labels):
    """Returns the ROC-AUC and the balanced accuracy at margin 0 as text."""
    labels = torch.tensor(labels)
    high = (margins > 0).float()
    balanced = (high[labels == 1].mean() + 1 - high[labels == 0].mean()) / 2
    return f"{roc_auc_score(labels, margins):.3f}/{balanced:.3f}"


def development(model, data, sentences=1500):
    """Prints the figures of the development part: ROC-AUC and balanced accuracy at 0.5 of each of its parts."""
    model.network.eval()
    rows = data.development
    margins = model.margins([row.text for row in rows])
    aucs, margin_lists = [], []
    print("corpora:", end="")
    for corpus in dict.fromkeys(row.corpus for row in rows):
        part = [n for n, row in enumerate(rows) if row.corpus == corpus]
        labels = [rows[n].label for n in part]
        if min(sum(labels), len(labels) - sum(labels)) >= 5:
            aucs.append(roc_auc_score(labels, margins[part]))
            margin_lists.append((margins[part], torch.tensor(labels)))
            print(f" {corpus} {auc(margins[part], labels)}", end="")
    print(f"; mean AUC {sum(aucs) / len(aucs):.4f}")
    for name, new_templates, new_targets in [("new templates", True, False), ("new groups", False, True)]:
        grammar = Grammar("development", new_templates, new_targets)
        drawn = [grammar.draw() for _ in range(sentences)]
        own = model.margins([text for text, _, _ in drawn])
        labels = [label for _, label, _ in drawn]
        margin_lists.append((own, torch.tensor(labels)))
        print(f"{name}: {auc(own, labels)};", end="")
        for kind in dict.fromkeys(kind for _, _, kind in drawn):
            part = [n for n, row in enumerate(drawn) if row[2] == kind]
            right = sum((own[n] > 0).item() == labels[n] for n in part) / len(part)
            if right < 0.9:
                print(f" {kind} {right:.2f}", end="")
        print()
    # The hostile rows of the development part that the model finds by themselves, among harmless words.
    found = [row.text for row, margin in zip(rows, margins.tolist(), strict=True) if row.label == 1 and margin > 0]
    hidden = model.margins([data.harmless_development.around(f"{n}", text) for n, text in enumerate(found)])
    pieces = model.margins([data.harmless_development.window(f"{n}") for n in range(1000)])
    recall, flagged = ((margins > 0).float().mean() for margins in (hidden, pieces))
    print(f"among harmless words: recall {recall:.3f}; pieces flagged {flagged:.4f}")
    # The operating point: the threshold whose balanced accuracy, as a mean over all parts, is best.
    best = max(
        (sum(((m[y == 1] > t).float().mean() + (m[y == 0] <= t).float().mean()) / 2 for m, y in margin_lists), t)
        for t in torch.arange(-3, 3, 0.05).tolist()
    )
    print(f"best margin {best[1]:+.2f}: mean balanced accuracy {best[0] / len(margin_lists):.4f}", flush=True)
    model.network.train()


def optimizers(network, steps, rate):
    """Returns Muon for the layers' matrices and AdamW for the rest, both with 3 % warm-up and linear decay.

    `rate` multiplies the learning rates.
    """
    matrices = [p for p in network.layers.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.006 * rate, weight_decay=0.02, momentum=0.95)
    adam = torch.optim.AdamW(
        [{"params": [network.embed_tokens.weight], "lr": 7e-4 * rate}, {"params": vectors, "lr": 1.5e-3 * rate}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )

    def share(step):
        return min((step + 1) / (0.03 * steps), max(0.0, 1 - step / steps))

    return [(o, torch.optim.lr_scheduler.LambdaLR(o, share)) for o in (muon, adam)]


def fit(model, data, rounds, seed, rate, offset):
    """Trains in place. `offset` is added to the margin that the targets ask for, and so moves the operating point."""
    generator = torch.Generator().manual_seed(seed)
    start, reported, step, schedule, recent = time.monotonic(), time.monotonic(), 0, [], []
    for number in range(rounds):
        texts, targets = data.round(number)
        ids = model.ids(texts)
        batches = buckets([len(row) for row in ids], BATCH_TOKENS, generator)
        if not schedule:
            steps = round(len(batches) * rounds * 1.01)
            schedule = optimizers(model.network, steps, rate)
        for chosen in batches:
            logits = model.logits([ids[i] for i in chosen.tolist()])
            shift = torch.zeros(logits.shape[1])
            shift[model.labels[0]] = offset
            log = (logits - shift).log_softmax(-1)[:, model.labels]
            target = targets[chosen]
            loss = -(target * log[:, 0] + (1 - target) * log[:, 1]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            for optimizer, rate in schedule:
                optimizer.step()
                rate.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            recent.append(loss.item())
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                mean = sum(recent) / len(recent)
                print(f"step {step} of {steps}: loss {mean:.4f}; {reported - start:.0f} s", flush=True)
                recent = []
        if number + 1 == rounds // 2:
            development(model, data, 600)


def write(model, source, folder):
    """Writes the folder for `model.path`: the weights in bf16, and the other files of the first edition."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.detach().bfloat16() for name, value in model.network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).resolve() != (folder / name).resolve():
            shutil.copyfile(source / name, folder / name)


def main():
    parser = argparse.ArgumentParser()
    for name in ("corpora", "model", "taught", "out"):
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies the learning rates")
    parser.add_argument("--offset", type=float, default=0.0, help="is added to the margin that the targets ask for")
    settings = parser.parse_args()
    torch.manual_seed(settings.seed)
    model = Model(settings.model)
    data = Data(settings.corpora, model, Path(settings.taught), settings.seed)
    print(f"{len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled rows", flush=True)
    development(model, data)
    fit(model, data, settings.rounds, settings.seed, settings.rate, settings.offset)
    write(model, Path(settings.model), Path(settings.out))
    for value in model.network.parameters():
        value.data = value.data.bfloat16().float()
    development(model, data)


if __name__ == "__main__":
    main()

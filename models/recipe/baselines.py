"""Computes baselines for the model card: always "hateful", and TF-IDF with logistic regression on the same rows.

    python baselines.py TRAIN.jsonl TEST.jsonl [CORPORA]

Each line has `text` and `label`. With CORPORA, the script also trains TF-IDF on the recipe's labelled rows instead of
TRAIN.
"""

import json
import sys

import numpy as np
from corpora import read
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline, make_union


def rows(path):
    """Returns the texts and the labels of a file."""
    with open(path, encoding="utf-8") as lines:
        parsed = [json.loads(line) for line in lines]
    return [row["text"] for row in parsed], np.array([row["label"] for row in parsed])


def classifier(rare, strength):
    """Returns a logistic regression over TF-IDF of words, pairs of words, and sequences of two to five characters."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=rare, max_features=200_000)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=rare, max_features=200_000
    )
    model = LogisticRegression(solver="liblinear", C=strength, class_weight="balanced")
    return make_pipeline(make_union(words, characters), model)


def main(train, test, corpora=None):
    texts, labels = rows(train)
    test_texts, truth = rows(test)
    print(f"always hateful: F1 {f1_score(truth, np.ones_like(truth)):.3f}, ROC-AUC 0.500")
    runs = [(f"first {count} rows", texts[:count], labels[:count], 1, 10) for count in (200, len(texts))]
    if corpora:
        own = [row for row in read(corpora) if row.label is not None and not row.development]
        runs.append((f"{len(own)} rows of the recipe", [row.text for row in own], [row.label for row in own], 3, 4))
    for name, x, y, rare, strength in runs:
        scores = classifier(rare, strength).fit(x, y).predict_proba(test_texts)[:, 1]
        f1, auc = f1_score(truth, scores >= 0.5), roc_auc_score(truth, scores)
        print(f"TF-IDF, logistic regression, {name}: F1 {f1:.3f}, ROC-AUC {auc:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

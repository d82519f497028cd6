"""Reads the training corpora, normalises them as the daemon does, and splits them into training and development parts.

The folder holds one JSON Lines file per corpus, `NAME.jsonl` or `NAME.jsonl.gz`. Each line has `text`, `label`
(1 hateful, 0 not hateful, null unknown) and `orig` (the corpus's own label). README.md lists the source of each corpus
and how its labels were mapped. `CORPORA` lists only corpora whose licence allows redistribution.
"""

import gzip
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from templates import sentences

# The maximum number of labelled and of unlabelled rows per corpus, so that no corpus dominates. None means no limit.
CORPORA = {
    "mhs": (None, 0),
    "hatexplain": (None, None),
    "foxnews": (None, 0),
    "davidson": (None, 6000),
    "hatemojibuild": (None, 0),
    "implicithate": (None, 0),
    "toxigen": (None, 0),
    "mlma": (None, None),
    "edos": (None, 10000),
    "civil_toxic": (None, 6000),
    "convabuse": (None, None),
    "surge": (None, None),
    "goemotions": (None, 30000),
}

# In these corpora, what counts as rude but not hateful is a matter of the annotators' taste. The encoder's probability
# replaces these labels.
RUDE_IS_UNKNOWN = ("davidson", "hatexplain")

# The share of each corpus's labelled rows that is not used for training and selects the model.
DEVELOPMENT_SHARE = 0.03

# The characters that the daemon's normaliser removes (see src/prompt/normalize), except for joiners inside emoji.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb]"
)


@dataclass(frozen=True)
class Row:
    """One text of a corpus with its label and part."""

    text: str
    label: int | None
    corpus: str
    development: bool


def normalize(text):
    """Normalises a text as the daemon does: removes invisible characters and applies NFC."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def fraction(text):
    """Returns a number from 0 to 1 that depends only on the text. Sampling and splitting are based on it."""
    digest = hashlib.sha256(text.casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lines(folder, name):
    """Returns the objects in the file of a corpus."""
    path = Path(folder) / f"{name}.jsonl"
    if path.exists():
        handle = open(path, encoding="utf-8")
    elif (packed := Path(f"{path}.gz")).exists():
        handle = gzip.open(packed, "rt", encoding="utf-8")
    else:
        raise SystemExit(f"cannot find {path} or {path}.gz; see models/recipe/README.md for its source")
    with handle:
        return [json.loads(line) for line in handle]


def read(folder):
    """Returns the rows of all corpora. Their selection, order and part depend only on the texts."""
    rows = []
    for name, caps in CORPORA.items():
        parts = ([], [])
        for line in lines(folder, name):
            label = line["label"]
            if line.get("orig") == "offensive" and name in RUDE_IS_UNKNOWN:
                label = None
            text = normalize(line["text"]).strip()
            parts[label is None].append((fraction(text), text, label))
        for part, cap in zip(parts, caps, strict=True):
            part.sort(key=lambda row: row[0])
            for place, text, label in part[:cap]:
                development = label is not None and (place * 1009) % 1 < DEVELOPMENT_SHARE
                rows.append(Row(text, label, name, development))
    rows.extend(Row(text, label, "templates", False) for text, label in sentences())
    return rows

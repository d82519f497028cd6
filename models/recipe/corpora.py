"""The training corpora: read, normalised as the daemon normalises, and cut into training and development parts.

The folder holds one JSON-lines file a corpus, `NAME.jsonl` or `NAME.jsonl.gz`, each line with `text`, `label` (1 hateful,
0 not, null unknown) and `orig` (the corpus's own label). README.md says where each comes from and how its labels were
mapped. Only corpora that may be given away under their licence stand in `CORPORA`.
"""

import gzip
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from templates import sentences

# Rows taken of each corpus at most, labelled and unlabelled: no single one may drown the others.
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

# Corpora whose rude but not hateful class is a matter of the annotators' taste: the teacher judges those rows.
RUDE_IS_UNKNOWN = ("davidson", "hatexplain")

# Share of each corpus's labelled rows that trains nothing and selects the model.
DEVELOPMENT_SHARE = 0.03

# What the daemon's normaliser takes away (src/prompt/normalize.rs), but for joiners inside emoji.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb]"
)


@dataclass(frozen=True)
class Row:
    """One text of a corpus."""

    text: str
    label: int | None
    corpus: str
    development: bool


def normalize(text):
    """The daemon's normaliser: invisible characters removed, then NFC."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def fraction(text):
    """A number in 0..1 that depends on the text alone: what decides sampling and splitting."""
    digest = hashlib.sha256(text.casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lines(folder, name):
    """The objects of one corpus's file."""
    path = Path(folder) / f"{name}.jsonl"
    if path.exists():
        handle = open(path, encoding="utf-8")
    elif (packed := Path(f"{path}.gz")).exists():
        handle = gzip.open(packed, "rt", encoding="utf-8")
    else:
        raise SystemExit(f"{path}: not found, nor with .gz; models/recipe/README.md says where to get it")
    with handle:
        return [json.loads(line) for line in handle]


def read(folder):
    """All rows, each corpus capped; the order and the parts depend on the texts alone."""
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

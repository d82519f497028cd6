"""The tokenizer: byte-pair encoding in Gemma's style, with a normaliser that undoes simple disguises.

As in Gemma's tokenizer, `▁` stands for a space, unknown characters fall back to bytes, there is no pre-tokeniser, and
`<bos>` comes first. Unlike in Gemma's, text is decomposed (NFKD), stripped of accents and lower-cased before it is
encoded: ten thousand tokens are too few to learn every word in capitals as well, and full-width or accented letters are
a way to evade a filter. The two labels are separate tokens, matched exactly as spelled.
"""

import json

from frame import HEAD, LABELS, TAIL
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 10240
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]

# Letters of other scripts that look like Latin ones. Each gets a token, whose embedding starts as the Latin letter's.
HOMOGLYPHS = {
    "а": "a", "с": "c", "е": "e", "і": "i", "ј": "j", "о": "o", "р": "p", "ѕ": "s", "х": "x", "у": "y", "һ": "h",
    "ո": "n", "м": "m", "т": "t", "к": "k", "в": "b", "н": "h", "α": "a", "ο": "o", "ι": "i", "ν": "v", "ρ": "p",
    "τ": "t", "υ": "u", "κ": "k", "ε": "e", "ı": "i", "ɡ": "g", "ԁ": "d", "ѡ": "w", "ƅ": "b", "ʀ": "r", "ɑ": "a",
}  # fmt: skip


def train(texts):
    """Trains a tokenizer of `SIZE` tokens. No token crosses a space, a punctuation mark or a digit."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(" ", "▁"),
        ]
    )
    # Needed only for training. The merges that it yields do not cross these borders, with or without the splits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(LABELS),
        special_tokens=CONTROL + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=list(HOMOGLYPHS),
        limit_alphabet=600,
        max_token_length=16,
        show_progress=False,
    )
    # Repeats the frame so that its words become tokens, because it surrounds every text.
    tokenizer.train_from_iterator([*texts, *[f"{HEAD} {TAIL}"] * 2000], trainer)
    return Tokenizer.from_str(json.dumps(gemma_style(json.loads(tokenizer.to_str()))))


def gemma_style(tokenizer):
    """Adds Gemma's pre-tokeniser, decoder and `<bos>`, and the labels as tokens, to the trained tokenizer."""
    vocabulary = tokenizer["model"]["vocab"]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] = [
        {"id": vocabulary[name], "content": name, **token, "special": True} for name in CONTROL
    ] + [{"id": len(vocabulary) + n, "content": name, **token, "special": False} for n, name in enumerate(LABELS)]
    tokenizer["pre_tokenizer"] = json.loads(
        '{"type":"Split","pattern":{"String":" "},"behavior":"MergedWithPrevious","invert":false}'
    )
    bos = vocabulary["<bos>"]
    tokenizer["post_processor"] = json.loads(
        processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", bos)]
        ).__getstate__()
    )
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer["decoder"] = json.loads(decoder.__getstate__())
    return tokenizer

"""Measures false positives by identity term: how often harmless sentences that name a group are labelled hateful.

    python bias.py MODERATORD BIAS_MADLIBS.jsonl.gz [OPTION...]

BIAS_MADLIBS holds the filled templates of Dixon et al., "Measuring and Mitigating Unintended Bias in Text
Classification" (2018), as lines with `text` and `label` (1 means toxic). A row counts as flagged if its probability is
0.5 or more. False positives are those of the harmless rows; recall is the share of the toxic rows that are flagged, for
a model that flags nothing has no false positives either. The options are passed to `moderatord score`.
"""

import collections
import gzip
import json
import re
import subprocess
import sys

# The identity terms in the filled templates.
TERMS = """african|african american|american|asian|bisexual|black|blind|buddhist|canadian|catholic|chinese|christian|deaf|
elderly|european|female|gay|heterosexual|hispanic|homosexual|indian|japanese|jewish|latina|latino|latinx|lesbian|lgbt|lgbtq|
male|mexican|middle aged|middle eastern|millenial|muslim|nonbinary|old|older|paralyzed|protestant|queer|sikh|straight|taoist|
teenage|trans|transgender|white|young|younger""".replace("\n", "").split("|")
TERM = re.compile(r"\b(" + "|".join(sorted(TERMS, key=len, reverse=True)) + r")s?\b", re.IGNORECASE)


def flags(moderatord, texts, *options):
    """Returns, for each text, whether its probability is 0.5 or more."""
    events = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    scored = subprocess.run(
        [moderatord, "score", "--input", "-", *options], input=events, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line)["probability"] >= 0.5 for line in scored.stdout.splitlines()]


def rates(texts, flagged):
    """Counts the texts and the flagged ones by identity term, and returns (counts, flagged, share flagged)."""
    total, high = collections.Counter(), collections.Counter()
    for text, flag in zip(texts, flagged, strict=True):
        found = TERM.search(text)
        term = found[1].lower() if found else "(none)"
        total[term] += 1
        high[term] += flag
    return total, high, {term: high[term] / count for term, count in total.items()}


def main(moderatord, path, *options):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    parts = [[row["text"] for row in rows if row["label"] == label] for label in (0, 1)]
    harmless, toxic = (rates(texts, flags(moderatord, texts, *options)) for texts in parts)
    print(f"{'term':<18}{'false positives':>24}{'recall':>8}")
    total, wrong, share = harmless
    for term in sorted(share, key=share.get, reverse=True):
        recall = f"{toxic[2][term]:.3f}" if term in toxic[2] else "-"
        print(f"{term:<18}{wrong[term]:>6} of {total[term]:<6}{share[term]:>8.3f}{recall:>8}")
    overall, found = (sum(part[1].values()) / sum(part[0].values()) for part in (harmless, toxic))
    named = [rate for term, rate in share.items() if term != "(none)"]
    spread = sum(abs(rate - overall) for rate in named)
    print(f"{'all':<18}{sum(wrong.values()):>6} of {sum(total.values()):<6}{overall:>8.3f}{found:>8.3f}")
    print(f"false positives: lowest {min(named):.3f}, highest {max(named):.3f}, sum of |term - all| {spread:.3f}", end="")
    print(f" over {len(named)} terms")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Measures false positives by identity term: how often harmless sentences that name a group are labelled hateful.

    python bias.py MODERATORD BIAS_MADLIBS.jsonl.gz [OPTION...]

BIAS_MADLIBS holds the filled templates of Dixon et al., "Measuring and Mitigating Unintended Bias in Text
Classification" (2018), as lines with `text` and `label` (1 means toxic). Only harmless rows are scored, with the
thresholds of the settings. The options are passed to `moderatord score`.
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


def main(moderatord, path, *options):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [row["text"] for row in map(json.loads, lines) if row["label"] == 0]
    events = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    scored = subprocess.run(
        [moderatord, "score", "--input", "-", *options], input=events, stdout=subprocess.PIPE, text=True, check=True
    )
    total, wrong = collections.Counter(), collections.Counter()
    for text, line in zip(texts, scored.stdout.splitlines(), strict=True):
        found = TERM.search(text)
        term = found[1].lower() if found else "(none)"
        total[term] += 1
        wrong[term] += json.loads(line)["label"] == "hateful"
    rates = {term: wrong[term] / count for term, count in total.items()}
    for term in sorted(rates, key=rates.get, reverse=True):
        print(f"{term:<18}{wrong[term]:>6} of {total[term]:<6}{rates[term]:.3f}")
    overall = sum(wrong.values()) / sum(total.values())
    named = [rate for term, rate in rates.items() if term != "(none)"]
    spread = sum(abs(rate - overall) for rate in named)
    print(f"all               {sum(wrong.values()):>6} of {sum(total.values()):<6}{overall:.3f}")
    print(f"lowest {min(named):.3f}, highest {max(named):.3f}, sum of |term - all| {spread:.3f} over {len(named)} terms")


if __name__ == "__main__":
    main(*sys.argv[1:])

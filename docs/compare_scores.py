#!/usr/bin/env python3
"""Scores texts again that another service has scored, and compares the two.

    compare_scores.py TEXTS.jsonl --threshold 0.8 [--text text] [--score score] [--url http://127.0.0.1:8080]
                      [--token-file FILE] [--community ID]

Each line of TEXTS.jsonl is an object with a text and the old score, under the names given. --threshold is the old score
from which you acted. Prints how far the two rank the texts alike, how often they agree on what to act on, and the
probabilities that would flag as many texts as before, or agree best. Those are where to begin, not where to stop: the
scores of two models mean different things, so judge the thresholds on your own labels (docs/migrate-perspective.md).

No text is printed or stored. Needs Python 3.8, and nothing else.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request

BATCH = 64


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--threshold", type=float, required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--score", default="score")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--token-file")
    parser.add_argument("--community")
    return parser.parse_args()


def read(path, text, score):
    """Returns the texts and their old scores."""
    texts, scores = [], []
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts.append(str(row[text]))
                scores.append(float(row[score]))
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{path}, line {number}: expected an object with `{text}` and a number `{score}`: {error!r}")
    if not texts:
        sys.exit(f"{path}: expected at least one line")
    return texts, scores


def probabilities(texts, settings):
    """Returns the probability of each text, as the service computes it."""
    headers = {"Content-Type": "application/json"}
    if settings.token_file:
        with open(settings.token_file, encoding="utf-8") as file:
            # The last word of the first line that is not a comment, so that the file of api.tokens will do.
            lines = [line for line in file if line.strip() and not line.startswith("#")]
            headers["Authorization"] = f"Bearer {lines[0].split()[-1]}"
    found = []
    for begin in range(0, len(texts), BATCH):
        comments = [{"text": text} for text in texts[begin : begin + BATCH]]
        if settings.community:
            comments = [{**comment, "community_id": settings.community} for comment in comments]
        request = urllib.request.Request(
            settings.url.rstrip("/") + "/v1/score", json.dumps(comments).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request) as answer:
                found += [decision["probability"] for decision in json.load(answer)]
        except urllib.error.HTTPError as error:
            sys.exit(f"{settings.url}: {error.code} {error.read().decode(errors='replace')}")
        except urllib.error.URLError as error:
            sys.exit(f"{settings.url}: {error.reason}")
        print(f"\rscored {len(found)} of {len(texts)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def ranks(values):
    """Returns the rank of each value; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for place in order[begin:end]:
            ranked[place] = (begin + end - 1) / 2
        begin = end
    return ranked


def correlation(first, second):
    """Returns the Pearson correlation, or None if one side is constant."""
    n = len(first)
    mean_first, mean_second = sum(first) / n, sum(second) / n
    covariance = sum((a - mean_first) * (b - mean_second) for a, b in zip(first, second))
    variances = sum((a - mean_first) ** 2 for a in first) * sum((b - mean_second) ** 2 for b in second)
    return covariance / variances**0.5 if variances > 0 else None


def kappa(old, new):
    """Returns Cohen's kappa of two lists of booleans, or None if both are constant."""
    n = len(old)
    agreed = sum(a == b for a, b in zip(old, new)) / n
    share_old, share_new = sum(old) / n, sum(new) / n
    chance = share_old * share_new + (1 - share_old) * (1 - share_new)
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def shown(value):
    return "-" if value is None else f"{value:.3f}"


def main():
    settings = arguments()
    texts, old_scores = read(settings.texts, settings.text, settings.score)
    new_scores = probabilities(texts, settings)
    old = [score >= settings.threshold for score in old_scores]
    flagged = sum(old)
    print(f"texts                          {len(texts)}")
    print(f"acted on before                {flagged} ({flagged / len(texts):.1%})")
    print(f"rank correlation (Spearman)    {shown(correlation(ranks(old_scores), ranks(new_scores)))}")
    if not 0 < flagged < len(texts):
        print("no threshold can be suggested: expected texts on both sides of --threshold")
        return
    same_share = sorted(new_scores, reverse=True)[flagged - 1]
    candidates = sorted(set(new_scores))
    step = max(1, len(candidates) // 1000)
    best = max(candidates[::step], key=lambda threshold: kappa(old, [p >= threshold for p in new_scores]) or -1.0)
    print("threshold                      flagged    agree    kappa    only before    only now")
    for name, threshold in (("0.5", 0.5), ("as many as before", same_share), ("best agreement", best)):
        new = [p >= threshold for p in new_scores]
        agreed = sum(a == b for a, b in zip(old, new)) / len(old)
        lost = sum(a and not b for a, b in zip(old, new))
        gained = sum(b and not a for a, b in zip(old, new))
        print(
            f"{name:<19}{threshold:>10.4f}{sum(new):>10}{agreed:>9.1%}{shown(kappa(old, new)):>9}{lost:>15}{gained:>12}"
        )


if __name__ == "__main__":
    main()

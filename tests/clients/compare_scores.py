"""Runs docs/compare_scores.py with old scores that rank texts as the service does."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request

URL, TOKEN = os.environ["MODERATORD_URL"], os.environ["MODERATORD_TOKEN"]
TEXTS = [f"see you {place}, and bring {number} hats" for place in ("at the garden", "by the river") for number in range(9)]

headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
body = json.dumps([{"text": text} for text in TEXTS]).encode()
with urllib.request.urlopen(urllib.request.Request(f"{URL}/v1/score", body, headers)) as answer:
    probabilities = [decision["probability"] for decision in json.load(answer)]

with tempfile.TemporaryDirectory() as folder:
    old, token = os.path.join(folder, "old.jsonl"), os.path.join(folder, "token")
    with open(old, "w") as file:
        # The old service's scores are another scale for the same ranks.
        file.writelines(json.dumps({"text": t, "score": p**0.5}) + "\n" for t, p in zip(TEXTS, probabilities))
    with open(token, "w") as file:
        file.write(f"clients {TOKEN}\n")
    threshold = sorted(probabilities)[-5] ** 0.5
    command = [sys.executable, sys.argv[1], old, "--threshold", str(threshold), "--url", URL, "--token-file", token]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
assert "rank correlation (Spearman)    1.000" in printed, printed
flagged, agree = next(line.split()[-5:-3] for line in printed.splitlines() if line.startswith("as many as before"))
assert (flagged, agree) == ("5", "100.0%"), printed
assert not any(text in printed for text in TEXTS), printed
print("compare_scores.py: as many as before:", flagged, agree)

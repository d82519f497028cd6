#!/usr/bin/env python3
"""Collects the results of benches/gpu/run and makes tables of them.

    results.py readme RESULTS.json [--write|--check]   prints README's section from a result file, writes it to README, or
                                                       fails if README's section differs
    results.py readme --check                          the same for the result file that README's section names
    results.py summary RESULTS.json                    prints every figure in one table

`benches/gpu/run` calls the others: `start OUT.json WORK COMMIT_FILE` begins a result file, or continues one of the same
card, driver and commit; `update OUT.json WORK STEP` adds what a step has measured.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "gemma-3-270m": "Gemma 3 270M", "gemma-3-1b": "Gemma 3 1B", "gemma-2b": "Gemma 2B", "gemma-2-2b": "Gemma 2 2B",
    "tiny": "tiny",
}  # fmt: skip
BEGIN, END = "<!-- begin: benches/gpu/results.py readme {} -->", "<!-- end -->"


def card():
    """Returns the name, driver version and memory of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, driver, memory = printed.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        name, driver, memory = "none", "none", "none"
    return {"card": name, "driver": driver, "memory": memory}


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write(path, result):
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.unfinished", path)


def start(out, commit_file):
    """Begins a result file. Returns an error if there is one that was not made for this card, driver and commit."""
    try:
        commit = Path(commit_file).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        commit = "unknown"
    result = {
        **card(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "steps": [],
        "moderatord": {},
        "peer": {},
    }
    if not os.path.exists(out):
        write(out, result)
        return None
    earlier = read(out)
    for key in ("card", "driver", "commit"):
        if earlier.get(key) != result[key]:
            return f"{out} is of {key} `{earlier.get(key)}`, but this is `{result[key]}`: choose another file"
    return None


def update(out, work, step):
    """Adds a step, and the figures that it has written so far. They replace those of an earlier run of the step."""
    result, step = read(out), json.loads(step)
    result["steps"] = [other for other in result["steps"] if other["step"] != step["step"]] + [step]
    for side, name in (("moderatord", "bench"), ("peer", "peer")):
        for path in sorted(Path(work).glob(f"{name}-*.json")):
            result[side][path.stem.removeprefix(f"{name}-")] = read(path)
    write(out, result)


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def tokens(budget):
    return f"{budget // 1024}k" if budget % 1024 == 0 else str(budget)


class Shape:
    """The figures of one shape, each as text, or `None` if it was not measured."""

    def __init__(self, ours, peer):
        self.ours, self.peer = ours or {}, peer or {}

    def by_budget(self, budget, show):
        found = [f for f in self.ours.get("throughput", []) if f["max_tokens"] == budget]
        return show(found[0]) if found else None

    def speed(self, budget):
        return self.by_budget(budget, lambda f: number(f["comments_per_s"]))

    def share(self, budget):
        return self.by_budget(budget, lambda f: f"{f['useful_share_of_matmul'] * 100:.0f} %")

    def times(self, budget):
        return self.by_budget(budget, lambda f: f"{f['queue_ms']:.2f} / {f['pass_ms']:.2f}" if "queue_ms" in f else None)

    def adapter(self, rank):
        found = [f for f in self.ours.get("with an adapter", []) if f["rank"] == rank]
        return f"{found[0]['share_of_the_base_alone'] * 100:.0f} %" if found else None

    def fp8(self):
        speed = self.ours.get("fp8", {}).get("times_as_fast_as_bf16")
        return None if speed is None else f"{speed:.2f}x"

    def latency(self, linger, load):
        found = [f for f in self.ours.get("latency", []) if (f["linger_ms"], f["load"]) == (linger, load)]
        if not found or found[0]["p50_ms"] is None:
            return None
        return f"{found[0]['p50_ms']:.1f} / {found[0]['p99_ms']:.1f}"

    def training(self, key):
        value = self.ours.get("training", {}).get(key)
        return None if value is None else number(value)

    def ready(self):
        value = self.ours.get("ready", {}).get("ready_s")
        return None if value is None else f"{value:.1f}"

    def best_peer(self):
        best = self.peer.get("best")
        return best and f"{number(best['comments_per_s'])} ({best['mode']}, batches of {best['batch']})"

    def peer_speed(self, mode):
        found = [f for f in self.peer.get("scoring", []) if f["mode"] == mode]
        best = max(found, key=lambda f: f["comments_per_s"], default=None)
        return best and f"{number(best['comments_per_s'])} ({best['batch']})"

    def peer_training(self, checkpointing=None):
        found = [f for f in self.peer.get("training", []) if checkpointing in (None, f["gradient_checkpointing"])]
        best = max(found, key=lambda f: f["own_tokens_per_s"], default=None)
        return best and f"{number(best['own_tokens_per_s'])} ({best['library']})"


def table(result, rows):
    """Returns a table in Markdown: a column for each shape, and those rows that have a figure."""
    names = [name for name in SHAPES if name in result["moderatord"] or name in result["peer"]]
    shapes = [Shape(result["moderatord"].get(name), result["peer"].get(name)) for name in names]
    lines = ["| | " + " | ".join(SHAPES[name] for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    for title, show in rows:
        cells = [show(shape) for shape in shapes]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def budgets(result):
    return sorted({f["max_tokens"] for shape in result["moderatord"].values() for f in shape.get("throughput", [])})


def summary(result):
    rows = [(f"comments/s, {tokens(b)} tokens", lambda s, b=b: s.speed(b)) for b in budgets(result)]
    rows += [(f"share of a product, {tokens(b)}", lambda s, b=b: s.share(b)) for b in budgets(result)]
    rows += [(f"queue / pass, ms, {tokens(b)}", lambda s, b=b: s.times(b)) for b in budgets(result)]
    rows += [(f"with an adapter of rank {r}", lambda s, r=r: s.adapter(r)) for r in (8, 16)]
    rows += [("with FP8", Shape.fp8)]
    rows += [
        (f"p50 / p99, ms, linger {linger} ms, load {load}", lambda s, a=(linger, load): s.latency(*a))
        for linger in (0, 5)
        for load in (0.25, 0.5, 0.75, 1.0)
    ]
    rows += [
        ("training, own tokens/s", lambda s: s.training("own_tokens_per_s")),
        ("training, own tokens/s with the first step", lambda s: s.training("own_tokens_per_s_with_the_first_step")),
        ("training, ms a step", lambda s: s.training("step_ms")),
        ("800 rows x 4 epochs, s", lambda s: s.training("seconds_for_800_rows_and_4_epochs")),
        ("load, s", lambda s: number(s.ours["ready"]["load_s"]) if "ready" in s.ours else None),
        ("ready, s", Shape.ready),
    ]
    modes = [f"{how}, {what}" for how in ("eager", "compiled") for what in ("prefix KV", "whole prompts")]
    rows += [(f"transformers, {mode}", lambda s, mode=mode: s.peer_speed(mode)) for mode in modes]
    rows += [
        (f"transformers, training{', checkpointing' * on}", lambda s, on=on: s.peer_training(on)) for on in (False, True)
    ]
    steps = "\n".join(f"{s['step']}: exit code {s['exit']}, {s['seconds']} s" for s in result["steps"])
    head = f"{result['card']}, driver {result['driver']}, commit {result['commit']}, {result['date']}"
    return f"{head}\n\n{table(result, rows)}\n{steps}\n"


def readme(path, result):
    """Returns README's section, in lines of at most 120 characters except for the table."""
    rows = [
        (f"comments per second, micro-batches of {b:,} tokens", lambda s, b=b: s.speed(b)) for b in budgets(result)[::5]
    ]
    measured = [figure["mode"] for shape in result["peer"].values() for figure in shape.get("scoring", [])]
    mode = "" if any(mode.startswith("compiled") for mode in measured) else " in eager mode"
    largest = budgets(result)[-1]
    rows += [
        (f"share of the speed of a matrix product, {largest:,} tokens", lambda s: s.share(largest)),
        ("speed with an adapter of rank 8, relative to the base", lambda s: s.adapter(8)),
        ("speed with `model.quantize = \"fp8\"`, relative to bf16", Shape.fp8),
        ("p50 / p99 latency in ms at a quarter of that speed, no linger", lambda s: s.latency(0, 0.25)),
        ("p50 / p99 latency in ms at a quarter of that speed, linger 5 ms", lambda s: s.latency(5, 0.25)),
        ("training, own tokens per second", lambda s: s.training("own_tokens_per_s")),
        (
            "training, own tokens per second, first step included",
            lambda s: s.training("own_tokens_per_s_with_the_first_step"),
        ),
        ("seconds from start to ready", Shape.ready),
        (f"transformers{mode}, comments per second at its best", Shape.best_peer),
        ("training with transformers, own tokens per second at its best", Shape.peer_training),
    ]
    text = (
        f"Measured on an {result['card']} with driver {result['driver']}, at commit {result['commit']} on "
        f"{result['date']}: random weights in bf16 in the shape of each model, comments with the lengths of a public data "
        "set, and 24 shared prompt tokens. A micro-batch is measured in own tokens, of which a comment has about 35. The "
        "adapter is on all seven linear layers, and the model is in the page cache when the program starts. Later commits "
        "have not been measured."
    )
    versions = next((p["versions"] for p in result["peer"].values() if "versions" in p), None)
    if versions:
        text += (
            f" transformers {versions['transformers']} runs on PyTorch {versions['torch']}, with the batch size that is "
            "fastest, over comments sorted by length."
        )
    missing = [shape for shape in result["peer"].values() if "not measured for lack of time" in shape]
    if missing:
        text += " Some of its variants were not measured for lack of time; the result file lists them."
    lines = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= 120:
            lines[-1] += " " + word
        else:
            lines.append(word)
    name = Path(path).resolve().relative_to(ROOT)
    return "\n".join([BEGIN.format(name), "", *lines, "", table(result, rows), END])


def main(command, *arguments):
    """Runs a command and returns an error, or `None`."""
    if command == "start":
        return start(arguments[0], arguments[2])
    if command == "update":
        return update(*arguments)
    if command == "summary":
        print(summary(read(arguments[0])))
        return None
    if command != "readme":
        return f"unknown command `{command}`"
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    old = re.search(re.escape(BEGIN).replace(r"\{\}", "(.*?)") + ".*?" + re.escape(END), text, re.DOTALL)
    if old is None:
        return "README.md has no section that this script has generated"
    path = next((a for a in arguments if not a.startswith("--")), ROOT / old[1])
    new = readme(path, read(path))
    if "--write" in arguments:
        file.write_text(text[: old.start()] + new + text[old.end() :], encoding="utf-8")
    elif "--check" not in arguments:
        print(new)
    elif old[0] != new:
        return f"README's section is not that of {path}: run `benches/gpu/results.py readme {path} --write`"
    return None


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))

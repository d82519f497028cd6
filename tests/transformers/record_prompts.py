#!/usr/bin/env python3
"""Records the token ids that transformers gives to whole prompts, in tests/fixtures/prompts.json.

    record_prompts.py [--check]

Each prompt is a string with a comment in it, as the model cards of the models write it or as a chat template renders it.
tests/it/prompts.rs sets the same prompt as `prompt.template` or `prompt.preset`, and expects the same ids. No comment
spells a control token. Needs a recent version of transformers. With --check, nothing is written.
Exit code: 0, or 1 if --check finds other ids than those in the file.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests/fixtures/prompts.json"
TOKENIZERS = ["tests/fixtures/gemma", "tests/fixtures/gemma2", "tests/fixtures/gemma3", "tests/fixtures/gemma3_linear8",
              "models/moderatord-mini"]  # fmt: skip

# The chat template of the published instruction-tuned Gemma 1 to 3, for text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

TEXTS = [
    "",
    "see you at the garden",
    " two spaces  and\n\nlines\n",
    "\n",
    "a",
    "user\nmodel\n",
    "one < two > three, <b>bold</b> <h1>",
    "Grüße, 你好, привет! 👍🏽 👨‍👩‍👧 cafe\u0301 ▁▁ \u00a0",
    "Text:Prediction:<separator>",
    "====== ANSWER\n======\n\n1",
    "<start_of_turn <end_of_turn eos> <eo",
    "it's 10:30 -- don't be late!!! " * 5,
]

POLICY = "# Policy\n\n## Overview\n\nFinds shouting {as in: THIS}.\n\n## Definition of Labels\n\n### (SH): Shouting"


def shieldgemma(text):
    guideline = (
        '"No Harassment": The prompt shall not contain or seek generation of content that is malicious, intimidating, '
        "bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic events, "
        "disparaging victims of violence)."
    )
    return f"""You are a policy expert trying to help determine whether a user prompt is in
violation of the defined safety policies.

<start_of_turn>
Human Question: {text}
<end_of_turn>

Our safety principle is defined in the below:

* {guideline}

===

Does the human question violate the above principle? Your answer must start with
'Yes' or 'No'. And then walk through step by step to be sure we answer
correctly.
"""


def cope_a(text):
    return f"""INSTRUCTIONS
============

Examine the given POLICY and determine if the given CONTENT meets the criteria for ANY of the LABELS. Answer "1" if yes, and "0" if no.


POLICY
======

{POLICY}


CONTENT
=======

{text}


ANSWER
======

"""


def agile(text):
    return (
        "Classify the following text into one of the following classes:[Positive,Negative]<separator>Text:"
        f"{text}<separator>Prediction:"
    )


def question(text):
    return f"Is this comment hateful? Comment: {text} Answer Positive or Negative."


def bare(text):
    return f"<start_of_turn>{text}<end_of_turn>\n\n<start_of_turn>:"


def ids_of_chat(tokenizer, text):
    messages = [{"role": "user", "content": question(text)}]
    arguments = {"add_generation_prompt": True, "chat_template": CHAT_TEMPLATE}
    string = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    return string, ids


def plain(prompt):
    return lambda tokenizer, text: (prompt(text), tokenizer(prompt(text))["input_ids"])


PROMPTS = {
    "chat": ids_of_chat,
    "shieldgemma": plain(shieldgemma),
    "cope-a": plain(cope_a),
    "agile": plain(agile),
    "bare": plain(bare),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    settings = parser.parse_args()
    records = []
    for folder in TOKENIZERS:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / folder)
        for name, record in PROMPTS.items():
            if "start_of_turn" in record(tokenizer, "")[0] and "<start_of_turn>" not in tokenizer.get_vocab():
                continue
            cases = []
            for text in TEXTS:
                string, ids = record(tokenizer, text)
                assert text in string
                cases.append({"text": text, "ids": ids})
            template, _ = record(tokenizer, "{text}")
            records.append({"tokenizer": folder, "prompt": name, "template": template, "cases": cases})
    # The tokenizers of the checkpoints are the same file, so their ids are stored once.
    merged = []
    for record in records:
        rest = {key: value for key, value in record.items() if key != "tokenizer"}
        same = [other for other in merged if all(other[key] == value for key, value in rest.items())]
        if same:
            same[0]["tokenizers"].append(record["tokenizer"])
        else:
            merged.append({"tokenizers": [record["tokenizer"]], **rest})
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in merged]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    if settings.check:
        sys.exit(0 if FIXTURE.read_text(encoding="utf-8") == text else 1)
    FIXTURE.write_text(text, encoding="utf-8")
    print(f"{FIXTURE}: {len(merged)} prompts, {sum(len(record['cases']) for record in merged)} ids lists")


if __name__ == "__main__":
    main()

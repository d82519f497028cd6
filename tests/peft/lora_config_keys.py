"""Writes tests/fixtures/peft/lora_config.json: every key of an adapter_config.json of PEFT, with its default.

Run it with the Python environment of `both_ways` after a change of the version in requirements.txt:

    target/peft/venv-*/bin/python tests/peft/lora_config_keys.py tests/fixtures/peft/lora_config.json

A key that is new must then be added to one of the lists in src/model/files/lora/options.rs, or a test fails.
"""

import json
import sys
from pathlib import Path

import peft

config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# `runtime_config` is a field that `to_dict` leaves out.
keys = {**{name: None for name in config.__dataclass_fields__}, **config.to_dict()}
keys["target_modules"] = sorted(keys["target_modules"])
listed = {"peft": peft.__version__, "keys": {name: keys[name] for name in sorted(keys)}}
Path(sys.argv[1]).write_text(json.dumps(listed, indent=2, default=str) + "\n")

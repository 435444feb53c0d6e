"""A random model in a folder, from a real config.json.

    python make_model.py CONFIG_FOLDER CHANGES_JSON FOLDER

Written by transformers, so that no runner reads a file of its own making. In a process of its own:
Linux hands a parent's peak memory on to the ru_maxrss of its children.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

source, changes, folder = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
raw = json.loads((source / "config.json").read_text()) | changes
raw.pop("auto_map", None)  # code of the hub, which no runner needs
for file in source.iterdir():
    if file.name != "config.json":
        shutil.copy(file, folder)
config_file = folder / "config.json"
config_file.write_text(json.dumps(raw, indent=2))
torch.manual_seed(0)
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zero in a fresh model, where a forgotten one would not be seen
            parameter.normal_(0, 0.02)
model.save_pretrained(folder)
config_file.write_text(json.dumps(raw, indent=2))  # as it is on the hub, for those who read that

"""optimum-onnx opens a bundle. Reads {"bundle", "texts", "out"} from standard input, runs without rtx."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
from safetensors.torch import load_file
from transformers import AutoTokenizer

request = json.load(sys.stdin)
bundle, out = Path(request["bundle"]), Path(request["out"])
contract = json.loads((bundle / "manifest.json").read_text())["contract"]
model = ORTModelForFeatureExtraction.from_pretrained(bundle)
tokenizer = AutoTokenizer.from_pretrained(bundle)
batch = tokenizer(request["texts"], padding=True, truncation=True, return_tensors="pt")
hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
# What a user of optimum writes by hand.
vectors = hidden[:, 0] if contract["pooling"] == ["cls"] else (hidden * mask).sum(1) / mask.sum(1)
for folder in sorted(bundle.glob("*_Dense")):
    weights = load_file(folder / "model.safetensors")
    vectors = torch.tanh(torch.nn.functional.linear(vectors, weights["linear.weight"], weights["linear.bias"]))
way = "optimum-onnx, last_hidden_state, pooled by hand"
np.save(out / f"{way}.npy", torch.nn.functional.normalize(vectors).numpy())
versions = {name: importlib.metadata.version(name) for name in ("optimum-onnx", "onnxruntime", "transformers")}
print(json.dumps({"ways": [way], "versions": " ".join(f"{name} {version}" for name, version in versions.items())}))

"""sentence-transformers opens a bundle with its ONNX backend. Reads {"bundle", "texts", "out"}, runs without rtx."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

request = json.load(sys.stdin)
model = SentenceTransformer(request["bundle"], backend="onnx", local_files_only=True)
way = "sentence-transformers, backend onnx"
np.save(Path(request["out"]) / f"{way}.npy", model.encode(request["texts"]))
versions = {
    name: importlib.metadata.version(name) for name in ("sentence-transformers", "optimum-onnx", "transformers")
}
print(json.dumps({"ways": [way], "versions": " ".join(f"{name} {version}" for name, version in versions.items())}))

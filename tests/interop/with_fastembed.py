"""FastEmbed opens a bundle. Reads {"bundle", "texts", "out"} from standard input, runs without rtx."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

POOLING = {"cls": PoolingType.CLS, "mean": PoolingType.MEAN, "lasttoken": PoolingType.LAST_TOKEN}

request = json.load(sys.stdin)
bundle, out = Path(request["bundle"]), Path(request["out"])
contract = json.loads((bundle / "manifest.json").read_text())["contract"]
ways = {"FastEmbed, sentence_embedding": {"pooling": PoolingType.DISABLED, "normalization": False}}
if not list(bundle.glob("*_Dense")):
    # What FastEmbed can do by itself: pool and normalise, no Dense layer.
    ways["FastEmbed, last_hidden_state, pooled by it"] = {
        "pooling": POOLING[contract["pooling"][0]],
        "normalization": contract["normalize"],
        "output_name": "last_hidden_state",
    }
for way, settings in ways.items():
    TextEmbedding.add_custom_model(
        way, sources=ModelSource(hf="none/none"), dim=contract["dimension"], model_file="onnx/model.onnx", **settings
    )
    model = TextEmbedding(way, specific_model_path=str(bundle), threads=1)
    np.save(out / f"{way}.npy", np.stack(list(model.embed(request["texts"]))))
versions = {name: importlib.metadata.version(name) for name in ("fastembed", "onnxruntime", "tokenizers")}
print(json.dumps({"ways": list(ways), "versions": " ".join(f"{name} {version}" for name, version in versions.items())}))

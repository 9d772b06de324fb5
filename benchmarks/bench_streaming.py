"""Training data of ten million rows: how fast it is checked, planned and read by position, and in how much memory.

A file of a hundredth, a tenth and all of the rows is written, and each is read in a process of its own, as a run reads
it: the checking pass, a whole epoch of the sampler, the rows of the first batches. Every row that is read by position
is compared with what was written. Needs about 5 GiB of disk for ten million rows.

    python benchmarks/bench_streaming.py
    python benchmarks/bench_streaming.py --rows 1000000 --folder /data/tmp
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rtx.runtime.machine import describe_machine

BATCH_SIZE = 64
FIRST_BATCHES = 1000
MIB = 2**20
_FILLER = " that makes a text as long as a short answer to a question is"


def row_of(number: int) -> dict[str, Any]:
    """A row whose texts follow from its number; every tenth query is that of the row before."""
    query = number - (number % 10 == 9)
    negatives = [f"no, {number * 7 + place} is something{_FILLER}" for place in range(number % 3)]
    return {"query": f"what is number {query}?", "positive": f"yes, {number} is it{_FILLER}", "negatives": negatives}


def write(path: Path, rows: int) -> float:
    begun = time.monotonic()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            stream.write(json.dumps(row_of(number)) + "\n")
    return time.monotonic() - begun


class Peak(threading.Thread):
    """Watches what this process holds of its own, and with mapped files, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.all = 0.0

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.own = max(self.own, int(status["RssAnon"].split()[0]) / 1024)
        self.all = max(self.all, int(status["VmRSS"].split()[0]) / 1024)


def measure(path: Path, rows: int, folder: Path) -> dict[str, float]:
    """Read a file as a run does. Raises AssertionError where a row is not what was written."""
    from rtx.trainer.data import TrainingData
    from rtx.trainer.sampler import BatchSampler

    peak = Peak()
    peak.start()
    begun = time.monotonic()
    data = TrainingData.read([path], needs="positives", folder=folder)
    checked = time.monotonic()
    sampler = BatchSampler(data, batch_size=BATCH_SIZE, seed=0, no_duplicates=True)
    first = next(iter(sampler))
    started = time.monotonic()
    sizes = [len(batch) for batch in sampler.plan(0)]
    planned = time.monotonic()
    assert len(data) == sum(sizes) == rows, (len(data), sum(sizes), rows)
    assert len(sizes) == len(sampler)
    seconds = 0.0
    for _, batch in zip(range(FIRST_BATCHES), sampler, strict=False):
        asked = time.monotonic()
        examples = [data[row] for row in batch]
        seconds += time.monotonic() - asked
        for row, example in zip(batch, examples, strict=True):
            expected = row_of(row)
            assert example.query == expected["query"], row
            assert example.documents == (expected["positive"], *expected["negatives"]), row
    assert len(first) == sizes[0]
    peak.look()
    return {
        "rows": rows,
        "file_mib": path.stat().st_size / MIB,
        "check_rows_per_s": rows / (checked - begun),
        "first_batch_s": started - checked,
        "plan_rows_per_s": rows / (planned - started),
        "read_rows_per_s": min(rows, FIRST_BATCHES * BATCH_SIZE) / seconds,
        "peak_own_mib": peak.own,
        "peak_rss_mib": peak.all,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", help="for the temporary files")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.rows, options.measure.parent)))
        return
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for rows in (options.rows // 100, options.rows // 10, options.rows):
            path = Path(folder) / f"{rows}.jsonl"
            written = write(path, rows)
            command = [sys.executable, "-P", __file__, "--rows", str(rows), "--measure", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append({**json.loads(done.stdout), "write_s": written})
            path.unlink()
    # Small data stays in memory: only from there on is growth of the rows' making.
    tenth, largest = found[-2:]
    growth = (largest["peak_own_mib"] - tenth["peak_own_mib"]) * MIB / (largest["rows"] - tenth["rows"])
    names = ("file_mib", "check_rows_per_s", "plan_rows_per_s", "read_rows_per_s", "peak_own_mib", "peak_rss_mib")
    print("".join(f"{name:>18}" for name in ("rows", *names)))
    for result in found:
        print("".join(f"{result[name]:>18,.0f}" for name in ("rows", *names)))
    print(f"own memory grows by {growth:.1f} bytes a row; a first batch after {largest['first_batch_s']:.1f} s")
    summary = {"streaming": found, "own_bytes_per_row": growth, "machine": dataclasses.asdict(describe_machine())}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

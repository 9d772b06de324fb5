"""Read images by OCR: paths come in a file, a line each; the texts go to another as JSON lines.

Runs in an environment of its own, which has rapidocr and nothing of rtx. Images that the other file has already are not
read again.

    python ocr_worker.py images.txt texts.jsonl
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path


def main(listed: Path, target: Path) -> None:
    known = set()
    if target.is_file():
        known = {json.loads(line)["sha256"] for line in target.read_text(encoding="utf-8").splitlines() if line}
    engine = None
    for name in listed.read_text(encoding="utf-8").splitlines():
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        if digest in known:
            continue
        if engine is None:
            from rapidocr import RapidOCR  # type: ignore[import-not-found]  # not in the environment of rtx

            engine = RapidOCR(params={"EngineConfig.onnxruntime.intra_op_num_threads": 1})
        start = time.perf_counter()
        found = engine(name)
        row = {
            "sha256": digest,
            "text": "\n".join(found.txts or ()),
            "seconds": round(time.perf_counter() - start, 2),
        }
        with target.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        known.add(digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

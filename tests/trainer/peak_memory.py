"""Run by test_estimate in a process of its own: the estimate of a step beside what it took, in bytes."""

import json
import sys
import threading

import psutil
import torch
import transformers

from rtx.runtime.text import Encoded
from rtx.trainer import losses
from rtx.trainer.batches import Batch, plan_chunks
from rtx.trainer.estimate import Plan, estimate
from rtx.trainer.losses.targets import Targets
from rtx.trainer.model import RetrievalModel
from rtx.trainer.step import backward, batch_run, joined_loss

ROWS, TOKENS, CHUNK_TOKENS = 8, 96, 512


def main(tiny: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = transformers.BertConfig(vocab_size=2000, pad_token_id=tokenizer.pad_token_id, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = RetrievalModel.load(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    # The first step makes the optimizer's moments and what libraries keep for good.
    step(model, batch_of(2, 8), optimizer)
    batch, found = batch_of(ROWS, TOKENS), {}
    for name, activation_tokens in (("gradient cache", 0), ("whole batch", None)):
        plan = Plan(steps=1, batch_size=ROWS, chunk_tokens=CHUNK_TOKENS, activation_tokens=activation_tokens)
        estimated = estimate(model, [batch], losses.info_nce, plan)
        held = estimated.weights_bytes + estimated.optimizer_bytes
        before = own_bytes()
        with Peak() as peak:
            step(model, batch, optimizer, activation_tokens)
        found[name] = (estimated.total_bytes, peak.most - before + held)
    print(json.dumps(found))


def own_bytes() -> int:
    """Without mapped files, whose pages a busy system takes away and brings back."""
    held = psutil.Process().memory_info()
    return held.rss - held.shared


class Peak(threading.Thread):
    """The most that the process held, looked at every other millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, own_bytes())

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def batch_of(rows: int, tokens: int) -> Batch:
    def texts(count: int, longest: int) -> list[Encoded]:
        lengths = torch.linspace(longest / 2, longest, count).long().tolist()
        return [Encoded([7] * length, [0] * length) for length in lengths]

    numbered = tuple((row, None) for row in range(rows))
    return Batch(numbered, (texts(rows, tokens // 4), texts(2 * rows, tokens)), Targets.of([(1.0, 0.0)] * rows))


def step(model, batch, optimizer, activation_tokens=None) -> None:
    chunks = plan_chunks(batch, chunk_tokens=CHUNK_TOKENS)
    run = batch_run(model, batch, model.preprocessor.collate, torch.device("cpu"))
    backward(run, chunks, joined_loss(losses.info_nce, batch.targets), activation_tokens=activation_tokens)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main(*sys.argv[1:])

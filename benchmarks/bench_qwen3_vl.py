"""Qwen3-VL-Embedding-2B at its full size through rtx, on a CPU: seconds, memory and sizes, from checkpoint to vectors.

The configuration is the published one, the weights are random. A checkpoint is written, PyTorch gives the reference,
the graphs are exported and derived, and each variant is opened and held against PyTorch. Every stage is a process of
its own, whose memory is watched from outside. Needs 16 GiB of memory and 25 GB of disk, and takes ten minutes on two
cores.

    python benchmarks/bench_qwen3_vl.py
    python benchmarks/bench_qwen3_vl.py --size tiny --page-pixels 16384
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rtx.runtime.backends.graphs import open_graphs
from rtx.runtime.backends.onnx import usable_cores
from rtx.runtime.contract import Contract
from rtx.runtime.golden import deviation
from rtx.runtime.machine import describe_machine

if TYPE_CHECKING:
    from rtx.export.variants import VariantName

VARIANTS: tuple[VariantName, ...] = ("fp32", "int8", "int4")
PAGES = 3
QUERY_RUNS = 5
# Two float32 networks that differ in the order of their sums. A product over 2,048 to 6,144 inputs, summed in eight
# lanes or more, is off by about sqrt(inputs / 8) * 2**-24 = 1e-6 to 2e-6 of its size. On the way of a page lie 28 * 5
# products of texts and 24 * 4 of images, whose errors have independent signs: sqrt(236) * 2e-6 = 3e-5 of the vector.
# Three times that is let pass. Vectors have norm 1, so that it is a distance: a cosine of 1 - 5e-9, and with 2,048
# numbers some 1e-5 in the one that is furthest off.
FP32_DISTANCE = 1e-4
QUERY = "how do I bleed the brakes after a change of the fluid?"

FOLDER = Path(__file__).parents[1] / "build" / "qwen3_vl"
GIB = 2**30
_HEARTBEAT_S = 60.0
_SHARD_BYTES = 2 * 10**9
# Ids behind those of words; the published tokenizer uses the first 26 of them.
_RESERVED = 293
_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_TEMPLATE = """
{%- if messages[0].role != 'system' -%}
{{- "<|im_start|>system\nRepresent the user's input.<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
# As published, for transformers' Qwen3VLConfig.
_TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
}
_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_VISION: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
}
# What another size has in place of that: of texts, of rotations, of images.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "2b": ({}, {}, {}),
    "tiny": (
        {
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        {"mrope_section": [4, 2, 2]},
        {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 25,
        },
    ),
}


def config_of(size: str, layers: int | None = None) -> dict[str, Any]:
    """Arguments of transformers' Qwen3VLConfig; `layers` of texts and of images in place of the size's own."""
    of_text, of_rope, of_vision = SIZES[size]
    text, vision = {**_TEXT, **of_text, "rope_parameters": {**_ROPE, **of_rope}}, {**_VISION, **of_vision}
    if layers is not None:
        text["num_hidden_layers"] = vision["depth"] = layers
    # After each quarter but the last: 5, 11 and 17 of 24.
    vision["deepstack_visual_indexes"] = [vision["depth"] * quarter // 4 - 1 for quarter in (1, 2, 3)]
    first = text["vocab_size"] - _RESERVED
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": first + _SPECIAL_TOKENS.index(f"<|{name}|>") for key, name in names.items()}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **ids}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    if options.stage is not None:
        STAGES[options.stage](options)
        return
    if options.folder.exists():
        raise SystemExit(f"{options.folder}: is in the way; expected a folder that does not exist yet")
    options.folder.mkdir(parents=True)
    machine = dataclasses.asdict(describe_machine())
    try:
        stages = {stage: run_stage(stage, options) for stage in ("write", "reference", "export")}
        for variant in VARIANTS:
            stages[variant] = run_stage("open", options, variant)
            numbers = stages[variant]["run"]
            close = all(numbers[f"{kind}_distance"] <= FP32_DISTANCE for kind in ("query", "page"))
            if variant == "fp32" and not close:
                raise SystemExit(f"fp32: further than {FP32_DISTANCE} from PyTorch: {json.dumps(numbers)}")
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)
    show(stages)
    setting = {"size": options.size, "layers": options.layers, "page_pixels": options.page_pixels}
    print(json.dumps({"qwen3_vl": stages, **setting, "threads": options.threads, "machine": machine}))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--page-pixels", type=int, default=600 * 600, help="largest number of pixels of a page")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the files; must not exist yet")
    parser.add_argument("--keep", action="store_true", help="leave the folder when done")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# Stages, as the process sees it that starts them.


class Watch(threading.Thread):
    """What another process holds, looked at from outside: serialising holds Python's lock for seconds."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{process}/status")
        self._own = self._all = 0.0
        self.doing = ""

    def run(self) -> None:
        told = time.monotonic()
        with contextlib.suppress(OSError, ValueError, KeyError):  # the process has ended
            while True:
                status = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
                own, held = (int(status[name].split()[0]) * 1024 / GIB for name in ("RssAnon", "VmRSS"))
                self._own, self._all = max(self._own, own), max(self._all, held)
                if time.monotonic() - told > _HEARTBEAT_S:
                    told = time.monotonic()
                    say(f"{self.doing} … {own:.1f} GiB now")
                time.sleep(0.02)

    def take(self) -> dict[str, float]:
        """The peaks since this was called last: of its own memory, and with mapped files."""
        peaks = {"own_gib": self._own, "all_gib": self._all}
        self._own = self._all = 0.0
        return peaks


def run_stage(stage: str, options: argparse.Namespace, variant: str | None = None) -> dict[str, dict[str, Any]]:
    """A stage in a process of its own: what it says of each of its steps, with seconds and peaks of memory."""
    given = {name: getattr(options, name) for name in ("size", "page_pixels", "threads", "folder", "layers")}
    command = [sys.executable, "-P", __file__, "--stage", stage]
    for option, value in {**given, "variant": variant}.items():
        command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    title = stage if variant is None else f"{stage} {variant}"
    steps: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watch = Watch(process.pid)
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            name = told.pop("step")
            watch.doing = f"{title}: {name}"
            if told:
                steps[name] = {**told, **watch.take()}
            say(f"{watch.doing}: {told['seconds']:.1f} s" if told else watch.doing)
    if process.returncode:
        killed = "; killed, as it is when memory runs out" if process.returncode == -9 else ""
        raise SystemExit(f"{watch.doing}: the process ended with {process.returncode}{killed}")
    return steps


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def show(stages: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    print(f"{'stage':<24}{'seconds':>10}{'CPU s':>10}{'own GiB':>10}{'with mapped files':>20}")
    for stage, steps in stages.items():
        for step, numbers in steps.items():
            spent = f"{numbers['seconds']:>10.1f}{numbers['cpu_s']:>10.1f}"
            print(f"{f'{stage}, {step}':<24}{spent}{numbers['own_gib']:>10.2f}{numbers['all_gib']:>20.2f}")
    print(
        f"\n{'':<10}{'text GB':>10}{'vision GB':>10}{'load s':>10}{'query ms':>10}{'page s':>10}{'again s':>10}"
        f"{'query cosine':>15}{'page cosine':>15}{'max abs':>10}"
    )
    torch = stages["reference"]["run"]
    print(f"{'PyTorch':<10}{'':>30}{torch['query_s'] * 1e3:>10.1f}{torch['page_s']:>10.2f}")
    for variant in VARIANTS:
        sizes, run = stages["export"][variant], stages[variant]["run"]
        print(
            f"{variant:<10}{sizes['tokens_bytes'] / 1e9:>10.3f}{sizes['image_bytes'] / 1e9:>10.3f}"
            f"{stages[variant]['load']['seconds']:>10.1f}{run['query_s'] * 1e3:>10.1f}{run['page_s']:>10.2f}"
            f"{run['cached_s']:>10.2f}{run['query_cosine']:>15.9f}{run['page_cosine']:>15.9f}{run['max_abs']:>10.1e}"
        )


# Stages, as they run.


@contextlib.contextmanager
def step(name: str) -> Iterator[dict[str, Any]]:
    """Tell the process that watches when a step begins, and when it ends what was put into the dictionary."""
    print(json.dumps({"step": name}), flush=True)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    numbers: dict[str, Any] = {}
    yield numbers
    spent = {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - begun_cpu}
    print(json.dumps({"step": name, **spent, **numbers}), flush=True)


def write(options: argparse.Namespace) -> None:
    """A checkpoint of random weights."""
    with step("import"):
        import torch
        import transformers
    checkpoint = options.folder / "checkpoint"
    checkpoint.mkdir()
    config = transformers.Qwen3VLConfig(**config_of(options.size, options.layers))
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(checkpoint)
    with step("tokenizer"):
        write_tokenizer(config.text_config.vocab_size, checkpoint)
    with step("weights") as numbers:
        with torch.device("meta"):
            model = transformers.Qwen3VLForConditionalGeneration(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        numbers["parameters"] = write_weights(shapes, checkpoint)


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """The tokenizer, with ids and lengths of texts about as published, and what prepares images."""
    import transformers
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        *(f"Ġ{word}" for word in QUERY.split()),
        "Represent",
        "Ġthe",
        "Ġinput",
        "how",
        "system",
        "user",
        "assistant",
    ]
    # Letter by letter, so that each of these words becomes one token, or two.
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    pieces = [*letters, *dict.fromkeys(left + right for left, right in merges)]
    pieces += [f"<filler {number}>" for number in range(vocabulary - _RESERVED - len(pieces))]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate([*pieces, *_SPECIAL_TOKENS])},
        merges=merges,
        additional_special_tokens=list(_SPECIAL_TOKENS[1:]),
        padding_side="right",
        model_max_length=8192,
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 4096, "longest_edge": 1_843_200},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def write_weights(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> int:
    """Random weights in files of at most 2 GB, of which one is in memory at a time; gives their number."""
    import torch
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        filled += 4 * int(np.prod(shape))
        if filled > _SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 4 * int(np.prod(shape))
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        tensors = {}
        for name in names:
            weight = torch.empty(shapes[name])
            # Norms about 1 and biases about 0, none of them the same: a lost one would not show.
            mean = 1.0 if weight.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            tensors[name] = weight.normal_(mean, 0.1 if weight.ndim == 1 else 0.02, generator=generator)
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": 4 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def reference(options: argparse.Namespace) -> None:
    """Vectors by PyTorch, and the batches that they are of."""
    model = load_model(options)
    with step("prepare") as numbers:
        found = model.preprocessor.encode([QUERY, *(draw_page(number) for number in range(PAGES))])
        batches = [model.preprocessor.collate([item]) for item in found]
        for number, batch in enumerate(batches):
            np.savez(options.folder / f"batch_{number}.npz", **batch)
        (options.folder / "contract.json").write_text(json.dumps(model.contract.to_dict()))
        numbers["query_tokens"], numbers["page_tokens"] = (batches[at]["input_ids"].shape[1] for at in (0, 1))
        numbers["page_patches"] = len(batches[1]["pixel_values"])
    with step("run") as numbers:
        engine = model.engine()
        queries, query_s = timed(engine, [batches[0]] * QUERY_RUNS)
        pages, page_s = timed(engine, batches[1:])
        vectors = np.concatenate([queries[:1], pages])
        np.save(options.folder / "reference.npy", vectors)
        apart = np.linalg.norm(vectors[:, np.newaxis] - vectors, axis=2)[np.triu_indices(len(vectors), 1)]
        numbers |= {"query_s": median(query_s), "page_s": median(page_s), "least_apart": float(apart.min())}
    # Else a variant that mistakes one for the other would pass.
    if not np.isfinite(vectors).all() or apart.min() < 100 * FP32_DISTANCE:
        raise SystemExit(f"reference: expected vectors that differ by more than {100 * FP32_DISTANCE}, got {apart}")


def load_model(options: argparse.Namespace) -> Any:
    """The checkpoint as a RetrievalModel, with images of at most so many pixels."""
    with step("import"):
        import torch

        from rtx.trainer.model import RetrievalModel

        torch.set_num_threads(options.threads)
    with step("load"):
        return RetrievalModel.load(options.folder / "checkpoint", processor_kwargs={"max_pixels": options.page_pixels})


def draw_page(number: int) -> Image.Image:
    """A sheet of A4 at 100 dpi, every other one across, with lines of text and a coloured bar."""
    page = Image.new("RGB", (827, 1169) if number % 2 == 0 else (1169, 827), "white")
    drawing = ImageDraw.Draw(page)
    bar = page.height * (number + 1) // (PAGES + 1)
    drawing.rectangle((0, bar, page.width, bar + 150), fill=("navy", "darkred", "gold")[number % 3])
    for line in range(page.height // 27 - 3):
        text = f"{number + 1}.{line + 1} Turn the valve by {(37 * line + 61 * number) % 360} degrees."
        drawing.text((60 + 5 * number, 50 + 27 * line), text, fill="black", font_size=18)
    return page


def timed(engine: Any, batches: Iterable[Mapping[str, NDArray[Any]]]) -> tuple[NDArray[np.float32], list[float]]:
    """Vectors of batches [rows of all, dimension], and the seconds of each."""
    vectors, seconds = [], []
    for batch in batches:
        begun = time.perf_counter()
        vectors.append(engine.run(batch))
        seconds.append(time.perf_counter() - begun)
    return np.concatenate(vectors), seconds


def export(options: argparse.Namespace) -> None:
    """The plain graphs, and the files of all variants."""
    model = load_model(options)
    from rtx.export.derive import map_weights, write_variant
    from rtx.export.graphs import export_graphs
    from rtx.export.pipeline import release_weights
    from rtx.export.variants import external_files, files_of

    with step("graphs"):
        plain = export_graphs(model)
    (options.folder / "onnx").mkdir()
    graphs = {}
    for variant in VARIANTS:
        with step(variant) as numbers:
            write_variant(variant, plain, options.folder)
            files = files_of(variant, images=True)._asdict()
            for name, file in files.items():
                paths = [options.folder / file, *external_files(options.folder / file)]
                numbers[f"{name}_bytes"] = sum(path.stat().st_size for path in paths)
                numbers[f"{name}_external"] = len(paths) > 1
            if variant == "fp32":  # as `rtx export` does
                map_weights(plain, options.folder, files_of(variant, images=True))
                release_weights(model)
        graphs[variant] = files
    (options.folder / "graphs.json").write_text(json.dumps(graphs))


def open_variant(options: argparse.Namespace) -> None:
    """A variant, held against PyTorch."""
    folder: Path = options.folder
    contract = Contract.from_dict(json.loads((folder / "contract.json").read_text()))
    graphs = json.loads((folder / "graphs.json").read_text())[options.variant]
    query, *pages = (dict(np.load(folder / f"batch_{number}.npz")) for number in range(1 + PAGES))
    with step("load"):
        engine = open_graphs(
            contract, folder / graphs["tokens"], folder / graphs["image"], threads=options.threads, name=options.variant
        )
    with step("run") as numbers:
        queries, query_s = timed(engine, [query] * QUERY_RUNS)
        found, page_s = timed(engine, pages)
        again, cached_s = timed(engine, pages)
        numbers |= {"query_s": median(query_s), "page_s": median(page_s), "cached_s": median(cached_s)}
        numbers |= compare(queries[:1], found, np.load(folder / "reference.npy"))
    if not np.isfinite(found).all() or not np.array_equal(found, again):
        raise SystemExit(f"{options.variant}: a page out of the cache is not what it was")


def compare(
    queries: NDArray[np.float32], pages: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, float]:
    """How far vectors are from PyTorch's."""
    apart = np.linalg.norm(np.concatenate([queries, pages]) - expected, axis=1)
    query, page = deviation(queries, expected[:1]), deviation(pages, expected[1:])
    return {
        "query_cosine": query.min_cosine,
        "page_cosine": page.min_cosine,
        "query_distance": float(apart[0]),
        "page_distance": float(apart[1:].max()),
        "max_abs": max(query.max_abs, page.max_abs),
    }


STAGES = {"write": write, "reference": reference, "export": export, "open": open_variant}


if __name__ == "__main__":
    main()

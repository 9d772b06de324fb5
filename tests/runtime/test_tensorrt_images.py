"""Models with a graph for images, run by engines on the stand-ins for the driver and TensorRT: as their graphs run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rtx.runtime.backends import cuda, tensorrt
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.backends.tensorrt import TensorRtEngine
from rtx.runtime.backends.towers import TowersEngine
from rtx.runtime.backends.visual import VisualEngine
from rtx.runtime.errors import EngineError
from rtx.runtime.gpu import Gpu
from rtx.runtime.manifest import EngineEntry
from rtx.runtime.text import Encoded

sys.path.append(str(Path(__file__).parent))

import test_visual as toy
from stand_in_gpu import DataType, Driver, Model, Shape, TensorRt

ENTRY = EngineEntry(
    target="tensorrt-rtx",
    version="1.7.1",
    graph="onnx/model.onnx",
    sources={},
    capabilities=(89,),
    profiles=({"batch": (1, 4, 6), "tokens": (1, 8, 8), "images": (1, 2, 4)},),
    layers={},
)
L4 = Gpu(index=0, name="NVIDIA L4", capability=89, memory_bytes=24 << 30)
MOST = 64
vision, text = toy.vision, toy.text


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorRt]:
    found = TensorRt(Driver(), {})
    monkeypatch.setattr(cuda, "load_driver", lambda: found.driver)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda _: found)
    yield found
    assert found.driver.left() == 0


def open_engine(content: bytes, *, output: str, name: str, **_: Any) -> TensorRtEngine:
    return TensorRtEngine(content, ENTRY, output=output, gpu=L4, name=name)


def model_of(
    graph: OnnxEngine,
    inputs: dict[str, tuple[DataType, tuple[int | str, ...]]],
    least: dict[str, int],
    shapes: Callable[[dict[str, Shape]], dict[str, Shape]],
) -> Model:
    """An engine of one profile that computes what a graph does. Axes have names, as in the graph."""

    def box(axes: tuple[int | str, ...]) -> tuple[Shape, Shape, Shape]:
        smallest = tuple(axis if isinstance(axis, int) else least.get(axis, 1) for axis in axes)
        largest = tuple(axis if isinstance(axis, int) else MOST for axis in axes)
        return smallest, largest, largest

    def compute(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = list(shapes({name: array.shape for name, array in arrays.items()}))
        return dict(zip(names, graph.fetch(names, arrays), strict=True))

    return Model(
        inputs={name: kind for name, (kind, _) in inputs.items()},
        outputs=dict.fromkeys(shapes({name: box(axes)[2] for name, (_, axes) in inputs.items()}), DataType.FLOAT),
        profiles=[{name: box(axes) for name, (_, axes) in inputs.items()}],
        shapes=shapes,
        compute=compute,
    )


@pytest.fixture
def visual(trt: TensorRt, vision: bytes, text: bytes) -> VisualEngine:
    number, whole = DataType.FLOAT, DataType.INT64
    graphs = [
        OnnxEngine(content, output=output, threads=1)
        for content, output in ((vision, "image_embeds"), (text, "sentence_embedding"))
    ]
    trt.models[b"vision"] = model_of(
        graphs[0],
        {
            "pixel_values": (number, ("i", "p", 6)),
            "interp_weights": (number, ("i", "p", 4)),
            "interp_indices": (whole, ("i", "p", 4)),
            "pos_hw": (whole, ("i", "p", 2)),
            "patch_mask": (whole, ("i", "p")),
        },
        {},
        lambda given: {
            "image_embeds": (given["patch_mask"][0], given["patch_mask"][1] // 4, toy.HIDDEN),
            "deepstack": (2, given["patch_mask"][0], given["patch_mask"][1] // 4, toy.HIDDEN),
        },
    )
    trt.models[b"text"] = model_of(
        graphs[1],
        {
            **dict.fromkeys(("input_ids", "attention_mask", "visual_index"), (whole, ("b", "t"))),
            "position_ids": (whole, (3, "b", "t")),
            "image_embeds": (number, ("v", toy.HIDDEN)),
            "deepstack": (number, (2, "v", toy.HIDDEN)),
        },
        {"v": 0},
        lambda given: {"sentence_embedding": (given["input_ids"][0], toy.HIDDEN)},
    )
    return VisualEngine(
        b"vision", b"text", rules=toy.RULES, output="sentence_embedding", name="toy", open_graph=open_engine
    )


def test_tokens_of_images_reach_their_places(visual: VisualEngine) -> None:
    rows = [[2, toy.A, 1, toy.D], [3], [toy.B, 2, toy.A, 1, toy.C], [toy.C], [1, toy.D, 1]]
    for _ in range(3):
        found = visual.run(toy.batch_of(*rows))
        np.testing.assert_array_equal(found, [toy.expected(row) for row in rows])
    visual.close()


def test_texts_alone_have_a_table_without_rows(visual: VisualEngine) -> None:
    for _ in range(3):
        assert visual.run(toy.batch_of([3], [1])).tolist() == [[3] * toy.HIDDEN, [0] * toy.HIDDEN]
    visual.close()


def test_what_no_profile_takes_is_refused_and_the_next_runs(visual: VisualEngine) -> None:
    with pytest.raises(EngineError, match=r"toy \(vision\): .*patch_mask \[1, 80\]"):
        visual.run(toy.batch_of([toy.image(9, 8, 10)]))
    with pytest.raises(EngineError, match=r"toy: .*input_ids \[1, 65\]"):
        visual.run(toy.batch_of([65]))
    assert visual.run(toy.batch_of([toy.A])).tolist() == [toy.expected([toy.A]).tolist()]
    visual.close()


def test_an_engine_of_images_that_does_not_open_leaves_nothing(trt: TensorRt, visual: VisualEngine) -> None:
    visual.close()
    del trt.models[b"text"]
    with pytest.raises(EngineError, match="toy: "):
        VisualEngine(
            b"vision", b"text", rules=toy.RULES, output="sentence_embedding", name="toy", open_graph=open_engine
        )


@pytest.fixture
def towers(trt: TensorRt) -> TowersEngine:
    trt.models[b"image"] = Model(
        inputs={"pixel_values": DataType.FLOAT},
        outputs={"embedding": DataType.FLOAT},
        profiles=[{"pixel_values": ((1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 4))}],
        shapes=lambda given: {"embedding": (given["pixel_values"][0], 3)},
        compute=lambda arrays: {"embedding": arrays["pixel_values"].sum(axis=(2, 3))},
    )
    boxes = dict.fromkeys(("input_ids", "attention_mask"), ((1, 1), (4, 8), (6, 8)))
    trt.models[b"words"] = Model(
        inputs=dict.fromkeys(boxes, DataType.INT64),
        outputs={"embedding": DataType.FLOAT},
        profiles=[boxes],
        shapes=lambda given: {"embedding": (given["input_ids"][0], 3)},
        compute=lambda arrays: {
            "embedding": (arrays["input_ids"] * arrays["attention_mask"])
            .sum(1, keepdims=True)
            .repeat(3, 1)
            .astype("f4")
        },
    )
    return TowersEngine(b"image", b"words", output="embedding", name="toy", open_graph=open_engine)


def test_towers_give_vectors_of_images_and_texts(towers: TowersEngine) -> None:
    pixels = np.arange(3 * 48, dtype=np.float32).reshape(3, 3, 4, 4)
    digests = np.arange(6, dtype=np.uint64).reshape(3, 2)
    given = {"pixel_values": pixels[[0, 1, 0, 2]], "image_digests": digests[[0, 1, 0, 2]]}
    for _ in range(3):
        np.testing.assert_array_equal(towers.run(given), pixels.sum(axis=(2, 3))[[0, 1, 0, 2]])
        ids = np.array([[1, 2, 3], [4, 5, 6]])
        found = towers.run({"input_ids": ids, "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])})
        assert found.tolist() == [[3.0] * 3, [15.0] * 3]
    five = {
        "pixel_values": np.zeros((5, 3, 4, 4), np.float32),
        "image_digests": np.arange(10, 20, dtype=np.uint64).reshape(5, 2),
    }
    with pytest.raises(EngineError, match=r"toy \(images\): .*pixel_values \[5, 3, 4, 4\]"):
        towers.run(five)
    image, long = Encoded([], [], image_tokens=20), Encoded([1] * 9, [0] * 9)
    assert [towers.max_rows(item) for item in (image, Encoded([1], [0]), long)] == [4, 6, 0]
    towers.close()
    with pytest.raises(EngineError, match=r"toy.*closed"):
        towers.run(given)

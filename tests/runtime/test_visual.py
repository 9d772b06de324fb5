"""The engine for images among tokens, around two hand-made graphs whose result is known."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtx.runtime.backends.visual import VisualEngine
from rtx.runtime.errors import EngineError, UsageError
from rtx.runtime.visual_tokens import VisualTokens

HIDDEN, IMAGE = 3, 9
RULES = VisualTokens(
    image_token_id=IMAGE, merge_size=2, patch_width=6, position_grid=4, hidden=HIDDEN, deepstack_layers=2
)
TOKEN_BYTES = 4 * HIDDEN * (1 + RULES.deepstack_layers)


def serialise(nodes, constants, inputs, outputs):
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "toy",
        [value(name, kind, shape) for name, kind, shape in inputs],
        [value(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(content), name) for name, content in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def vision():
    """A visual token is the first numbers of its first patch; deepstack of its second and of its third."""
    nodes, constants = [], {"axes": [1, 2], "steps": [4, 1], "first_axis": [0]}
    for patch in range(3):
        constants |= {f"from_{patch}": [patch, 0], f"to_{patch}": [1 << 30, HIDDEN]}
        output = "image_embeds" if patch == 0 else f"layer_{patch}"
        nodes.append(
            helper.make_node("Slice", ["pixel_values", f"from_{patch}", f"to_{patch}", "axes", "steps"], [output])
        )
    nodes += [helper.make_node("Unsqueeze", [f"layer_{patch}", "first_axis"], [f"one_{patch}"]) for patch in (1, 2)]
    nodes.append(helper.make_node("Concat", ["one_1", "one_2"], ["deepstack"], axis=0))
    kinds = {"interp_weights": (TensorProto.FLOAT, 4), "interp_indices": (TensorProto.INT64, 4)}
    inputs = [("pixel_values", TensorProto.FLOAT, ["i", "p", 6])]
    inputs += [(name, kind, ["i", "p", width]) for name, (kind, width) in kinds.items()]
    inputs += [("pos_hw", TensorProto.INT64, ["i", "p", 2]), ("patch_mask", TensorProto.INT64, ["i", "p"])]
    outputs = [("image_embeds", ["i", "t", HIDDEN]), ("deepstack", [2, "i", "t", HIDDEN])]
    return serialise(nodes, constants, inputs, outputs)


@pytest.fixture(scope="module")
def text():
    """The sum over a row's visual tokens of embedding + 10 * layer 0 + 100 * layer 1, and of its positions in width."""
    constants = {"zero": np.zeros((1, HIDDEN), np.float32), "tokens": [1], "scales": np.float32([[[10]], [[100]]])}
    constants |= {"first": [0], "third": 2}
    nodes = [
        helper.make_node("Mul", ["deepstack", "scales"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled", "first"], ["layers"], keepdims=0),
        helper.make_node("Add", ["image_embeds", "layers"], ["table"]),
        helper.make_node("Concat", ["zero", "table"], ["rows"], axis=0),
        helper.make_node("Gather", ["rows", "visual_index"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "tokens"], ["summed"], keepdims=0),
        helper.make_node("Gather", ["position_ids", "third"], ["width"], axis=0),
        helper.make_node("ReduceSum", ["width", "tokens"], ["far"], keepdims=1),
        helper.make_node("Cast", ["far"], ["distance"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["summed", "distance"], ["sentence_embedding"]),
    ]
    inputs = [(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask", "visual_index")]
    inputs += [("position_ids", TensorProto.INT64, [3, "b", "t"])]
    inputs += [("image_embeds", TensorProto.FLOAT, ["v", HIDDEN]), ("deepstack", TensorProto.FLOAT, [2, "v", HIDDEN])]
    return serialise(nodes, constants, inputs, [("sentence_embedding", ["b", HIDDEN])])


class Counted:
    """An engine, and how many images each run of its vision graph had."""

    def __init__(self, vision, text, **options):
        self.engine = VisualEngine(
            vision, text, rules=RULES, output="sentence_embedding", threads=1, name="toy", **options
        )
        self.runs: list[int] = []
        fetch = self.engine._vision.fetch

        def counted(outputs, batch):
            self.runs.append(len(batch["pixel_values"]))
            return fetch(outputs, batch)

        self.engine._vision.fetch = counted

    def embed(self, *rows, **options):
        return self.engine.run(batch_of(*rows, **options))


@pytest.fixture
def counted(vision, text):
    return Counted(vision, text)


def image(seed, rows=2, columns=2):
    """An image with its own pixels and digest."""
    random = np.random.default_rng(seed)
    pixels = random.integers(-9, 9, (rows * columns, RULES.patch_width)).astype(np.float32)
    return pixels, (1, rows, columns), np.array([seed, rows * columns], dtype=np.uint64)


def batch_of(*rows, digests=True, side="right"):
    """Rows of images; a number is so many tokens of text."""
    ids = [[] for _ in rows]
    images = []
    for tokens, row in zip(ids, rows, strict=True):
        for part in row:
            if isinstance(part, int):
                tokens += [1] * part
            else:
                tokens += [IMAGE] * (len(part[0]) // 4)
                images.append(part)
    shape = len(ids), max(map(len, ids))
    batch = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "attention_mask")}
    for number, tokens in enumerate(ids):
        place = slice(len(tokens)) if side == "right" else slice(shape[1] - len(tokens), None)
        batch["input_ids"][number, place], batch["attention_mask"][number, place] = tokens, 1
    if images:
        batch["pixel_values"] = np.concatenate([pixels for pixels, _, _ in images])
        batch["image_grid_thw"] = np.array([grid for _, grid, _ in images])
        if digests:
            batch["image_digests"] = np.stack([digest for _, _, digest in images])
    return batch


def expected(row):
    """What the toy model makes of a row, by hand."""
    total, position, far = np.zeros(HIDDEN), 0, 0
    for part in row:
        if isinstance(part, int):
            far += sum(range(position, position + part))
            position += part
            continue
        pixels, (_, rows, columns), _ = part
        total = total + (np.array([1, 10, 100]) @ pixels.reshape(-1, 4, 6)[:, :3, :HIDDEN].sum(axis=0))
        far += rows // 2 * sum(range(position, position + columns // 2))
        position += max(rows, columns) // 2
    return total + far


A, B, C, D = image(1), image(2, 2, 6), image(3, 4, 2), image(4, 8, 8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_batch_patches": 1}, {"cache_bytes": 0}, {"cache_bytes": TOKEN_BYTES}])
def test_tokens_of_images_reach_their_places(vision, text, side, digests, options):
    counted = Counted(vision, text, **options)
    rows = [[2, A, 1, D], [3], [B, 2, A, 1, C], [C], [1, D, 1]]
    for _ in range(2):
        found = counted.embed(*rows, side=side, digests=digests)
        assert found.dtype == np.float32
        assert np.array_equal(found, [expected(row) for row in rows])
    for row in rows:
        assert np.array_equal(counted.embed(row), [expected(row)])


def test_texts_alone_do_without_the_vision_graph(counted):
    assert counted.embed([3], [1]).tolist() == [[3] * HIDDEN, [0] * HIDDEN]
    assert counted.runs == []


def test_an_image_is_run_once(counted):
    counted.embed([A, 1, A], [1, A])
    assert counted.runs == [1]
    counted.embed([2, A])
    assert counted.runs == [1]
    counted.embed([A, B])
    assert counted.runs == [1, 1]
    # The same digest in another grid is another image.
    turned = (B[0], (1, 6, 2), B[2])
    assert np.array_equal(counted.embed([2, turned]), [expected([2, turned])])
    assert counted.runs == [1, 1, 1]


def test_without_digests_images_are_told_apart_by_their_pixels(counted):
    counted.embed([A, 1, A], [B], digests=False)
    assert counted.runs == [2]
    counted.embed([B, A], digests=False)
    assert counted.runs == [2]


def test_images_of_similar_size_run_together_within_the_budget(vision, text):
    images = [image(seed, 2, columns) for seed, columns in enumerate((2, 20, 4, 2, 22, 4))]
    counted = Counted(vision, text, max_batch_patches=88)
    assert np.array_equal(counted.embed(images), [expected(images)])
    # Of 44 and 40 patches, 2 * 44 at most; of 8, 8, 4 and 4.
    assert counted.runs == [2, 4]
    counted = Counted(vision, text, max_batch_patches=32)
    counted.embed(images)
    assert counted.runs == [1, 1, 4]


def test_the_least_recently_used_is_dropped(vision, text):
    counted = Counted(vision, text, cache_bytes=4 * TOKEN_BYTES)
    for number, (row, runs) in enumerate(
        [
            ([A], 1),
            ([B], 1),  # A and B take one and three tokens: full
            ([A], 0),
            ([C], 1),  # drops B, the least recently used
            ([A], 0),
            ([C], 0),
            ([B], 1),  # drops A, and now C stays
            ([D], 1),  # larger than the cache: not kept, and nothing dropped for it
            ([B], 0),
            ([D], 1),
            ([A], 1),
        ]
    ):
        before = len(counted.runs)
        counted.embed(row)
        assert len(counted.runs) - before == runs, f"step {number}"
        assert counted.engine._cache._bytes <= 4 * TOKEN_BYTES
    assert counted.engine._cache._bytes == sum(entry.nbytes for entry in counted.engine._cache._entries.values())


def test_what_is_kept_is_no_view_of_a_batch(counted):
    counted.embed([A], [D])
    assert sorted(entry.shape for entry in counted.engine._cache._entries.values()) == [(3, 1, 3), (3, 16, 3)]
    assert all(entry.base is None for entry in counted.engine._cache._entries.values())


def test_threads_do_not_wait_for_each_others_images(counted):
    """While the vision graph runs for one call, another goes on with the images that the cache has."""
    counted.embed([A])
    inside, go_on = threading.Event(), threading.Event()
    run = counted.engine._vision.fetch

    def slow(*given):
        inside.set()
        assert go_on.wait(timeout=30)
        return run(*given)

    counted.engine._vision.fetch = slow
    results = []
    thread = threading.Thread(target=lambda: results.append(counted.embed([B])))
    thread.start()
    assert inside.wait(timeout=30)
    assert np.array_equal(counted.embed([A]), [expected([A])])
    go_on.set()
    thread.join()
    assert np.array_equal(results[0], [expected([B])])


def test_an_image_that_two_calls_run_at_once_is_kept_once(counted):
    barrier = threading.Barrier(2, timeout=30)
    run = counted.engine._vision.fetch

    def together(*given):
        barrier.wait()
        return run(*given)

    counted.engine._vision.fetch = together
    threads = [threading.Thread(target=counted.embed, args=([B],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.runs == [1, 1]
    assert counted.engine._cache._bytes == 3 * TOKEN_BYTES


def test_many_threads_get_their_own_results(vision, text):
    counted = Counted(vision, text, cache_bytes=8 * TOKEN_BYTES)
    rows = [[A, 1, B], [B], [C, 2, A], [2, D], [D, C], [3]]
    wrong = []

    def work(first):
        for step in range(20):
            row = rows[(first + step) % len(rows)]
            if not np.array_equal(counted.embed(row), [expected(row)]):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert counted.engine._cache._bytes == sum(entry.nbytes for entry in counted.engine._cache._entries.values())


def test_a_batch_that_does_not_fit_names_the_model(counted):
    good = batch_of([1, B])
    for change, message in (
        ({"pixel_values": good["pixel_values"][:4]}, r"^toy: pixel_values: expected the shape \[12, 6\] by image_grid"),
        ({"input_ids": np.array([[1, 1, 1, 1]])}, r"^toy: input_ids: expected 3 times the image token 9 by image_grid"),
        ({"attention_mask": np.array([[1, 1, 0, 1]])}, r"^toy: input_ids: row 0: the image tokens do not fit"),
        (
            {"image_digests": np.zeros((2, 2), np.uint64)},
            r"^toy: image_digests: expected one for each of 1 images, got 2",
        ),
    ):
        with pytest.raises(EngineError, match=message):
            counted.engine.run(good | change)
    assert np.array_equal(counted.engine.run(good), [expected([1, B])])


def test_a_vision_graph_of_another_width_is_refused(vision, text):
    rules = VisualTokens(
        image_token_id=IMAGE, merge_size=2, patch_width=6, position_grid=4, hidden=4, deepstack_layers=2
    )
    engine = VisualEngine(vision, text, rules=rules, output="sentence_embedding", threads=1, name="toy")
    message = r"^toy \(vision\): expected \[1, 3, 4\] and \[2, 1, 3, 4\] from the vision graph, got \[1, 3, 3\] and"
    with pytest.raises(EngineError, match=message):
        engine.run(batch_of([B]))


def test_a_vision_graph_that_fails_tells_its_shapes(vision, text):
    rules = VisualTokens(
        image_token_id=IMAGE, merge_size=2, patch_width=5, position_grid=4, hidden=3, deepstack_layers=2
    )
    engine = VisualEngine(vision, text, rules=rules, output="sentence_embedding", threads=1, name="toy")
    narrow = batch_of([A])
    narrow["pixel_values"] = narrow["pixel_values"][:, :5]
    with pytest.raises(
        EngineError, match=r"^toy \(vision\): running a batch failed \(pixel_values \[1, 4, 5\], interp"
    ):
        engine.run(narrow)


def test_graphs_that_are_exchanged_are_refused(vision, text):
    with pytest.raises(EngineError, match=r"^toy \(vision\): the graph has no output 'image_embeds'"):
        VisualEngine(text, vision, rules=RULES, output="sentence_embedding", threads=1, name="toy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_bytes": -1}, "cache_bytes: expected at least 0, got -1"),
        ({"max_batch_patches": 0}, "max_batch_patches: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(vision, text, options, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        VisualEngine(vision, text, rules=RULES, output="sentence_embedding", **options)


def test_a_closed_engine_says_so(counted):
    counted.embed([A])
    counted.engine.close()
    counted.engine.close()
    assert not counted.engine._cache._entries
    with pytest.raises(EngineError, match=r"^toy: the engine is closed$"):
        counted.embed([2])
    with pytest.raises(EngineError, match=r"^toy \(vision\): the engine is closed$"):
        counted.embed([A])

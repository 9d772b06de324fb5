"""What Triton Inference Server's Python backend runs: texts and images in, vectors or scores out.

    request -> items -> rtx's preprocessing and batching -> requests to the graphs' models in the server -> response

`--triton-repo` of `rtx export` and `rtx build` writes all of these models. The server brings the module
`triton_python_backend_utils`, whose interface is documented in github.com/triton-inference-server/python_backend.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.backends.graphs import open_graphs
from rtx.runtime.bundle import Bundle
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget, rows_taken
from rtx.runtime.errors import EngineError, InvalidItemsError, RtxError
from rtx.runtime.images import ImageLimits
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import Batch, Encoded

GRAPH, IMAGE_GRAPH, MAX_TOKENS, ENGINE = "graph", "image_graph", "max_batch_tokens", "engine"
"""Parameters of the configuration: the graph's model and the one for images, tokens that go to it at once, and the
bundle's engine if it runs that."""

TEXT, PROMPT, EMBEDDING = "text", "prompt", "embedding"
QUERY, DOCUMENT, FIRST_STAGE, SCORE = "query", "document", "first_stage", "score"
"""Names of inputs and outputs."""

A = TypeVar("A")

IMAGES = {TEXT: "image", QUERY: "query_image", DOCUMENT: "document_image"}
"""What an image beside each text is called."""


class GraphModel:
    """A graph's model as `rtx.runtime.backends.opener.Graph`.

    Args:
        server: the module `triton_python_backend_utils`.
        name: of the model.
        output: that `run` gives.
        contract: of the bundle.
        profiles: of the engine that the model runs; none for a graph, which takes as many rows as requests have.
    """

    packed = False

    def __init__(
        self,
        server: Any,
        name: str,
        output: str,
        contract: Contract,
        profiles: Sequence[Mapping[str, Sequence[int]]] = (),
    ) -> None:
        self.name = name
        self.input_names: tuple[str, ...] = contract.inputs
        self.metadata: dict[str, str] = {}
        self._server, self._output, self._contract, self._profiles = server, output, contract, profiles

    def max_rows(self, longest: Encoded) -> int | None:
        """As `rtx.runtime.engine.Engine` has it."""
        return rows_taken(self._profiles, longest) if self._profiles else None

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """As `rtx.runtime.engine.Engine` has it."""
        (found,) = self.fetch([self._output], batch)
        return found.reshape(self._contract.output_shape(len(found)))

    def fetch(self, outputs: Sequence[str], batch: Batch) -> list[NDArray[np.float32]]:
        """As `rtx.runtime.backends.opener.Graph` has it."""
        server = self._server
        request = server.InferenceRequest(
            model_name=self.name,
            requested_output_names=[*outputs],
            inputs=[server.Tensor(name, _not_empty(array)) for name, array in batch.items()],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(f"{self.name}: {response.error().message()}")
        # The server's memory ends with the response: copies.
        return [
            np.array(server.get_output_tensor_by_name(response, name).as_numpy(), dtype=np.float32) for name in outputs
        ]

    def close(self) -> None:
        pass


@dataclass
class _Asked:
    """A request: its rows, or why it cannot be used."""

    rows: list[Any] = field(default_factory=list)
    prompt: str | None = None
    first_stage: list[float] = field(default_factory=list)
    error: str = ""
    results: NDArray[np.float32] | None = None


class TritonPythonModel:
    """Loaded by the server, which calls these three methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open what lies beside the model.

        Args:
            args: of the server: the model's folder, version and configuration.
        """
        self._server: Any = importlib.import_module("triton_python_backend_utils")
        bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"])
        contract = bundle.manifest.contract
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        plan = parameters.get(ENGINE)
        profiles = () if plan is None else bundle.manifest.engines[plan["string_value"]].profiles

        def open_graph(graph: Path, *, output: str, **_: object) -> GraphModel:
            return GraphModel(self._server, str(graph), output, contract, profiles)

        named = [Path(parameters[key]["string_value"]) for key in (GRAPH, IMAGE_GRAPH) if key in parameters]
        engine = open_graphs(contract, *named, name=str(named[0]), open_graph=open_graph)
        kind = Embedder if contract.task == "embed" else Reranker
        tokens = int(parameters[MAX_TOKENS]["string_value"])
        # The graph's model takes as many rows as this one.
        budget = Budget(max_batch_tokens=tokens, max_batch_items=config["max_batch_size"])
        # Images come as bytes. A text that names a file or a URL is a text.
        limits = ImageLimits(allow_paths=False, allow_urls=False)
        self._model: Embedder | Reranker = kind(bundle.preprocessor(limits=limits), engine, budget=budget)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Requests that the server has put together; each gets its results, or its own error."""
        asked = [self._read(request) for request in requests]
        for prompt in dict.fromkeys(one.prompt for one in asked):
            self._run([one for one in asked if one.prompt == prompt and not one.error], prompt)
        return [self._respond(one) for one in asked]

    def finalize(self) -> None:
        self._model.close()

    def _read(self, request: Any) -> _Asked:
        asked = _Asked()
        try:
            if isinstance(self._model, Embedder):
                asked.rows = self._items(request, TEXT)
                asked.prompt = _one(self._texts(request, PROMPT, optional=True))
            else:
                queries, documents = self._items(request, QUERY), self._items(request, DOCUMENT)
                asked.rows = [*zip(queries, _as_many(DOCUMENT, documents, queries, QUERY), strict=True)]
                if self._model.needs_first_stage:
                    scores = self._tensor(request, FIRST_STAGE).astype(np.float64).ravel()
                    if len(scores) != len(asked.rows) or not np.isfinite(scores).all():
                        raise ValueError(f"{FIRST_STAGE}: expected a finite number for each row")
                    asked.first_stage = scores.tolist()
        except ValueError as wrong:
            asked.error = str(wrong)
        return asked

    def _items(self, request: Any, name: str) -> list[Any]:
        """A text a row; or of a model that takes them, an image, or both, where what is empty is not there."""
        if not self._model.contract.takes_images:
            return [*self._texts(request, name)]
        beside = IMAGES[name]
        texts, images = self._texts(request, name, optional=True), self._images(request, beside)
        if not texts and not images:
            raise ValueError(f"input '{name}' or '{beside}' is missing")
        texts = texts or [""] * len(images)
        images = _as_many(beside, images, texts, name) if images else [b""] * len(texts)
        return [
            ({"text": text, "image": image} if text else image) if image else text
            for text, image in zip(texts, images, strict=True)
        ]

    def _images(self, request: Any, name: str) -> list[bytes]:
        if self._server.get_input_tensor_by_name(request, name) is None:
            return []
        return [
            image if isinstance(image, bytes) else str(image).encode() for image in self._tensor(request, name).ravel()
        ]

    def _texts(self, request: Any, name: str, *, optional: bool = False) -> list[str]:
        tensor = self._server.get_input_tensor_by_name(request, name)
        if tensor is None and optional:
            return []
        found = self._tensor(request, name).ravel()
        texts = []
        for row, text in enumerate(found):
            try:
                texts.append(text.decode() if isinstance(text, bytes) else str(text))
            except UnicodeDecodeError as wrong:
                raise ValueError(f"row {row}: {name}: expected UTF-8, got {wrong}") from wrong
        return texts

    def _tensor(self, request: Any, name: str) -> NDArray[Any]:
        tensor = self._server.get_input_tensor_by_name(request, name)
        if tensor is None:
            raise ValueError(f"input '{name}' is missing")
        array: NDArray[Any] = tensor.as_numpy()
        return array

    def _run(self, asked: Sequence[_Asked], prompt: str | None) -> None:
        """Rows of several requests together; a row that cannot be used fails its own request alone."""
        while asked:
            try:
                results = self._forward(asked, prompt)
            except InvalidItemsError as invalid:
                ends = np.cumsum([len(one.rows) for one in asked])
                for item in invalid.items:
                    place = int(np.searchsorted(ends, item.index, side="right"))
                    row = item.index - (int(ends[place - 1]) if place else 0)
                    asked[place].error = asked[place].error or f"row {row}: {item.message}"
                asked = [one for one in asked if not one.error]
            except RtxError as broken:
                for one in asked:
                    one.error = str(broken)
                return
            else:
                parts = np.split(results, np.cumsum([len(one.rows) for one in asked])[:-1])
                for one, part in zip(asked, parts, strict=True):
                    one.results = part
                return

    def _forward(self, asked: Sequence[_Asked], prompt: str | None) -> NDArray[np.float32]:
        rows = [row for one in asked for row in one.rows]
        if isinstance(self._model, Embedder):
            vectors: NDArray[np.float32] = self._model.embed(rows, prompt=prompt)
            return vectors
        first_stage = [score for one in asked for score in one.first_stage]
        return self._model.score(rows, first_stage=first_stage or None)[:, np.newaxis]

    def _respond(self, asked: _Asked) -> Any:
        server = self._server
        if asked.error or asked.results is None:
            return server.InferenceResponse(output_tensors=[], error=server.TritonError(asked.error))
        name = EMBEDDING if isinstance(self._model, Embedder) else SCORE
        return server.InferenceResponse(output_tensors=[server.Tensor(name, asked.results)])


def _not_empty(array: NDArray[Any]) -> NDArray[Any]:
    """A table without rows gets one, of zeros, to which nothing refers: the server need not take an empty tensor."""
    if array.size:
        return array
    return np.zeros([max(1, size) for size in array.shape], dtype=array.dtype)


def _as_many(name: str, rows: list[A], others: Sequence[Any], of: str) -> list[A]:
    """The rows of an input, of which there are as many as of another."""
    if len(rows) != len(others):
        raise ValueError(f"{name}: expected {len(others)} rows, as {of} has, got {len(rows)}")
    return rows


def _one(prompts: Sequence[str]) -> str | None:
    """The prompt of a request, which is one for all of its rows."""
    if len({*prompts}) > 1:
        given = ", ".join(dict.fromkeys(prompts))
        raise ValueError(f"{PROMPT}: expected the same for all rows of a request, got {given}")
    return prompts[0] if prompts and prompts[0] else None

"""The embed stage where the model is a server: any that speaks OpenAI's embeddings protocol."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from fmembed.arrays import Floats
from fmembed.checkpoint.opening import Checkpoint
from fmembed.errors import FmembedError, ModelError
from fmembed.redaction import scrub
from fmembed.rows.counts import add_counts
from fmembed.rows.pieces import Piece, unpack_pieces
from fmembed.rows.precision import Ranges
from fmembed.rows.vectors import Causes, VectorColumns, Vectors
from fmembed.spec import EndpointSpec

_MAX_MESSAGE = 300
# Tries where an answer arrives whole but is wrong: too few vectors, two for one text, no numbers.
_MAX_WRONG_ANSWERS = 3
# What a server says of the texts themselves; anything else is not a row's fault.
_REFUSALS = (400, 413, 422)


class EndpointEncoder:
    """A server as a Ray Data stage: the same call as `encoder.Encoder`, and the same columns."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dim: int,
        ranges: Ranges | None = None,
        pieces_are_rows: bool = False,
    ) -> None:
        """Make a client.

        Args:
            checkpoint: With `endpoint`.
            dim: What `Endpoint.check` found; a vector of another length is no answer.
            ranges: For outputs in int8.
            pieces_are_rows: As for `encoder.Encoder`.
        """
        assert checkpoint.endpoint is not None
        self._endpoint = Endpoint(checkpoint.endpoint, checkpoint.id, dim)
        self._dim = dim
        dims = {o.column: dim for o in checkpoint.outputs}
        self._columns = VectorColumns(checkpoint.outputs, dims, ranges or {}, pieces_are_rows)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace `model_input` by a column of vectors for each output."""
        before = Counter(self._endpoint.counts)
        pieces = unpack_pieces(rows)
        vectors, causes = self._embed(pieces.pieces)
        rows = self._columns.join(rows, pieces, vectors, causes)
        return add_counts(rows, {**(self._endpoint.counts - before), **pieces.counts})

    def _embed(self, pieces: Sequence[Piece]) -> tuple[Vectors, Causes]:
        texts = [piece.values.tobytes().decode() for piece in pieces]
        found, causes = self._endpoint.embed(texts)
        vectors = np.zeros((len(texts), self._dim), dtype=np.float32)
        for i, vector in enumerate(found):
            if vector is not None:
                vectors[i] = vector
        return dict.fromkeys(self._columns.dims, vectors), causes


class Endpoint:
    """Texts to vectors by HTTP: bounded concurrency, retries with backoff, bad rows found alone.

    The key comes from the environment of the process that calls, and goes nowhere else.
    """

    def __init__(self, spec: EndpointSpec, model: str, dim: int | None = None) -> None:
        import openai

        self._spec, self._model, self._dim = spec, model, dim
        self._client = openai.OpenAI(
            base_url=spec.base_url,
            # Servers of one's own take none, but the client insists on a text.
            api_key=os.environ.get(spec.api_key_env) or "none",
            max_retries=spec.max_retries,
            timeout=spec.timeout_s,
        )
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def check(self) -> int:
        """Ask for one vector before anything is written; its length.

        Raises:
            ModelError: The server does not answer, knows no such model, or refuses the key.
        """
        try:
            vectors, causes = self.embed(["test"])
        except ModelError:
            raise
        except FmembedError as e:
            raise ModelError(str(e).partition(";")[0]) from None
        if vectors[0] is None:
            raise ModelError(f"model.endpoint: {self._spec.base_url}: {causes[0][1]}")
        return len(vectors[0])

    def embed(self, texts: Sequence[str]) -> tuple[list[Floats | None], Causes]:
        """Embed texts, `batch_rows` to a request and `concurrency` requests at once.

        Returns:
            The vector of each text, shape (dim,), None where there is none; and for those, by
            position, (error, message).

        Raises:
            ModelError: The server refuses the key, or knows no such model.
            FmembedError: It does not answer, or goes on failing: not a row's fault.
        """
        vectors: list[Floats | None] = [None] * len(texts)
        causes: Causes = {}
        size = self._spec.batch_rows
        batches = [range(i, min(i + size, len(texts))) for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            for found, bad in pool.map(lambda batch: self._request(texts, batch), batches):
                causes |= bad
                for i, vector in found.items():
                    vectors[i] = vector
        return vectors, causes

    def _request(self, texts: Sequence[str], batch: range) -> tuple[dict[int, Floats], Causes]:
        """Embed one batch, or both its halves where the server does not take or answer it whole."""
        import openai

        cause = ("no answer", "the server gives no usable vector for it")
        for _ in range(_MAX_WRONG_ANSWERS):
            try:
                answer = self._post([texts[i] for i in batch])
            except openai.APIStatusError as e:
                if e.status_code not in _REFUSALS:
                    raise self._failed(e) from None
                cause = ("refused by the server", self._clean(e.message))
                break
            except openai.OpenAIError as e:
                raise self._failed(e) from None
            except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
                answer = {}  # no JSON, or not of this shape
            if len(answer) == len(batch):
                finite = {i: v for i, v in answer.items() if np.isfinite(v).all()}
                found = {batch[i]: v for i, v in finite.items()}
                message = "the server's vector has NaN or infinity"
                bad = {batch[i]: ("not finite", message) for i in answer.keys() - finite.keys()}
                return found, bad
            with self._lock:
                self.counts["endpoint_retries"] += 1
        if len(batch) == 1:
            return {}, {batch[0]: cause}
        middle = batch.start + len(batch) // 2
        first = self._request(texts, range(batch.start, middle))
        second = self._request(texts, range(middle, batch.stop))
        return {**first[0], **second[0]}, {**first[1], **second[1]}

    def _post(self, texts: list[str]) -> dict[int, Floats]:
        """Send one request; the vectors by their place, those of another length left out.

        Servers may answer in any order: an answer's `index` says which text it is of.
        """
        import openai

        dimensions = self._spec.dimensions
        # Named, because the client asks for base64 otherwise, which not every server knows.
        raw = self._client.embeddings.with_raw_response.create(
            model=self._model,
            input=texts,
            encoding_format="float",
            dimensions=dimensions if dimensions is not None else openai.omit,
        )
        answer: Any = raw.http_response.json()
        usage = answer.get("usage") or {} if isinstance(answer, dict) else {}
        num_tokens = usage.get("total_tokens") or usage.get("prompt_tokens") or 0
        with self._lock:
            self.counts["endpoint_tokens"] += int(num_tokens)
            self.counts["endpoint_requests"] += 1
            self.counts["endpoint_retries"] += raw.retries_taken
        found: dict[int, Floats] = {}
        items = answer.get("data") if isinstance(answer, dict) else None
        for item in items if isinstance(items, list) else []:
            index, values = item.get("index"), item.get("embedding")
            if not isinstance(index, int) or not 0 <= index < len(texts) or index in found:
                return {}
            try:
                vector = np.array(values, dtype=np.float32)
            except (OverflowError, TypeError, ValueError):
                continue
            with self._lock:
                self._dim = self._dim or vector.size
            if vector.shape == (self._dim,) and vector.size:
                found[index] = vector
        return found

    def _failed(self, error: Exception) -> FmembedError:
        import openai

        url = self._spec.base_url
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return ModelError(
                f"model.endpoint.api_key_env: {url} refuses the key ({status}); set the "
                f"environment variable {self._spec.api_key_env} where the actors run"
            )
        if status == 404:
            return ModelError(
                f"model.id: {url} knows no model {self._model!r}, or no embeddings at all (404)"
            )
        what = f"answered {status}" if status is not None else "did not answer"
        if isinstance(error, openai.APITimeoutError):
            what += f" within model.endpoint.timeout_s = {self._spec.timeout_s:g}"
        return FmembedError(
            f"model.endpoint: {url} {what} in {1 + self._spec.max_retries} tries; what "
            "is committed stays, the same command resumes"
        )

    def _clean(self, message: str) -> str:
        key = os.environ.get(self._spec.api_key_env)
        return scrub(message.replace(key, "...") if key else message)[:_MAX_MESSAGE]

"""The HTTP side: routes, limits, and what is said when a request is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from batching import Batcher, FullError
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from model import Model
from pictures import PictureError, read_picture
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server takes upon itself.

    Attributes:
        max_batch: Images in one call of the network.
        max_wait_ms: How long the first image of a batch waits for requests that are inside already. Batches form
            without it too, while the one before runs; waiting pays where a call costs much and an image little, as on
            accelerators.
        places: Requests inside at once; one more gets 503.
        max_bytes: Largest body.
        max_pixels: Largest width times height of a picture.
        body_seconds: A body that takes longer to arrive is given up.
        decoders: Threads that decode pictures.
    """

    max_batch: int = 16
    max_wait_ms: float = 0.0
    places: int = 64
    max_bytes: int = 10_000_000
    max_pixels: int = 24_000_000
    body_seconds: float = 10.0
    decoders: int = 2


class Score(BaseModel):
    """One class."""

    index: int
    name: str
    probability: float


class Prediction(BaseModel):
    """The most probable classes of one picture."""

    top: list[Score] = Field(description="most probable first")
    batch: int = Field(description="pictures that shared the call of the network")


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


class _RefusalError(Exception):
    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


_BODY = {"schema": {"type": "string", "format": "binary"}}
_PICTURE = {"required": True, "content": {"image/png": _BODY, "image/jpeg": _BODY}}
_RETRY = "1"  # seconds: a full queue is empty again by then, unless the network takes far longer than usual


def create_app(model: Model, limits: Limits) -> FastAPI:
    """Build the service around one model."""
    batcher = Batcher(
        model.probabilities,
        max_batch=limits.max_batch,
        max_wait=limits.max_wait_ms / 1000,
        places=limits.places,
    )
    decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decoder")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await batcher.start()
        yield
        await batcher.stop()
        decoders.shutdown()

    def prepare(content: bytes) -> np.ndarray:
        return model.prepare(read_picture(content, size=model.size, max_pixels=limits.max_pixels))

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in {
            400: "damaged picture",
            408: "body too slow",
            413: "too many bytes or pixels",
            415: "neither PNG nor JPEG",
            503: "full; see Retry-After",
        }.items()
    }
    app = FastAPI(title="robustcompress model", lifespan=lifespan)
    _say_errors_in_one_sentence(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process should be left alone (503: restart it)."""
        if not batcher.alive:
            raise _RefusalError(503, "the thread that runs the network has ended")
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether to send requests here now (503: elsewhere, for a moment)."""
        if not batcher.alive or batcher.full:
            raise _RefusalError(503, "not taking requests just now", Retry_After=_RETRY)
        return {"status": "ready"}

    @app.get("/metadata")
    async def metadata() -> dict[str, object]:
        """What the file says about itself, and the limits of this server."""
        return {**model.describe(), "limits": asdict(limits)}

    @app.post("/predict", responses=refusals, openapi_extra={"requestBody": _PICTURE})
    async def predict(request: Request, top: Annotated[int, Query(ge=1)] = 5) -> Prediction:
        """Classify the picture that is the body of the request."""

        async def image() -> np.ndarray:
            content = await _read_body(request, limits)
            return await asyncio.get_running_loop().run_in_executor(decoders, prepare, content)

        try:
            shares, batch = await batcher.serve(image)
        except FullError:
            raise _RefusalError(503, "too many requests at once; try again", Retry_After=_RETRY) from None
        best = np.argsort(-shares, kind="stable")[:top]
        scores = [Score(index=int(k), name=model.classes[k], probability=float(shares[k])) for k in best]
        return Prediction(top=scores, batch=batch)

    return app


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body, or a refusal as soon as it is known to be too large, too slow or wrapped up."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise _RefusalError(415, "send the file itself as the body, not a form: curl --data-binary @picture.png URL")
    too_large = _RefusalError(413, f"the body is larger than {limits.max_bytes} bytes", Connection="close")
    if int(request.headers.get("content-length", 0)) > limits.max_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limits.max_bytes:
                    raise too_large
    except TimeoutError:
        reason = f"the body took longer than {limits.body_seconds:g} s to arrive"
        raise _RefusalError(408, reason, Connection="close") from None
    except ClientDisconnect:
        raise _RefusalError(400, "the client went away") from None
    if not content:
        raise _RefusalError(400, "the body is empty; send a PNG or JPEG file")
    return bytes(content)


def _say_errors_in_one_sentence(app: FastAPI) -> None:
    """Give every refusal the same form: `{"error": sentence}`."""

    def answer(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": reason}, status, headers)

    @app.exception_handler(_RefusalError)
    async def refused(request: Request, error: _RefusalError) -> JSONResponse:
        return answer(error.status, str(error), error.headers)

    @app.exception_handler(PictureError)
    async def no_picture(request: Request, error: PictureError) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def bad_argument(request: Request, error: RequestValidationError) -> JSONResponse:
        found = (f"{part['loc'][-1]}={part['input']!r}: {part['msg']}" for part in error.errors())
        return answer(422, "; ".join(found))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        return answer(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", dict(error.headers or {})
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed on this request; its log says why")

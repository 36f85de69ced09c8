"""The web application: one address for scores in any form, and one that says how it is."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from rlxf.core.errors import RlxfError, ScoreError
from rlxf.tools.serve.batching import Batcher
from rlxf.tools.serve.forms import BadBody, read


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the application must know of its service."""

    name: str  # of the model or function, for /health
    kind: str
    max_bytes: int  # of a request
    token: str | None = None  # that a request must bear


class _Refused(Exception):
    """A request is answered with a status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def make_app(batcher: Batcher, served: Served) -> FastAPI:
    """POST a request in any form to any path; GET /health."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    app = FastAPI(title="rlxf reward service", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"ready": True, served.kind: served.name, **asdict(batcher.counts)})

    @app.post("/{path:path}")
    async def score(request: Request) -> Response:
        try:
            _require_token(request, served.token)
            wanted = read(await _content(request, served.max_bytes))
            scores = await batcher.score(wanted, request.is_disconnected) if len(wanted) else []
            return Response(json.dumps(wanted.answer(scores), allow_nan=False), media_type="application/json")
        except _Refused as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            return PlainTextResponse(str(error), error.status, headers=headers)
        except BadBody as error:
            return PlainTextResponse(str(error), 422)
        except ScoreError as error:
            return PlainTextResponse(str(error), 500)
        except RlxfError as error:  # the texts do not suit the model or the function
            return PlainTextResponse(str(error), 422)
        except Exception as error:  # noqa: BLE001  the client is told what happened
            return PlainTextResponse(f"scoring failed: {type(error).__name__}: {error}", 500)

    return app


def _require_token(request: Request, token: str | None) -> None:
    given = request.headers.get("Authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        what = "another token came" if given else "none came"
        raise _Refused(401, f"expected the header `Authorization: Bearer TOKEN` with the service's token; {what}")


async def _content(request: Request, max_bytes: int) -> bytes:
    refusal = _Refused(413, f"the request is larger than {max_bytes:,} bytes; send fewer completions at a time")
    if int(request.headers.get("Content-Length", "0")) > max_bytes:
        raise refusal
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise refusal
    return bytes(content)

"""Serving a reward model or a reward function until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.config.kinds import ReadAt
from rlxf.core.errors import ConfigError

if TYPE_CHECKING:
    from rlxf.tools.serve.batching import Score

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 1024  # connections that wait to be taken
GRACE_S = 30  # how long requests under way may take after SIGTERM


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is served, and how."""

    load: Path | None = None  # one of these three
    function: Path | None = None
    rule: str | None = None
    options: dict[str, Any] | None = None  # of the rule
    timeout_s: float = 60.0  # longest time of a request to a function or rule
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    batch_size: int = 64  # completions that a model scores together
    max_wait_ms: float = 5.0  # how long a batch that is not full waits for further requests
    max_mb: float = 64.0  # of a request
    token_env: str | None = None  # environment variable with the token that requests must bear
    read_at: ReadAt = "auto"
    seq_length: int | None = None
    device: str = "auto"
    bf16: bool = False
    trust_remote_code: bool = False


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, whose exit code comes back. Requests under way are still answered.

    Raises:
        ConfigError: an option is wrong, the address cannot be used, or a package is missing.
    """
    token = _token(settings.token_env)
    try:
        import uvicorn

        from rlxf.tools.serve.app import Served, make_app
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; type: pip install 'rlxf[serve]'") from error
    from rlxf.tools.serve.batching import Batcher
    from rlxf.tools.serve.scorers import FunctionScores

    with _listening(settings.host, settings.port) as place:  # before a model is loaded, which takes long
        score, kind, name = _scores(settings)
        batcher = Batcher(
            score,
            batch_size=settings.batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            merge=settings.load is not None,
        )
        served = Served(name=name, kind=kind, max_bytes=int(settings.max_mb * 2**20), token=token)
        if token is None and not settings.host.startswith("127.") and settings.host not in ("localhost", "::1"):
            log.warning("whoever reaches %s can ask for scores: set --token-env", settings.host)
        config = uvicorn.Config(
            make_app(batcher, served),
            log_level="warning",
            access_log=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=75,
        )
        ended: list[int] = []
        previous = [signal.signal(number, lambda number, _: ended.append(number)) for number in SIGNALS]
        try:
            place.listen(BACKLOG)  # who reads the next line can connect
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"{kind} {name} at http://{host}:{place.getsockname()[1]}/score", flush=True)  # noqa: T201
            if not ended:
                uvicorn.Server(config).run(sockets=[place])  # raises its signals again when it has ended
        finally:
            for number, handler in zip(SIGNALS, previous, strict=True):
                signal.signal(number, handler)
            if isinstance(score, FunctionScores):
                score.close()
    counts = batcher.counts
    print(f"ended: {counts.requests} requests, {counts.completions} completions, {counts.failed} failed")  # noqa: T201
    return 128 + ended[0] if ended else 0


def _scores(settings: Settings) -> tuple[Score, str, str]:
    """What scores, its kind and its name."""
    # megatron-core 0.16 calls collectives by names that torch 2.13 renames; remove with the next megatron-core.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    from rlxf.tools.serve.scorers import FunctionScores, ModelScores, ModelSettings

    if settings.function is not None:
        function = FunctionScores.from_file(settings.function, timeout_s=settings.timeout_s)
        return function, "function", settings.function.name
    if settings.rule is not None:
        rule = FunctionScores.from_rule(settings.rule, settings.options, timeout_s=settings.timeout_s)
        return rule, "rule", settings.rule
    if settings.load is None:
        raise ConfigError("expected --load MODEL, --function FILE or --rule NAME, got none")
    model = ModelSettings(
        load=settings.load,
        read_at=settings.read_at,
        batch_size=settings.batch_size,
        seq_length=settings.seq_length,
        device=settings.device,
        bf16=settings.bf16,
        trust_remote_code=settings.trust_remote_code,
    )
    return ModelScores(model), "model", settings.load.absolute().name


def _listening(host: str, port: int) -> socket.socket:
    """A socket at that address; nobody can connect to it before the server listens.

    Raises:
        ConfigError: the address is taken, or not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be served at: {error.strerror}; name another port, or 0 for any"
        ) from error
    return place


def _token(variable: str | None) -> str | None:
    token = os.environ.get(variable, "").strip() if variable is not None else None
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(
            f"--token-env {variable}: expected an environment variable with a token of printable ASCII characters"
        )
    return token

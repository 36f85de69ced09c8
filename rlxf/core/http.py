"""Asking an HTTP service with JSON: many requests at a time, every fault of the server as a sentence for the user."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import queue
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from rlxf.core.addresses import is_link_local, refusal, short_url, url_problem
from rlxf.core.errors import ConfigError
from rlxf.core.stop import Stop
from rlxf.core.waiting import in_thread

PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before the second try, and at most; `Retry-After` is honoured up to the latter
KEEP_ALIVE_S = 1.0  # shorter than any server's, so that no request meets a connection that the server is closing
CLOSE_S = 5.0
_TICK_S = 0.2  # how often a wait looks at the stop request
_SAID_BYTES, _SAID_CHARS = 4096, 400  # what is read and told of an answer that is an error


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSettings:
    """How a service is asked."""

    timeout_s: float = 60.0  # one try, in all
    connect_s: float = 5.0  # of that, to find the address and to connect
    tries: int = 3  # with jittered growing pauses; again only after 5xx, 429, time-outs and lost connections
    concurrency: int = 8  # requests at the same time
    max_bytes: int = 2**20  # of a response, after decompression
    token_env: str | None = None  # environment variable with a bearer token; its value is never logged
    allow_link_local: bool = False  # 169.254.0.0/16, fe80::/10 and the addresses of clouds' metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came of one request."""

    value: Any = None  # the JSON of the response
    problem: str | None = None  # why there is none, in words for the user
    tries: int = 1
    seconds: float = 0.0  # of all tries and the pauses between them, without the wait for a free place


class _Failed(Exception):
    """A try that gave no value; ``again``: the same request may work later, after ``wait_s`` if the server says so."""

    def __init__(self, problem: str, *, again: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.again, self.wait_s = again, wait_s


class _Refused(Exception):
    """A name leads to an address that may not be called. No OSError: aiohttp takes those for lost connections."""


_Arrived = queue.SimpleQueue[tuple[int, Reply] | None]  # None: nothing more will come


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """The requests of one call."""

    payloads: Sequence[bytes]
    deadline_s: float | None
    end: float | None  # the same on the clock of ``time.monotonic``
    arrived: _Arrived


class HttpClient:
    """Posts JSON to one service. Redirects are not followed, and proxies from the environment are not used.

    Requests run in an event loop in a daemon thread, which starts with the first one and ends with ``close``. Whoever
    waits in ``post_all`` can be interrupted by the exception of a signal handler; the requests are then dropped.

    Args:
        url: of the service, http or https.
        settings: how it is asked.
        stop: ends a wait early in whichever thread it is, when the user asked for it.

    Raises:
        ConfigError: the address is none, or may not be called; or the variable of ``token_env`` cannot be used.
    """

    def __init__(self, url: str, settings: HttpSettings, *, stop: Stop | None = None) -> None:
        problem = url_problem(url, allow_link_local=settings.allow_link_local)
        if problem is not None:
            raise ConfigError(f"url: {problem}")
        self._url, self._settings = URL(url), settings
        host = self._url.raw_host or ""  # digits of other scripts have become ASCII ones
        if not settings.allow_link_local and is_link_local(host):
            raise ConfigError(f"url: {refusal(host)}")
        self._name, self._stop = short_url(url), stop
        self._token = _token(settings.token_env)
        self._lock = threading.Lock()
        self._loop: _Loop | None = None

    def post_all(
        self,
        bodies: Sequence[Any],
        *,
        deadline_s: float | None = None,
        done: Callable[[int, Reply], None] = lambda index, reply: None,
    ) -> list[Reply]:
        """A reply to each body, in order; never raises for what a server does.

        Args:
            bodies: each is sent as JSON.
            deadline_s: for all of them together, from now on; a body without an answer then gets a reply that says so.
            done: called in this thread with index and reply as each one comes, in the order in which they come.

        Raises:
            TypeError, ValueError: a body is no JSON; nothing was sent.
            StopRequested: by ``stop``.
        """
        payloads = [json.dumps(body, allow_nan=False).encode() for body in bodies]
        if not payloads:
            return []
        end = None if deadline_s is None else time.monotonic() + deadline_s
        arrived: _Arrived = queue.SimpleQueue()
        work = _Work(payloads=payloads, deadline_s=deadline_s, end=end, arrived=arrived)
        replies: dict[int, Reply] = {}
        task = self._start(work)
        try:
            while (found := self._next(arrived)) is not None:
                replies[found[0]] = found[1]
                done(*found)
            with contextlib.suppress(CancelledError):
                task.result(CLOSE_S)  # raises what is a defect of this module
        except BaseException:
            task.cancel()
            raise
        closed = Reply(problem=f"{self._name}: the client was closed before an answer came", tries=0)
        return [replies.get(index, closed) for index in range(len(payloads))]

    def _next(self, arrived: _Arrived) -> tuple[int, Reply] | None:
        while True:
            try:
                return arrived.get(timeout=_TICK_S)
            except queue.Empty:
                if self._stop is not None and self._stop.must_give_up():
                    raise self._stop.error(f"stopped while waiting for {self._name}") from None

    def close(self) -> None:
        """Drop what is under way and end the thread. Whoever waits for replies gets those that have come."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.stop()

    def _start(self, work: _Work) -> Future[None]:
        with self._lock:  # so that nothing is given to a loop that is stopped
            if self._loop is None:
                self._loop = _Loop(f"http {self._name}", self._settings.concurrency)
            return self._loop.submit(self._post_all(work, self._loop.slots))

    async def _post_all(self, work: _Work, slots: asyncio.Semaphore) -> None:
        async def one(index: int) -> None:
            work.arrived.put((index, await self._post(session, work, work.payloads[index], slots)))

        try:
            async with self._session() as session, asyncio.TaskGroup() as group:
                for index in range(len(work.payloads)):
                    group.create_task(one(index))
        finally:
            work.arrived.put(None)

    def _session(self) -> aiohttp.ClientSession:
        """The connections of one call: none stays open between two steps of a run."""
        settings = self._settings
        resolver = _Resolver(allow_link_local=settings.allow_link_local)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=resolver, use_dns_cache=False, limit=0, keepalive_timeout=KEEP_ALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(total=settings.timeout_s, connect=settings.connect_s),
            headers=headers,
            auto_decompress=False,  # `_body` does it, and stops at the limit
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _post(
        self, session: aiohttp.ClientSession, work: _Work, payload: bytes, slots: asyncio.Semaphore
    ) -> Reply:
        """The reply after as many tries as it takes."""
        begin, tries, last = time.monotonic(), 0, ""
        when = None if work.end is None else asyncio.get_running_loop().time() + work.end - begin
        try:
            async with asyncio.timeout_at(when), slots:
                begin = time.monotonic()
                while True:
                    tries += 1
                    try:
                        value = await self._try(session, payload)
                        return Reply(value=value, tries=tries, seconds=time.monotonic() - begin)
                    except _Failed as failed:
                        last = str(failed)
                        if not failed.again or tries >= self._settings.tries:
                            break
                        await asyncio.sleep(_pause(tries, failed.wait_s))
        except TimeoutError:
            last = f"no answer within the deadline of {work.deadline_s:g} s" + (
                f"; the last try: {last}" if last else ""
            )
        problem = f"{self._name}: {last}" + (f" ({tries} tries)" if tries > 1 else "")
        return Reply(problem=problem, tries=tries, seconds=time.monotonic() - begin)

    async def _try(self, session: aiohttp.ClientSession, payload: bytes) -> Any:
        """The JSON that the service answers.

        Raises:
            _Failed: it does not.
        """
        settings = self._settings
        again = True
        try:
            async with session.post(self._url, data=payload, allow_redirects=False) as response:
                if response.status >= 300:
                    await self._refuse(response)
                return self._parsed(await self._whole(response))
        except aiohttp.ConnectionTimeoutError:
            problem = f"no connection within {settings.connect_s:g} s"
        except TimeoutError:
            problem = f"no complete answer within {settings.timeout_s:g} s"
        except _Refused as error:
            problem, again = str(error), False
        except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError) as error:
            problem, again = f"no secure connection: {self._plain(str(error))}", False
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno or 0
            reason = os.strerror(number) if number in errno.errorcode else str(error.os_error)
            problem = f"no connection ({self._plain(reason)})"
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            problem = "the connection was cut before the answer was complete"
        except aiohttp.ClientError as error:
            problem, again = f"no HTTP: {self._plain(str(error) or type(error).__name__)}", False
        raise _Failed(problem, again=again)

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._settings.max_bytes
        too_large = _Failed(f"the answer is larger than {limit:,} bytes")
        if (response.content_length or 0) > limit:
            raise too_large
        body, complete = await _body(response, limit)
        if not complete:
            raise too_large
        return body

    async def _refuse(self, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise _Failed for a status that says that there is no answer."""
        status = f"{response.status} {self._plain(response.reason or '')}".strip()
        if response.status < 400:
            target = self._plain(response.headers.get("Location", "nowhere"))
            raise _Failed(
                f"answered {status}, a redirect to {target}; redirects are not followed, so name that address"
            )
        said = b""
        with contextlib.suppress(_Failed, aiohttp.ClientError, TimeoutError):  # then the status alone says enough
            said, _ = await _body(response, _SAID_BYTES)
        problem = f"answered {status}" + (f": {self._plain(said.decode(errors='replace'))}" if said.strip() else "")
        if response.status == 401:
            env = self._settings.token_env
            problem += f"; it does not take the token of {env}" if env else "; it wants a token, so set token_env"
        again = response.status == 429 or response.status >= 500
        raise _Failed(problem, again=again, wait_s=_retry_after(response.headers.get("Retry-After", "")))

    def _parsed(self, body: bytes) -> Any:
        try:
            return json.loads(body, parse_constant=_refuse_constant)
        except _Failed:
            raise
        except RecursionError as error:
            raise _Failed("the answer is no JSON that can be read: it is nested too deeply") from error
        except ValueError as error:
            said = self._plain(body[:_SAID_BYTES].decode(errors="replace"))
            raise _Failed(f"the answer is no JSON: {said or 'it is empty'}") from error

    def _plain(self, text: str) -> str:
        """What a server said, for a message: one short line of printable characters, without the token."""
        if self._token:
            text = text.replace(self._token, "***")
        line = "".join(c if c.isprintable() else " " for c in text)
        line = " ".join(line.split())
        return line if len(line) <= _SAID_CHARS else f"{line[:_SAID_CHARS]}..."


class _Loop:
    """An event loop in a daemon thread, and the places for requests in it."""

    def __init__(self, name: str, concurrency: int) -> None:
        self._loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(concurrency)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_S))
        finally:
            self._loop.close()


class _Resolver(AbstractResolver):
    """Addresses of a name, without those that may not be called.

    The lookup has a daemon thread of its own: one of an executor would keep the process alive while a name server is
    silent.
    """

    def __init__(self, *, allow_link_local: bool) -> None:
        self._allow_link_local = allow_link_local

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        def look_up() -> list[Any]:
            return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)

        found = await asyncio.wrap_future(in_thread(look_up, f"look up {host}"))
        addresses = [(str(address[0]), kind, proto) for kind, _, proto, _, address in found]
        allowed = [entry for entry in addresses if self._allow_link_local or not is_link_local(entry[0])]
        if not allowed:
            raise _Refused(refusal(f"{host} ({', '.join(sorted({entry[0] for entry in addresses}))})"))
        return [
            ResolveResult(hostname=host, host=ip, port=port, family=kind, proto=proto, flags=socket.AI_NUMERICHOST)
            for ip, kind, proto in allowed
        ]

    async def close(self) -> None:
        pass


async def _body(response: aiohttp.ClientResponse, limit: int) -> tuple[bytes, bool]:
    """The beginning of the body, decompressed, up to ``limit`` bytes; and whether that is all of it.

    Raises:
        _Failed: it is compressed in a way that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise _Failed("the answer is compressed in a way that was not asked for; send it without Content-Encoding")
    unpack = None if encoding == "identity" else zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # either format
    body = bytearray()
    async for packed in response.content.iter_any():
        if unpack is None:
            body += packed
        else:  # one byte more than fits tells that there is more
            try:
                body += unpack.decompress(packed, limit + 1 - len(body))
            except zlib.error as error:
                raise _Failed(f"the answer cannot be decompressed: {error}") from error
        if len(body) > limit:
            return bytes(body[:limit]), False
    return bytes(body), True


def _refuse_constant(word: str) -> NoReturn:
    raise _Failed(f"the answer holds {word}, which is no JSON; a value that is missing is null")


def _retry_after(value: str) -> float:
    """Seconds that a server asks to wait, at most ``LONGEST_PAUSE_S``; 0 if it does not say."""
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _pause(tries: int, wait_s: float) -> float:
    """Seconds before the next try, after ``tries`` of them; jittered, so that clients do not come back together."""
    return wait_s + min(PAUSE_S * 2.0 ** (tries - 1), LONGEST_PAUSE_S) * (0.5 + random.random())


def _token(variable: str | None) -> str | None:
    """The token in an environment variable.

    Raises:
        ConfigError: it is empty, or cannot be sent.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(
            f"token_env={variable}: expected an environment variable with a token; it is not set or empty"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"token_env={variable}: expected printable ASCII characters without spaces in the variable")
    return token

"""The bytes behind an http(s) URL, within bounds of size and of time."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

_PIECE_BYTES = 1 << 16


class FetchError(Exception):
    """An answer that is too late or not whole; the text is one sentence with what was expected."""


def fetch(url: str, *, check_bytes: Callable[[int], None], timeout_s: float) -> bytes:
    """The body of the answer.

    Args:
        url: of http or https, as are all that it redirects to; proxies are those of the environment.
        check_bytes: told how many bytes there are to come, and then how many there are; it raises when it is too many.
        timeout_s: for all of it, from the connection to the last byte, redirects included. Only the name of the host
            is looked up in the time that the system gives it.

    Raises:
        FetchError: it is too late, or the answer ends early.
        OSError, ValueError, http.client.HTTPException: as urllib raises them; HTTPError is an OSError.
        Whatever `check_bytes` raises.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "rtx", "Accept": "image/*"})
    content = bytearray()
    with _deadline(timeout_s) as watch, _opener(watch).open(request, timeout=timeout_s) as answer:
        declared = answer.length
        check_bytes(declared or 0)
        while piece := answer.read1(_PIECE_BYTES):
            content += piece
            check_bytes(len(content))
    if declared is not None and len(content) < declared:
        raise FetchError(f"the answer is truncated after {len(content):,} of {declared:,} bytes")
    return bytes(content)


@contextmanager
def _deadline(timeout_s: float) -> Iterator[Callable[[socket.socket], None]]:
    """Ends the connections that it is told of when the time is over.

    A timeout of a socket counts from each byte that arrives: who sends one byte a second is never late.
    """
    late = threading.Event()
    watched: list[socket.socket] = []

    def end() -> None:
        late.set()
        for connection in watched:
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def watch(connection: socket.socket) -> None:
        # A handle of our own: TLS takes the original over.
        watched.append(connection.dup())
        if late.is_set():
            end()

    def close() -> None:
        for connection in watched:
            connection.close()

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        with ExitStack() as stack:
            stack.callback(close)
            stack.callback(timer.join)
            stack.callback(timer.cancel)
            yield watch
            # Short of an error, an answer without a declared length seems whole where it was cut off.
            if late.is_set():
                raise TimeoutError
    except (OSError, http.client.HTTPException) as wrong:
        if late.is_set() or isinstance(wrong, TimeoutError):
            raise FetchError(f"not fetched whole within {timeout_s:g} s (timeout_s)") from wrong
        raise


def _opener(watch: Callable[[socket.socket], None]) -> urllib.request.OpenerDirector:
    """Of http and https alone: urllib's own would also read file:// and follow to ftp://."""

    class Watched(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    # In the order of its bases, the watched connection is the one that TLS is put upon.
    class WatchedTls(http.client.HTTPSConnection, Watched):
        pass

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Watched, request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(WatchedTls, request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        Http,
        Https,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPRedirectHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener

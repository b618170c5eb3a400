"""A pretend internet: real clients ask for real addresses, and functions of the test answer.

    def drive(request):
        if request.path == "/uc?id=abc":
            return send(request, b"the file", {"Content-Disposition": 'attachment; filename="a.zip"'})
        return None  # 404

    with Internet({"drive.google.com": drive}) as internet:
        for name, value in internet.environment.items():
            monkeypatch.setenv(name, value)
        ...
    assert internet.hosts == {"drive.google.com"}

It is an HTTP proxy on 127.0.0.1. Clients find it by the usual environment variables; requests, urllib, httpx and what
builds on them obey those. To CONNECT it answers as the server itself, with a certificate for the host that was asked
for, signed by an authority made for this run, which the clients trust by the same environment variables. Nothing ever
leaves the machine: a host or path without an answer gets 404, and every request is recorded.
"""

import contextlib
import hashlib
import re
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import trustme


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    scheme: str  # http or https
    host: str
    path: str  # with the query
    headers: Mapping[str, str]  # of any case: headers.get("range")
    body: bytes


@dataclass(frozen=True)
class Response:
    """What it gets."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after so many bytes of the body
    hold: threading.Event | None = None  # at the cut, wait for this before the connection is closed


Answer = Callable[[Request], Response | None]


def send(request: Request, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """Answers with a file, or with the range of it that was asked for, as servers of files do."""
    etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **(headers or {})}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked or request.headers.get("if-range", etag) not in (etag, headers.get("Last-Modified")):
        return Response(body, 200, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
    if start >= len(body):
        return Response(b"", 416, {"Content-Range": f"bytes */{len(body)}"})
    return Response(body[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"})


def redirect(url: str) -> Response:
    """Sends the client elsewhere."""
    return Response(b"", 302, {"Location": url})


class Internet:
    """The proxy, and what was asked of it.

    Attributes:
        sites: the function that answers for a host; None from it is 404. May be changed while it runs.
        requests: every request in the order of arrival.
        environment: the variables by which clients use it.
    """

    def __init__(self, sites: Mapping[str, Answer] | None = None) -> None:
        self.sites: dict[str, Answer] = dict(sites or {})
        self.requests: list[Request] = []
        self._failures: list[Exception] = []
        self.environment: dict[str, str] = {}
        self._authority = trustme.CA()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._lock = threading.Lock()

    @property
    def hosts(self) -> set[str]:
        """The hosts that were asked."""
        return {request.host for request in self.requests}

    def __enter__(self) -> "Internet":
        self._cleanup = contextlib.ExitStack()
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self._authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.internet = self
        self._cleanup.callback(self._server.server_close)
        self._cleanup.callback(self._server.shutdown)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), address),
            **dict.fromkeys(("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"), ""),
            **dict.fromkeys(
                ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "AWS_CA_BUNDLE"),
                str(folder / "authority.pem"),
            ),
        }
        return self

    def __exit__(self, kind: object, *failure: object) -> None:
        self._cleanup.close()
        if kind is None and self._failures:
            raise self._failures[0]

    def answer(self, request: Request) -> Response:
        """Records a request and asks the site for its answer; what fails there fails the test in the end."""
        with self._lock:
            self.requests.append(request)
        site = self.sites.get(request.host)
        try:
            found = site(request) if site else None
        except Exception as error:
            self._failures.append(error)
            found = Response(b"the test failed\n", 500)
        return found or Response(b"not found\n", 404, {"Content-Type": "text/plain"})

    def context(self, host: str) -> ssl.SSLContext:
        """The TLS side of a server with that name."""
        with self._lock:
            if host not in self._contexts:
                self._contexts[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._authority.issue_cert(host).configure_cert(self._contexts[host])
            return self._contexts[host]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    internet: Internet

    def handle_error(self, request, client_address):
        """A client that hangs up, or does not trust the certificate, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    scheme = "http"

    def do_CONNECT(self) -> None:
        host = self.path.rpartition(":")[0]
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with self.server.internet.context(host).wrap_socket(self.connection, server_side=True) as connection:
            # The same conversation once more, inside.
            _SecureHandler(connection, self.client_address, self.server)

    def do_GET(self) -> None:
        # A proxy is asked for http://host/path, a server for /path.
        url = urlsplit(self.path)
        host = url.hostname or self.headers["Host"].partition(":")[0]
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        response = self.server.internet.answer(Request(self.command, self.scheme, host, path, headers, body))
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.cut])
        if response.cut is not None:
            self.wfile.flush()
            if response.hold is not None:
                response.hold.wait()
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


class _SecureHandler(_Handler):
    scheme = "https"

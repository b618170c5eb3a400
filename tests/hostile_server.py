"""A web server on 127.0.0.1 that misbehaves as told, and a relay that cuts connections to another server."""

import contextlib
import re
import select
import socket
import ssl
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """How one request is answered; by default as a good server does, with ranges."""

    data: bytes = b""  # the whole file
    status: int = 200  # anything else comes without the file
    headers: dict = field(default_factory=dict)  # added, or put in the place of the usual ones; None removes one
    ranges: bool = True  # False: Range is ignored
    if_range: bool = True  # False: If-Range is ignored
    announce: int = 0  # bytes by which Content-Length lies
    chunked: bool = False  # no Content-Length
    cut: int | None = None  # the connection ends after so many bytes of the body
    stall: int | None = None  # nothing more comes after so many bytes, until the server's `resume` is set
    hang_up: bool = False  # no answer at all
    drip: bool = False  # a header comes a byte now and then, until `resume` is set


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    range: str | None
    if_range: str | None
    encoding: str | None


class HostileServer(ThreadingHTTPServer):
    """Answers each path by a script: one Answer a request, the last one for ever after."""

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, context: ssl.SSLContext | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "http" if context is None else "https"
        self.scripts: dict[str, list[Answer]] = {}
        self.seen: list[Seen] = []
        self.count = defaultdict(int)
        self.resume = threading.Event()
        self.guard = threading.Lock()

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"

    def offer(self, path: str, *answers: Answer) -> str:
        """Sets a path's script, from its start, and returns its address."""
        self.scripts[path] = list(answers)
        self.count[path] = 0
        return self.url(path)

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GET requests of a path, in order."""
        return [seen.range for seen in self.seen if seen.path == path and seen.method == "GET"]

    def next_answer(self, path: str) -> Answer:
        with self.guard:
            script = self.scripts.get(path, [Answer(status=404)])
            answer = script[min(self.count[path], len(script) - 1)]
            self.count[path] += 1
            return answer

    def handle_error(self, request, client_address):
        """A client that leaves is no event."""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        told = (self.headers[name] for name in ("Range", "If-Range", "Accept-Encoding"))
        self.server.seen.append(Seen(self.command, self.path, *told))
        answer = self.server.next_answer(self.path)
        if answer.hang_up:
            return
        status, body, headers = self._plain(answer)
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body) + answer.announce)
        # The protocol of the answer, so that chunks are believed.
        self.protocol_version = "HTTP/1.1"
        self.send_response(status)
        for name, value in (headers | {"Connection": "close"} | answer.headers).items():
            if value is not None:
                self.send_header(name, value)
        if answer.drip:
            self._drip()
        self.end_headers()
        self.close_connection = True
        if self.command == "HEAD":
            return
        for stop in sorted(stop for stop in (answer.stall, answer.cut, len(body)) if stop is not None):
            self._send(body[:stop], answer.chunked)
            body = body[stop:]
            if stop == answer.cut:
                return
            if stop == answer.stall:
                self.server.resume.wait(30)
                self._send(body, answer.chunked)
                break
        if answer.chunked:
            self.wfile.write(b"0\r\n\r\n")

    do_HEAD = do_GET

    def _plain(self, answer):
        """What a good server would send: status, body, headers."""
        if answer.status != 200:
            return answer.status, b"", {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        condition = self.headers["If-Range"]
        valid = condition is None or condition in (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        if not wanted or not answer.ranges or (answer.if_range and not valid):
            return 200, answer.data, {}
        start, total = int(wanted[1]), len(answer.data)
        end = min(int(wanted[2]) + 1, total) if wanted[2] else total
        if start >= total:
            return 416, b"", {"Content-Range": f"bytes */{total}"}
        return 206, answer.data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{total}"}

    def _drip(self):
        self.flush_headers()
        self.wfile.write(b"X-Slow: ")
        for _ in range(1000):
            self.wfile.write(b"x")
            if self.server.resume.wait(0.01):
                break
        self.wfile.write(b"\r\n")

    def _send(self, data, chunked):
        if chunked and data:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        self.wfile.write(data)


@contextlib.contextmanager
def hostile_server(context: ssl.SSLContext | None = None):
    """Runs a HostileServer in a thread."""
    server = HostileServer(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.resume.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Relay:
    """Passes TCP connections on to a port, and cuts them all once `budget` bytes went back to the client."""

    def __init__(self, port: int):
        self.upstream = port
        self.budget: int | None = None
        self.passed = 0
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client):
        with client, socket.create_connection(("127.0.0.1", self.upstream)) as server, contextlib.suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(4096)
                    if ready is server:
                        self.passed += len(data)
                        if self.budget is not None and self.passed > self.budget:
                            return
                    if not data:
                        return
                    (client if ready is server else server).sendall(data)

    def close(self):
        self.listener.close()

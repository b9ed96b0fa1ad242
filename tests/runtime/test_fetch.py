"""Downloads against a small Hub on this machine: announced first, only what is needed, one line where they fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from srpo_cli.errors import MissingError
from srpo_cli.registry import HUB_FILES, PROMPT_FILES, HubFiles
from srpo_cli.runtime.fetch import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS = {
    "models/someone/a-model": {"model_index.json": b"{}", "vae/config.json": b"{}", "huge.safetensors": b"0" * 4000},
    "datasets/ymhao/HPDv2": {"train.json": b'[{"prompt": "a cat"}]', "test.json": b"[]"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a snapshot needs."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        if path.startswith("api/"):
            repo, _, what = path.removeprefix("api/").partition("/revision/")
            if not what:
                repo, _, what = path.removeprefix("api/").partition("/tree/")
            files = REPOS.get(repo)
            if repo == "models/black-forest-labs/FLUX.1-dev":
                return self.send(b"{}", {"X-Error-Code": "GatedRepo"}, 403)
            if files is None:
                return self.send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)
            if "/tree/" in path:
                rows = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                return self.send(json.dumps(rows).encode(), {})
            siblings = [{"rfilename": name} for name in files]
            return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})
        repo, _, rest = path.partition("/resolve/")
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        name = rest.partition("/")[2]
        content = REPOS[repo][name]
        self.server.fetched.append(name)
        return self.send(content, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    yield server
    server.shutdown()


def test_a_data_set_is_announced_with_its_size_and_only_what_is_needed_comes(hub: ThreadingHTTPServer) -> None:
    said: list[str] = []
    folder = fetch(PROMPT_FILES["hpdv2"], said.append)
    assert said == ["downloading ymhao/HPDv2 (21 B) from the Hugging Face Hub"]
    assert json.loads((folder / "train.json").read_text()) == [{"prompt": "a cat"}]
    assert [path.name for path in folder.iterdir()] == ["train.json"]


def test_patterns_keep_what_is_not_needed_away(hub: ThreadingHTTPServer) -> None:
    files = HubFiles("someone/a-model", ("model_index.json",), exclude=("huge.safetensors",), size="4 GB")
    said: list[str] = []
    folder = fetch(files, said.append)
    assert said == ["downloading someone/a-model (4 GB) from the Hugging Face Hub"]
    assert (folder / "vae" / "config.json").is_file() and "huge.safetensors" not in hub.fetched


def test_a_gated_repository_says_where_its_licence_is(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(MissingError, match="access to it has not been granted") as failure:
        fetch(HUB_FILES["flux.1-dev"], lambda _: None)
    message = str(failure.value)
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in message and "hf auth login" in message
    assert "hf download black-forest-labs/FLUX.1-dev" in message and "\n" not in message


def test_a_repository_that_is_none_says_so(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(MissingError, match="no/where could not be downloaded: there is no such repository"):
        fetch(HubFiles("no/where", ("model_index.json",)), lambda _: None)


def test_without_a_network_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="the Hub cannot be reached") as failure:
        fetch(PROMPT_FILES["hpdv2"], lambda _: None)
    assert "hf download ymhao/HPDv2 train.json --repo-type dataset" in str(failure.value)
    assert "\n" not in str(failure.value)

"""Data of the hub: through the cache of its client, and from a small server that speaks as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks.example import Selection
from cortex_core.eval.benchmarks.sources import BENCHMARKS, open_benchmark

PUBLISHED = Path(__file__).parent / "published"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; this process is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, repository: str, source: Path) -> None:
    """As a download leaves it."""
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / SHA)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(SHA)


def refusal(name: str, data: str, selection: Selection, kind: type[ValueError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        open_benchmark(name, data, selection).keys()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_fetched_before_needs_no_network(cache: Path) -> None:
    put(cache, "some/babilong", PUBLISHED / "babilong")
    data = "hub:some/babilong"
    keys = open_benchmark("babilong", data, Selection()).keys()
    assert {key.split("/")[0] for key in keys} == {"qa1"}, "qa8 is not among those that are taken unless told otherwise"
    assert len(open_benchmark("babilong", data, Selection(("qa8",))).keys()) == 2
    assert "It has: 0k, 1k" in refusal("babilong", data, Selection(lengths=("2k",)), ConfigError)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("hub:some/thing", "not in the cache, and the hub cannot be reached. Go online, or give a folder"),
        ("hub:some/thing@v2", "not in the cache"),
        ("hub:no id at all", "not an id of the hub. Write hub:owner/name, or a path"),
        ("hub:", "not an id of the hub"),
    ],
)
def test_what_is_not_there_offline_is_one_line(cache: Path, data: str, says: str) -> None:
    assert f"--data = {data}: {says}" in refusal("longbench", data, Selection())


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a data set takes. What is named after an error answers with it."""

    errors: ClassVar[dict[str, tuple[int, str]]] = {
        "gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "down": (500, ""), "private": (401, ""),
    }  # fmt: skip
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        owner = path.removeprefix("/api").split("/")[2]
        files = {str(p.relative_to(PUBLISHED / "babilong")): p for p in (PUBLISHED / "babilong").rglob("*.json")}
        if owner in self.errors:
            self.answer(self.errors[owner][0], b"{}", {"X-Error-Code": self.errors[owner][1]})
        elif path.startswith("/api") and "/revision/" in path:
            if path.endswith("/main"):
                self.answer(200, json.dumps({"id": "some/thing", "sha": SHA, "siblings": []}).encode())
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files.items()]
            self.answer(200, json.dumps(rows).encode())
        else:
            name = path.partition(f"/resolve/{SHA}/")[2]
            content = files[name].read_bytes()
            if self.command == "GET":
                self.fetched.append(name)
            self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


ASK_EACH = """
import json, sys
from cortex_core.eval.benchmarks.example import Selection
from cortex_core.eval.benchmarks.sources import open_benchmark
for data in sys.argv[1:]:
    try:
        print(json.dumps(open_benchmark("babilong", data, Selection(("qa1",), ("0k",))).keys()))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def fetch(endpoint: str, home: Path, *data: str) -> list[object]:
    """Keys, or the error, of each, in a process of its own that is online with `endpoint` as the hub."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", ASK_EACH, *data]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_is_fetched_and_kept(server: str, tmp_path: Path) -> None:
    Hub.fetched.clear()
    wanted = ["qa1/0k/0", "qa1/0k/1", "qa1/0k/2"]
    assert fetch(server, tmp_path, "hub:some/thing", "hub:some/thing@main") == [wanted, wanted]
    assert Hub.fetched == ["data/qa1/0k.json"], "only what is needed, and once"


def test_what_goes_wrong_online_is_one_line(server: str, tmp_path: Path) -> None:
    owners = ("gone", "gated", "down", "private")
    lines = fetch(server, tmp_path, *(f"hub:{owner}/x" for owner in owners), "hub:some/thing@v2")
    for line, says in zip(
        lines,
        (
            "gone/x: the hub has no such data set or revision, or it is private",
            "gated/x: access has to be asked for on its page",
            "down/x: not in the cache, and the hub cannot be reached",
            "private/x: cannot be fetched (Client error '401 Unauthorized'",
            "some/thing@v2: the hub has no such data set or revision",
        ),
        strict=True,
    ):
        assert isinstance(line, str) and "\n" not in line and f"--data = hub:{says}" in line


@pytest.mark.parametrize(
    ("name", "selection", "wanted", "unwanted"),
    [
        ("babilong", Selection(("qa2",), ("4k",)),
         ["data/qa2/4k.json", "4k/qa2-00000-of-00001.parquet", "qa2/4k-00000-of-00001.parquet"],
         ["data/qa2/64k.json", "data/qa20/4k.json", "64k/qa2-00000-of-00001.parquet", "README.md"]),
        ("babilong", Selection(lengths=("10M",)), ["data/qa7/10M.json"], ["data/qa7/1M.json"]),
        ("longbench", Selection(("qasper",)), ["data.zip", "data/qasper/test-0.parquet", "qasper/test-0.parquet"], ["LongBench.py", "lcc/test-0.parquet"]),
        ("longmemeval", Selection(lengths=("s",)), ["longmemeval_s", "longmemeval_s.json", "longmemeval_s_cleaned.json"], ["longmemeval_m_cleaned.json"]),
        ("longmemeval", Selection(), ["longmemeval_m", "longmemeval_oracle.json"], ["README.md"]),
    ],
    ids=range(5),
)  # fmt: skip
def test_only_the_files_needed_are_named(
    name: str, selection: Selection, wanted: list[str], unwanted: list[str]
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    patterns = BENCHMARKS[name].hub_files(selection)
    assert list(filter_repo_objects([*wanted, *unwanted], allow_patterns=patterns)) == wanted

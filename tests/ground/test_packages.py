from __future__ import annotations

import base64
import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedgrove.ground import packages as registry
from fedgrove.ground.errors import DataError
from fedgrove.ground.packages import Package, PipSettings, digest, download, megabytes

CONTENT = b"the whole package" * 1000


def package(content: bytes = CONTENT) -> Package:
    return Package(
        "My.Tiny_Package",
        "1.0",
        "my_tiny-1.0.tar.gz",
        len(content),
        hashlib.sha256(content).hexdigest(),
    )


class Index(BaseHTTPRequestHandler):
    """A package index that asks for credentials, and breaks the first downloads off."""

    breaks = 0
    status = 200
    content = CONTENT
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        if self.path == "/elsewhere/my_tiny-2.0.tar.gz":
            self.reply(b"told" if self.headers["Authorization"] else CONTENT)
            return
        expected = "Basic " + base64.b64encode(b"me:pass word").decode()
        if self.headers["Authorization"] != expected:
            self.send_error(401)
        elif self.path == "/simple/my-tiny-package/" and self.status == 200:
            links = ("../../files/other-1.0.tar.gz", "../../files/my_tiny-1.0.tar.gz#sha256=0")
            away = f"http://localhost:{self.server.server_port}/elsewhere/my_tiny-2.0.tar.gz"
            self.reply("".join(f"<a href='{link}'>x</a>" for link in (*links, away)).encode())
        elif self.path == "/files/my_tiny-1.0.tar.gz":
            whole = Index.breaks == 0
            Index.breaks -= not whole
            self.reply(self.content, self.content if whole else self.content[:100])
        else:
            self.send_error(404 if self.status == 200 else self.status)

    def reply(self, content: bytes, sent: bytes | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if sent is None else sent)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(Index, "breaks", 0)
    url = f"http://me:pass%20word@127.0.0.1:{server.server_port}/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", url)
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(tmp_path: Path, wanted: Package) -> list[int]:
    steps: list[int] = []
    download(wanted, tmp_path / "file", steps.append)
    return steps


def test_a_file_comes_from_a_private_index_and_the_progress_adds_up(
    index: str, tmp_path: Path
) -> None:
    steps = fetch(tmp_path, package())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert sum(steps) == len(CONTENT)


def test_another_host_is_not_told_the_credentials(index: str, tmp_path: Path) -> None:
    fetch(tmp_path, dataclasses.replace(package(), version="2.0", file="my_tiny-2.0.tar.gz"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_download_that_broke_off_is_tried_again(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "breaks", 1)
    steps = fetch(tmp_path, package())
    assert min(steps) < 0
    assert sum(steps) == len(CONTENT)
    assert digest(tmp_path / "file") == package().sha256


def test_one_that_always_breaks_off_is_given_up(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "breaks", 99)
    with pytest.raises(
        DataError, match=r"my_tiny-1\.0\.tar\.gz cannot be fetched: .*broke off early \(100 bytes"
    ):
        fetch(tmp_path, package())


def test_another_content_than_the_pinned_one_is_refused(index: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"127\.0\.0\.1 sent is not the file expected .*SHA-256"):
        fetch(tmp_path, package(b"x" * 10))


def test_the_index_that_does_not_have_it_is_named_without_its_password(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Package("absent", "1.0", "absent-1.0.whl", 1, "0")
    with pytest.raises(DataError, match=r"index at 127\.0\.0\.1 does not list it$"):
        fetch(tmp_path, missing)
    monkeypatch.setattr(Index, "status", 503)
    with pytest.raises(DataError, match=r"index at 127\.0\.0\.1 answered 503"):
        fetch(tmp_path, package())


def test_no_network(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(
        DataError, match=r"index at 127\.0\.0\.1 cannot be reached \(Connection refused\)$"
    ):
        fetch(tmp_path, package())


def test_an_extra_index_is_tried_after_the_first(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "simple" / "my-tiny-package"
    folder.mkdir(parents=True)
    empty = tmp_path / "empty"
    (folder / "my_tiny-1.0.tar.gz").write_bytes(CONTENT)
    (folder / "index.html").write_text('<a href="my_tiny-1.0.tar.gz">it</a>')
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{empty.as_uri()} {(tmp_path / 'simple').as_uri()}")
    fetch(tmp_path, package())
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_full_disk_is_not_taken_for_the_network(index: str) -> None:
    with pytest.raises(OSError, match="No space left"):
        download(package(b"x" * 10), Path("/dev/full"), lambda count: None)


def test_links_of_another_kind_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://somewhere/simple")
    with pytest.raises(DataError, match="ftp: links are not followed"):
        fetch(tmp_path, package())


def test_the_default_index_is_pips_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    (url,) = PipSettings().indexes
    assert url.startswith("https://")
    assert url.endswith("/simple")


def test_pips_files_are_read_and_its_variables_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[download]\nindex-url = https://b/simple\n[global]\nindex-url = https://a/simple\ncert = "
        "nowhere\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert PipSettings().indexes[0] == "https://b/simple"
    with pytest.raises(
        DataError, match=r"certificate file nowhere cannot be read.*correct PIP_CERT"
    ):
        assert PipSettings().opener
    monkeypatch.setenv("PIP_INDEX_URL", "https://c/simple")
    assert PipSettings().indexes[0] == "https://c/simple"


def test_without_pip_and_without_a_setting_it_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(registry.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match=r"names no package index \(set PIP_INDEX_URL\)"):
        fetch(tmp_path, package())


@pytest.mark.parametrize(("size", "shown"), [(2_466_783, "2.5 MB"), (83_506_384, "84 MB")])
def test_sizes_are_shown_in_megabytes(size: int, shown: str) -> None:
    assert megabytes(size) == shown


NPM = """#!/bin/sh
echo "$@" > "{folder}/asked"
while [ "$1" != "--pack-destination" ]; do shift; done
{act}
"""
ARCHIVE = Package(
    "tiny", "1.0", "tiny-1.0.tgz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), registry="npm"
)


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """An ``npm`` of this test that does ``act``; ``$2`` is where it is to save the archive."""
    (folder / "bin").mkdir()
    (folder / "bin" / "npm").write_text(NPM.format(folder=folder, act=act))
    (folder / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")


def test_npm_saves_what_its_registry_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    fake_npm(tmp_path, monkeypatch, f'cp "{tmp_path}/content" "$2/tiny-1.0.tgz"')
    (tmp_path / "cache").mkdir()
    seen: list[int] = []
    download(ARCHIVE, tmp_path / "cache" / "tiny-1.0.tgz", seen.append)
    assert (tmp_path / "cache" / "tiny-1.0.tgz").read_bytes() == CONTENT
    assert sum(seen) == len(CONTENT)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-1.0.tgz"]
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("pack tiny@1.0 ")
    assert "--ignore-scripts" in asked  # nothing of a package is run


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (
            "echo 'npm error code E404' >&2; echo 'npm error 404 https://secret.host/' >&2; exit 1",
            "npm reports E404",
        ),
        ("exit 0", "npm reports no file"),
        (
            'echo other > "$2/tiny-1.0.tgz"',
            "what npm saved is not the file expected (6 bytes with SHA-256",
        ),
    ],
)
def test_npm_trouble_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, sentence: str
) -> None:
    fake_npm(tmp_path, monkeypatch, act)
    with pytest.raises(DataError) as caught:
        download(ARCHIVE, tmp_path / "out.tgz", lambda count: None)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out.tgz").exists()


def test_without_npm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"tiny-1\.0\.tgz cannot be fetched: npm is not installed"):
        download(ARCHIVE, tmp_path / "out.tgz", lambda count: None)

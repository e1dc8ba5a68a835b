"""``fedgrove deploy init`` and its companions: what is written for whom, who may read it, what is
left alone.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tests.tiny import tiny_job

pytest.importorskip("cryptography")

from fedgrove.cli import main
from fedgrove.deploy.certificates import (
    DeployError,
    check_public,
    host_names,
    load_certificates,
    public_of,
)
from fedgrove.deploy.layout import Request, ServerFile, admit_key, init, make_key, renew, site_names
from fedgrove.deploy.site import open_place
from fedgrove.job import Job


@pytest.fixture
def job(tiny_bert: Path, silos: Path, tmp_path: Path) -> Path:
    made = tiny_job(
        tiny_bert,
        silos,
        data={"labels": ["negative", "positive"]},
        lora={"rank": 6},
        train={"local_steps": 7},
    )
    (tmp_path / "job.toml").write_text(made.to_toml())
    return tmp_path / "job.toml"


def test_each_side_gets_its_own(job: Path, tmp_path: Path) -> None:
    init(Request(tmp_path / "d", "fl.example.org", 9000, ["a", "b"], job))
    server, site = tmp_path / "d" / "server", tmp_path / "d" / "sites" / "a"
    assert ServerFile.load(server).server.port == 9000
    assert Job.load(server / "job.toml") == Job.load(job)
    assert site_names(server) == ["a", "b"]
    assert "fl.example.org" in host_names(load_certificates(server / "server.crt")[0])
    assert public_of((site / "node.key").read_bytes(), site) == check_public(
        (server / "keys" / "a.pub").read_bytes(), site
    )
    assert (site / "ca.crt").read_bytes() == (server / "ca.crt").read_bytes()
    for name in ("README.md", "site.toml"):
        assert (site / name).exists()


def test_private_keys_are_their_owners_alone_and_on_one_side_only(
    job: Path, tmp_path: Path
) -> None:
    init(Request(tmp_path / "d", sites=["a", "b"], job=job))
    private = [
        path
        for path in (tmp_path / "d").rglob("*")
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
    ]
    found = {str(path.relative_to(tmp_path / "d")) for path in private}
    assert found == {"server/ca.key", "server/server.key", "sites/a/node.key", "sites/b/node.key"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    assert len({path.read_bytes() for path in private}) == 4


def test_the_site_file_allows_what_the_job_asks_and_no_more(job: Path, tmp_path: Path) -> None:
    init(Request(tmp_path / "d", sites=["a"], job=job))
    place = open_place(str(tmp_path / "d" / "sites" / "a"))
    asked = Job.load(job)
    place.admit(asked)
    for more in (
        {"lora": {"rank": 7}},
        {"train": {"local_steps": 8}},
        {"run": {"rounds": 4}},
        {"method": {"name": "local"}},
    ):
        with pytest.raises(Exception, match="a refuses"):
            place.admit(asked.replace(**more))


def test_nothing_is_overwritten_without_force(job: Path, tmp_path: Path) -> None:
    init(Request(tmp_path / "d", sites=["a"], job=job))
    before = (tmp_path / "d" / "sites" / "a" / "node.key").read_bytes()
    with pytest.raises(DeployError, match="--force"):
        init(Request(tmp_path / "d", sites=["a"], job=job))
    assert (tmp_path / "d" / "sites" / "a" / "node.key").read_bytes() == before
    init(Request(tmp_path / "d", sites=["a"], job=job, force=True))
    assert (tmp_path / "d" / "sites" / "a" / "node.key").read_bytes() != before


def test_a_site_makes_its_own_key_and_the_server_takes_its_public_half(
    job: Path, tmp_path: Path
) -> None:
    init(Request(tmp_path / "d", sites=["a"], job=job, keys=False))
    server, site = tmp_path / "d" / "server", tmp_path / "d" / "sites" / "a"
    assert site_names(server) == []
    assert not (site / "node.key").exists()
    public = make_key(site, "a")
    with pytest.raises(DeployError, match="must not leave its site"):
        admit_key(server, "a", site / "node.key")  # the wrong file, by mistake
    admit_key(server, "a", public)
    assert site_names(server) == ["a"]
    with pytest.raises(DeployError, match="cannot name a site"):
        admit_key(server, "../a", public)


def test_a_renewed_certificate_is_good_for_the_same_sites(job: Path, tmp_path: Path) -> None:
    from fedgrove.deploy.check import check_server

    init(Request(tmp_path / "d", "fl.example.org", sites=["a"], job=job))
    server = tmp_path / "d" / "server"
    before = (server / "server.crt").read_bytes()
    renew(server)
    assert (server / "server.crt").read_bytes() != before
    said = {finding.what: finding.ok for finding in check_server(server)}
    assert said["server.crt is signed by ca.crt"]
    assert said["server.crt is for fl.example.org"]
    (server / "ca.key").unlink()
    with pytest.raises(DeployError, match=r"ca\.key is missing"):
        renew(server)


@pytest.mark.parametrize("names", [["a b"], ["../a"], ["a", "A"]])
def test_names_that_cannot_be(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DeployError):
        init(Request(tmp_path / "d", sites=names))
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------ the commands
def test_the_commands(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    assert (
        main(
            [
                "deploy",
                "init",
                str(folder),
                "--server",
                "[::1]:9001",
                "--sites",
                "a,b",
                "--job",
                str(job),
                "--no-keys",
            ]
        )
        == 0
    )
    assert ServerFile.load(folder / "server").server.host == "::1"
    assert open_place(str(folder / "sites" / "a")).file.site.server == "[::1]:9001"
    assert main(["deploy", "key", str(folder / "sites" / "a")]) == 0
    assert main(["deploy", "key", str(folder / "sites" / "a")]) == 2
    assert "--force" in capsys.readouterr().err
    assert (
        main(
            [
                "deploy",
                "admit",
                str(folder / "server"),
                "a",
                str(folder / "sites" / "a" / "node.pub"),
            ]
        )
        == 0
    )
    assert site_names(folder / "server") == ["a"]
    assert main(["deploy", "renew", str(folder / "server")]) == 0
    assert main(["deploy", "init", str(tmp_path / "e"), "--server", "host:port"]) == 2
    assert "host:port" in capsys.readouterr().err
    assert main(["deploy", "digest", str(job)]) == 0
    assert len(capsys.readouterr().out.strip()) == 64

"""``fedgrove deploy server``: the SuperLink on this machine, the gate in front of it, the sites'
keys, one run.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.deploy import launch
from fedgrove.deploy.certificates import (
    DeployError,
    check_public,
    fingerprint,
    new_authority,
    new_server,
    write_private,
)
from fedgrove.deploy.layout import CONNECTION, ServerFile
from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Plain
from fedgrove.job.toml import value_text
from fedgrove.watch.beside import told

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

    from fedgrove.job import Job

_PATIENCE = 90.0  # seconds for the SuperLink to answer; it takes about 6
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOTICE = re.compile(r"INFO\s*:|Successfully installed fedgrove to ")
Say = Callable[[str], None]

APP = """[project]
name = "fedgrove"
version = "{version}"
description = "Any Fedgrove job; all code is that of the installed fedgrove."
dependencies = []

[tool.flwr.app]
publisher = "fedgrove"

[tool.flwr.app.components]
serverapp = "fedgrove.deploy.app:server"
clientapp = "fedgrove.deploy.app:client"

[tool.flwr.app.config]
job = ""
out = ""
resume = false
nodes = ""
"""


@dataclass
class Server:
    """A server's folder at work: SuperLink, gate and keys, for as long as ``open`` lasts."""

    folder: Path
    file: ServerFile
    say: Say = print
    nodes: dict[str, int] = field(default_factory=dict)  # site -> Flower's number of its node
    superlink: subprocess.Popen[bytes] | None = None  # while open

    @contextmanager
    def open(self) -> Iterator[ControlHttpClient]:
        """Everything up; the gate comes last, so that a site that knocks finds its key known."""
        from fedgrove.deploy.gate import Gate, OpenGate

        server, port = self.file.server, launch.free_port()
        inside = _inside(self.folder / "internal")
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True, mode=0o700)
        (home / "config.toml").write_text(_connection(port, inside), encoding="utf-8")
        with ExitStack() as stack:
            log = stack.enter_context((self.folder / "superlink.log").open("ab"))
            superlink = launch.start(_superlink(inside, port), home=home, log=log, cwd=self.folder)
            stack.callback(launch.stop, superlink)
            self.superlink = superlink
            control = stack.enter_context(_control(f"127.0.0.1:{port}", inside / "ca.crt"))
            self._wait(control, superlink)
            self._register(control)
            trust = ssl.create_default_context(cafile=str(inside / "ca.crt"))
            limit = int(server.max_request_mb * 1_000_000)
            gate = Gate(f"https://127.0.0.1:{port}", trust, limit, sites_by_key(self.folder))
            opened = OpenGate(
                gate,
                server.listen,
                server.port,
                self.folder / "server.crt",
                self.folder / "server.key",
            )
            stack.callback(opened.close)
            self.say(f"Listening on {server.listen}:{server.port} for {_listed(list(self.nodes))}.")
            yield control

    def run(self, control: ControlHttpClient, job: Path, out: Path, *, resume: bool) -> str:
        """One run, its log line by line; the answer is how it ended: "completed", "failed" or
        "stopped".
        """
        import httpx
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
        from flwr.supercore.fab import Fab

        content, digest = bundle()
        nodes = ",".join(f"{number}={name}" for name, number in self.nodes.items())
        settings: Plain = {
            "job": str(job),
            "out": str(out),
            "resume": resume,
            "nodes": nodes,
        }
        fab, config = fab_to_proto(Fab(digest, content, {})), user_config_to_proto(settings)
        started = control.StartRun(StartRunRequest(fab=fab, override_config=config, federation=""))
        if not started.HasField("run_id"):
            raise DeployError(
                f"The SuperLink did not start the run; its log is {self.folder / 'superlink.log'}."
            )
        try:
            return self._follow(control, started.run_id)
        except KeyboardInterrupt:
            with suppress(httpx.HTTPError):
                control.StopRun(StopRunRequest(run_id=started.run_id))
            raise

    def _follow(self, control: ControlHttpClient, run: int) -> str:
        import httpx
        from flwr.proto.control_pb2 import ListRunsRequest, StreamLogsRequest

        after = 0.0
        while True:
            try:
                for part in control.StreamLogs(
                    StreamLogsRequest(run_id=run, after_timestamp=after)
                ):
                    for line in plain_lines(part.log_output):
                        self.say(line)
                    after = max(after, part.latest_timestamp)
            except httpx.HTTPError:
                pass  # a long silence ends the stream; the run goes on
            try:
                status = control.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
            except (httpx.HTTPError, KeyError) as error:
                if self.superlink is not None and self.superlink.poll() is None:
                    time.sleep(0.5)
                    continue
                raise DeployError(
                    f"The SuperLink ended in mid-run (its log is {self.folder / 'superlink.log'}); "
                    f"go on with --resume."
                ) from error
            if status.status == "finished":
                return str(status.sub_status)
            time.sleep(0.5)

    def _wait(self, control: ControlHttpClient, superlink: subprocess.Popen[bytes]) -> None:
        import httpx
        from flwr.proto.control_pb2 import ListRunsRequest

        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and superlink.poll() is None:
            try:
                control.ListRuns(ListRunsRequest())
                return
            except httpx.HTTPError:
                time.sleep(0.3)
        raise DeployError(
            f"The SuperLink did not start; its log is {self.folder / 'superlink.log'}."
        )

    def _register(self, control: ControlHttpClient) -> None:
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        for path, public in known_keys(self.folder).items():
            key: Any = load_ssh_public_key(public)
            request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=path.stem)
            self.nodes[path.stem] = int(control.RegisterNode(request).node_id)


def plain_lines(text: str) -> Iterator[str]:
    """A run's lines as we print them: without terminal colours and without Flower's own notices."""
    for line in _COLOUR.sub("", text).splitlines():
        if line.strip() and not _NOTICE.match(line):
            yield line.rstrip()


def serve(folder: Path, *, resume: bool = False, page: int | None = None, say: Say = print) -> Path:
    """Run the server's job to its end; the run's directory. Raises ``FedgroveError``; Ctrl-C stops
    it cleanly. ``page``: the port of a live page meanwhile.
    """
    launch.need_flower()
    folder = folder.resolve()
    file = ServerFile.load(folder)
    job_path = (folder / Path(file.server.job).expanduser()).resolve()
    job = checked_job(job_path)
    known_keys(folder)
    out = (folder / job.directory()).resolve()
    if not resume and out.exists() and any(out.iterdir()):
        raise DeployError(
            f"{out} holds a run already; continue it with --resume, or change run.out in "
            f"{job_path}."
        )
    server = Server(folder, file, say)
    with told(out, page, say), server.open() as control:
        ended = server.run(control, job_path, out, resume=resume)
    if ended != "completed":
        raise DeployError(
            f"The run ended as {ended!r}; the lines above and {folder / 'superlink.log'} say why."
        )
    return out


def known_keys(folder: Path) -> dict[Path, bytes]:
    """The sites' public keys by file, each a different one and at least one. Raises
    ``DeployError``.
    """
    found: dict[Path, bytes] = {}
    for path in sorted((folder / "keys").glob("*.pub")):
        public = check_public(path.read_bytes(), path)
        for other, key in found.items():
            if key == public:
                raise DeployError(f"{other} and {path} hold the same key; each site needs its own.")
        found[path] = public
    if not found:
        raise DeployError(
            f"{folder / 'keys'} holds no site's key; take one with `fedgrove deploy admit`."
        )
    return found


def sites_by_key(folder: Path) -> dict[str, str]:
    """The admitted sites' names, by the fingerprints of their keys."""
    return {fingerprint(public): path.stem for path, public in known_keys(folder).items()}


def checked_job(path: Path) -> Job:
    """A job that can run without any data at the server. Raises ``FedgroveError``."""
    from fedgrove.engines.flower.deployable import deployable
    from fedgrove.job import Job

    job = Job.load(path)
    try:
        deployable(job)
    except JobError as error:
        raise DeployError(f"{path}: {error}") from error
    return job


def bundle() -> tuple[bytes, str]:
    """(the Flower app, its SHA-256): one file without code, which names the apps of the installed
    fedgrove.
    """
    import hashlib

    from flwr.cli.build import build_fab_from_files

    import fedgrove

    content, _ = build_fab_from_files(
        {"pyproject.toml": APP.format(version=fedgrove.__version__).encode()}
    )
    return content, hashlib.sha256(content).hexdigest()


def _superlink(inside: Path, port: int) -> list[str]:
    return [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--ssl-ca-certfile", str(inside / "ca.crt"), "--ssl-certfile", str(inside / "server.crt"),
        "--ssl-keyfile", str(inside / "server.key"),
    ]  # fmt: skip


def _connection(port: int, inside: Path) -> str:
    """Flower's config.toml, so that `flwr log` and its like work with FLWR_HOME set to that
    folder.
    """
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = '
        f'"127.0.0.1:{port}"\n'
        f"root-certificates = {value_text(str(inside / 'ca.crt'))}\n"
    )


def _inside(folder: Path) -> Path:
    """Fresh certificates for the way between the gate and the SuperLink, which does not leave this
    machine.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    authority = new_authority("Fedgrove, within the server")
    certificate = new_server(authority, ["localhost"])
    (folder / "ca.crt").write_bytes(authority.certificate_pem())
    (folder / "server.crt").write_bytes(certificate.certificate_pem())
    write_private(folder / "server.key", certificate.key_pem())
    return folder


@contextmanager
def _control(address: str, anchor: Path) -> Iterator[ControlHttpClient]:
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=anchor.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield client
    finally:
        client.close()


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"

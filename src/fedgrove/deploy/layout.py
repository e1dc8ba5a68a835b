"""``fedgrove deploy init``: one folder for the server and one for each site, with a README of what
to send to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from fedgrove.deploy.certificates import (
    PORT,
    DeployError,
    check_public,
    load_issued,
    new_authority,
    new_node_key,
    new_server,
    write_private,
)
from fedgrove.deploy.services import write_services
from fedgrove.deploy.site import FILE as SITE_FILE
from fedgrove.deploy.site import model_of
from fedgrove.ground.marks import keys_with
from fedgrove.ground.options import COLUMN
from fedgrove.job.sections import Section, Text
from fedgrove.job.toml import parse_toml, value_text

SERVER_FILE = "server.toml"
CONNECTION = "fedgrove"  # the name in Flower's config.toml


class ServerPart(Section):
    """Where the server listens and what it runs."""

    host: Text = Field(
        description="Name or address by which sites reach it; the certificate is for it."
    )
    port: int = Field(PORT, ge=1, le=65535, description="The one port that sites need.")
    listen: Text = Field(
        "0.0.0.0", description="Address of this machine to listen on; 0.0.0.0 is all of them."
    )
    job: Text = Field("job.toml", description="The job, from this folder.")
    max_request_mb: float = Field(
        32, gt=0, description="Largest request that a site can make (larger ones are cut)."
    )


class ServerFile(Section):
    """``server.toml``."""

    server: ServerPart

    @classmethod
    def load(cls, folder: Path) -> ServerFile:
        """Raises ``DeployError`` or ``JobError`` with the key, the value and what would be
        right.
        """
        from fedgrove.job.sentences import job_error

        path = folder / SERVER_FILE
        try:
            values = parse_toml(path.read_text(encoding="utf-8-sig"), str(path))
        except FileNotFoundError:
            raise DeployError(
                f"There is no {path}; `fedgrove deploy init` writes one in DIR/server."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DeployError(f"{path} cannot be read: {error}.") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise job_error(error, cls, values, str(path), what="the server file") from None


@dataclass(frozen=True)
class Request:
    """What ``init`` is asked for."""

    folder: Path
    host: str = "localhost"
    port: int = PORT
    sites: Sequence[str] = ()
    job: Path | None = None
    keys: bool = True  # make the sites' keys here; False: each site makes its own
    force: bool = False


def init(plan: Request) -> list[str]:
    """Write everything; the sentences say what was written. Raises ``FedgroveError`` before
    anything is written.
    """
    from fedgrove.job import Job

    server, sites = plan.folder / "server", [plan.folder / "sites" / name for name in plan.sites]
    if plan.job:
        job = Job.load(plan.job)
    else:
        job = None
    _check(plan, [server, *sites])
    for folder in (server, *sites):
        (folder / "keys").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    authority = new_authority(f"Fedgrove authority of {plan.host}")
    certificate = new_server(authority, [plan.host])
    anchor = authority.certificate_pem()
    write_private(server / "ca.key", authority.key_pem(), force=plan.force)
    write_private(server / "server.key", certificate.key_pem(), force=plan.force)
    (server / "ca.crt").write_bytes(anchor)
    (server / "server.crt").write_bytes(certificate.certificate_pem())
    (server / SERVER_FILE).write_text(server_text(plan), encoding="utf-8")
    if job is not None:
        (server / "job.toml").write_text(job.to_toml(), encoding="utf-8")
    (server / "README.md").write_text(_server_readme(plan), encoding="utf-8")
    write_services(server, "server", plan.port)
    for site in sites:
        (site / "ca.crt").write_bytes(anchor)
        (site / SITE_FILE).write_text(site_text(plan, site.name, job), encoding="utf-8")
        (site / "README.md").write_text(_site_readme(plan, site.name), encoding="utf-8")
        write_services(site, "site", plan.port)
        if plan.keys:
            public = make_key(site, site.name, force=plan.force)
            for folder in (server, *sites):
                (folder / "keys" / f"{site.name}.pub").write_bytes(public.read_bytes())
    return _said(plan, server, sites)


def make_key(site: Path, name: str, *, force: bool = False) -> Path:
    """A new node key in a site's folder: node.key stays there, node.pub (returned) goes to the
    server.
    """
    private, public = new_node_key(name)
    write_private(site / "node.key", private, force=force)
    (site / "node.pub").write_bytes(public)
    return site / "node.pub"


def admit_key(side: Path, name: str, public: Path) -> Path:
    """Put a site's public key among those that the server, or another site, knows. Raises
    ``DeployError`` where it is none.
    """
    from fedgrove.ground.names import PLAIN

    if not PLAIN.fullmatch(name):
        raise DeployError(
            f"{name!r} cannot name a site: use at most 64 letters, digits, '.', '_' and '-'."
        )
    try:
        data = public.read_bytes()
    except OSError as error:
        raise DeployError(f"{public} cannot be read: {error.strerror or error}.") from None
    check_public(data, public)
    kept = side / "keys" / f"{name}.pub"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return kept


def site_names(server: Path) -> list[str]:
    """The sites whose keys the server knows, in name order."""
    return sorted(path.stem for path in (server / "keys").glob("*.pub"))


def _check(plan: Request, folders: Sequence[Path]) -> None:
    from fedgrove.ground.names import PLAIN

    for name in plan.sites:
        if not PLAIN.fullmatch(name):
            raise DeployError(
                f"{name!r} cannot name a site: use at most 64 letters, digits, '.', '_' and '-'."
            )
    if len({name.casefold() for name in plan.sites}) < len(plan.sites):
        raise DeployError("two sites have the same name; name each once.")
    for folder in folders:
        if not plan.force and folder.exists() and any(folder.iterdir()):
            raise DeployError(
                f"{folder} is not empty; --force replaces what is in it, keys included."
            )


def server_text(plan: Request) -> str:
    return f"""# The server's side. Every key: docs/deploy.md.
[server]
host = {value_text(plan.host)}     # the certificate is for this name
port = {plan.port}
listen = "0.0.0.0"
job = "job.toml"
max_request_mb = 32
"""


def site_text(plan: Request, name: str, job: object | None) -> str:
    """A site file to be gone through by the site: it allows what the job asks, and nothing more."""
    from fedgrove.federation.tasks import task_class
    from fedgrove.job import Job

    if isinstance(job, Job):
        chosen = job
    else:
        chosen = Job.default()
    resolved = chosen.resolved()
    rank = resolved.lora.rank or 1
    targets = list(chosen.lora.named_targets)
    steps = chosen.train.local_steps or 200
    read = task_class(chosen.data).columns(chosen.data)
    named = {
        key: getattr(chosen.data, key, None)
        for key in keys_with(type(chosen.data).model_fields, COLUMN)
    }
    pairs = [f"{key} = {value_text(value)}" for key, value in named.items() if value in read]
    if pairs:
        columns = f"{{ {', '.join(pairs)} }}"
    else:
        columns = "{}"
    head = chosen.federation.head == "shared" or chosen.federation.newcomer_head is True
    if ":" in plan.host:
        host = f"[{plan.host}]"
    else:
        host = plan.host
    return f"""# The word of the site {name}: its data, its budget, and what it allows. Every key: docs/deploy.md.
[site]
name = {value_text(name)}
server = {value_text(f"{host}:{plan.port}")}

[data]
path = "data.csv"   # jsonl, csv or parquet; from this folder; it never leaves
columns = {columns}   # by the job's key; no other column is read

[budget]
rank = {rank}
# threads = 4
# device = "cpu"

[allow]
models = {{ {value_text(model_of(chosen))} = {value_text(chosen.model.name)} }}   # name in the job = where it is here
methods = {value_text([chosen.method.name])}
targets = {value_text(targets)}
max_rank = {rank}
max_rounds = {chosen.run.rounds}
max_local_steps = {steps}
max_message_mb = 64
share_counts = false   # how many examples each label has
share_head = {value_text(head)}   # the classifier's head
fedgrove = "same"
jobs = []   # digests from `fedgrove deploy digest JOB.toml`, to allow these jobs alone
"""


def _server_readme(plan: Request) -> str:
    mine = (
        "\n".join(f"- `{name}`: its folder `sites/{name}`" for name in plan.sites) or "- (none yet)"
    )
    if plan.keys:
        keys = (
            "`init` made the sites' keys here. Send each site its folder over a channel that you trust "
            "and delete it here, "
            "or better: let each site replace the key with its own (`fedgrove deploy key DIR --force`) "
            "and send you "
            "`node.pub`, which you take with `fedgrove deploy admit DIR NAME node.pub`. The other sites do "
            "the same with it where the job masks updates."
        )
    else:
        keys = (
            "Each site makes its own key (`fedgrove deploy key DIR`) and sends you `node.pub`, "
            "which you take with "
            "`fedgrove deploy admit DIR NAME node.pub`."
        )
    return f"""# The server's side

| file | what | who may have it |
|---|---|---|
| `server.toml`, `job.toml` | where to listen, what to run | you |
| `server.key`, `server.crt` | the server's identity | `server.key`: you alone |
| `ca.key` | signs server certificates; needed only to renew one: keep it offline | you alone |
| `ca.crt` | by it sites know the server | every site |
| `keys/NAME.pub` | the sites that may take part | you |
| `service/` | a systemd unit, and a container with its compose file, to keep it running | you |

To each site goes its folder:

{mine}

{keys}

Your own certificate: put it (with its chain) into `server.crt`, its key into `server.key`, and give the sites your
authority's certificate as `ca.crt`. It must be for the name in `server.toml`.

    fedgrove deploy check .          # is everything in order?
    fedgrove deploy server .         # run the job
    fedgrove deploy server . --resume
"""


def _site_readme(plan: Request, name: str) -> str:
    return f"""# The site {name}

| file | what | who may have it |
|---|---|---|
| `site.toml` | your data, your budget, what you allow: go through it line by line | you |
| `node.key` | your identity: who has it can take part as {name} | you alone (a new one: `fedgrove deploy key .`) |
| `node.pub` | its public half | the server's operator, and every other site where updates are masked |
| `keys/NAME.pub` | by these you know the other sites where updates are masked | anyone |
| `ca.crt` | by it you know the server | anyone |
| `audit.jsonl` | every message: when, how large, its SHA-256, names and shapes of its tensors | you |
| `runs/` | your private part of each run, and your own adapter at its end | you |
| `service/` | a systemd unit, and a container with its compose file, to keep it running | you |

    fedgrove deploy check .          # is everything in order?
    fedgrove deploy site .           # take part, until Ctrl-C
    fedgrove deploy log .            # what came and what left
"""


def _said(plan: Request, server: Path, sites: Sequence[Path]) -> list[str]:
    said = [f"Wrote {server}: stays with you; its README says what goes to whom."]
    for site in sites:
        if plan.keys:
            key = "with a key made here"
        else:
            key = "without a key; the site makes its own"
        said.append(f"Wrote {site}: goes to {site.name} ({key}). It names its data in site.toml.")
    if plan.job is None:
        said.append(f"Put the job into {server / 'job.toml'}, with data.labels set.")
    return said


def renew(server: Path) -> str:
    """A new server certificate, signed by the authority of the old one. Raises ``DeployError``."""
    file = ServerFile.load(server)
    if not (server / "ca.key").exists():
        raise DeployError(
            f"{server / 'ca.key'} is missing; the authority's key is needed to renew a certificate."
        )
    authority = load_issued(server / "ca.crt", server / "ca.key")
    certificate = new_server(authority, [file.server.host])
    write_private(server / "server.key", certificate.key_pem(), force=True)
    (server / "server.crt").write_bytes(certificate.certificate_pem())
    ends = certificate.certificate.not_valid_after_utc
    return f"Wrote {server / 'server.crt'} and server.key, valid until {ends:%Y-%m-%d}; restart the server."

"""``fedgrove deploy …``: the same job between organisations. Parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Run a job between organisations: a server that holds no data, and sites that keep theirs "
    "(docs/deploy.md).",
)

Server = Annotated[
    Path, typer.Argument(metavar="DIR", help="The server's folder.", show_default=False)
]
Site = Annotated[Path, typer.Argument(metavar="DIR", help="A site's folder.", show_default=False)]
Either = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of one side.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there, keys included.")]


def _page(of: str) -> Any:
    """The option of a live page."""
    return typer.Option(
        metavar="PORT",
        help=f"Serve a live page {of}, to this machine alone (0: any free port).",
        min=0,
        max=65535,
        show_default=False,
    )


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)
    ],
    server: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]", help="Name or address by which sites reach the server."
        ),
    ] = "localhost",
    sites: Annotated[str, typer.Option(metavar="A,B,...", help="Names of the sites.")] = "",
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="JOB.toml", help="The job, which sites will allow.", show_default=False
        ),
    ] = None,
    keys: Annotated[
        bool, typer.Option(help="Make the sites' keys here; without, each site makes its own.")
    ] = True,
    force: Force = False,
) -> None:
    """Write what each side needs: certificates, keys, a server file, site files, and READMEs."""
    from fedgrove.deploy.certificates import PORT, address
    from fedgrove.deploy.layout import Request
    from fedgrove.deploy.layout import init as write

    bare = server.startswith("[") and server.endswith("]")
    host, port = (server.strip("[]"), PORT) if bare or ":" not in server else address(server)
    names = tuple(name.strip() for name in sites.split(",") if name.strip())
    for sentence in write(Request(folder, host, port, names, job, keys, force)):
        print(sentence)


@app.command()
def key(folder: Site, force: Force = False) -> None:
    """Make a site's key, at the site: node.key stays, node.pub goes to the server's operator."""
    from fedgrove.deploy.layout import make_key
    from fedgrove.deploy.site import open_place

    public = make_key(folder, open_place(str(folder)).name, force=force)
    print(
        f"Send {public} to the server's operator, who takes it with `fedgrove deploy admit`; "
        f"node.key stays here."
    )


@app.command()
def admit(
    folder: Either,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The site's name.", show_default=False)
    ],
    public: Annotated[
        Path, typer.Argument(metavar="node.pub", help="Its public key.", show_default=False)
    ],
) -> None:
    """At the server: let a site take part (a running server takes it at its next start). At a site: know
    another, with which it masks its updates.
    """
    from fedgrove.deploy.layout import admit_key

    print(f"Kept {admit_key(folder, name, public)}.")


@app.command()
def renew(folder: Server) -> None:
    """Give the server a new certificate from the same authority; sites keep their ca.crt."""
    from fedgrove.deploy.layout import renew as write

    print(write(folder))


@app.command()
def server(
    folder: Server,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
    page: Annotated[int | None, _page("meanwhile")] = None,
) -> None:
    """Start the server and run its job. Ctrl-C stops it cleanly; --resume goes on."""
    from fedgrove.deploy.host import serve

    try:
        out = serve(folder, resume=resume, page=page, say=_say)
    except KeyboardInterrupt:
        print(f"Go on with `fedgrove deploy server {folder} --resume`.", file=sys.stderr)
        raise
    print(f"The run is in {out}; each site's adapter is at the site.")


@app.command()
def site(
    folder: Site,
    page: Annotated[int | None, _page("of what left this site")] = None,
) -> None:
    """Take part with this site's data, until Ctrl-C."""
    from fedgrove.deploy.attend import attend
    from fedgrove.deploy.site import open_place
    from fedgrove.watch.beside import told

    open_place(str(folder))  # says what is no site before a page is there
    with told(folder.resolve(), page, _say, "fedgrove.deploy.leaving:Leaving"):
        attend(folder, say=_say)


@app.command()
def check(
    folder: Either,
    side: Annotated[
        str | None,
        typer.Option(
            metavar="server|site", help="Which side it is; the folder tells.", show_default=False
        ),
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="JOB.toml",
            help="Hold a site's file and data against a job.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say in plain words what is wrong, with the remedy. Exit code 1 where something is."""
    from fedgrove.deploy.certificates import DeployError
    from fedgrove.deploy.check import check as look

    if side not in (None, "server", "site"):
        raise DeployError(f"--side {side!r} is neither server nor site.")
    findings = look(folder, side, job)
    for finding in findings:
        print(finding)
    problems = sum(not finding.ok for finding in findings)
    if problems:
        print(f"{problems} problem{'s' * (problems != 1)}.")
        raise typer.Exit(1)
    print("All is well.")


@app.command()
def digest(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="A job.", show_default=False)],
) -> None:
    """The digest of a job, for a site's allow.jobs."""
    from fedgrove.deploy.site import job_digest
    from fedgrove.job import Job

    print(job_digest(Job.load(job)))


@app.command()
def log(
    folder: Site,
    last: Annotated[
        int, typer.Option(metavar="N", min=0, help="Only the last N messages; 0: all.")
    ] = 0,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Names and shapes of every tensor too.")
    ] = False,
) -> None:
    """Show a site's log: what came and what left, with sizes and hashes, and whether the log was
    changed.
    """
    from fedgrove.deploy.audit_table import show

    if not show(folder, last=last, tensors=tensors):
        raise typer.Exit(1)


def _say(sentence: str) -> None:
    from datetime import datetime

    print(f"{datetime.now():%H:%M:%S}  {sentence}", flush=True)

"""What keeps a side running without anybody at the terminal: a systemd unit, and a container.

They are files to be read and changed by who installs them: paths and user are the ones of a usual
Linux machine. Both stop a side as Ctrl-C does, and both start it again where it left off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Side = Literal["server", "site"]

FOLDER = "service"  # in the folder of each side
PROGRAM = "/opt/fedgrove/bin/fedgrove"  # the unit's; a virtual environment's console script
PLACE = "/srv/fedgrove"  # where the unit looks for the sides' folders
_STOP_SECONDS = 300  # for the client or the round at hand
#: that a stop was asked for is no failure: 130 after Ctrl-C
_STOPPED = 130


def write_services(folder: Path, side: Side, port: int) -> None:
    """``folder/service`` of a side's folder; ``port`` is the server's."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    unit = unit_text(side, folder.name)
    (place / f"fedgrove-{side}.service").write_text(unit, encoding="utf-8")
    (place / "Containerfile").write_text(CONTAINER, encoding="utf-8")
    (place / "compose.yaml").write_text(compose_text(side, port), encoding="utf-8")


def command(side: Side) -> list[str]:
    """After ``fedgrove deploy``, from the side's folder. A server goes on with a run that is there."""
    if side == "server":
        return ["server", ".", "--resume"]
    return ["site", "."]


def unit_text(side: Side, name: str) -> str:
    """The systemd unit of the side whose folder is called so."""
    place = f"{PLACE}/{name}"
    return f"""# Keeps this {side} running. Change User, the two paths and the program to yours, then:
#
#     sudo cp fedgrove-{side}.service /etc/systemd/system/
#     sudo systemctl enable --now fedgrove-{side}
#     journalctl -fu fedgrove-{side}
[Unit]
Description=Fedgrove {side} in {place}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User=fedgrove
WorkingDirectory={place}
ExecStart={PROGRAM} deploy {" ".join(command(side))}
# fetched models
CacheDirectory=fedgrove
Environment=FEDGROVE_CACHE=%C/fedgrove HF_HOME=%C/fedgrove/hub
# as Ctrl-C: the work at hand ends cleanly
KillSignal=SIGINT
KillMode=mixed
TimeoutStopSec={_STOP_SECONDS}
SuccessExitStatus={_STOPPED}
Restart=on-failure
RestartSec=30
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
ReadWritePaths={place}

[Install]
WantedBy=multi-user.target
"""


CONTAINER = """# An image with Fedgrove and nothing of yours: folder, keys and data are mounted.
# For a GPU take a torch that has it.
FROM python:3.11-slim
RUN pip install --no-cache-dir torch==2.13.0 \\
 && pip install --no-cache-dir 'fedgrove[flower,privacy]'
RUN useradd --create-home --uid 1000 fedgrove && mkdir /cache && chown fedgrove /cache
USER fedgrove
ENV FEDGROVE_CACHE=/cache HF_HOME=/cache/hub PYTHONUNBUFFERED=1
WORKDIR /side
STOPSIGNAL SIGINT
ENTRYPOINT ["fedgrove", "deploy"]
"""


def compose_text(side: Side, port: int) -> str:
    """The compose file of a side; a server's port, which is published."""
    words = ", ".join(f'"{word}"' for word in command(side))
    published = ""
    if side == "server":
        published = f'    ports: ["{port}:{port}"]\n'
    return f"""# From this folder: compose up --detach; compose logs --follow; compose stop.
# The folder above is mounted, and must be the user's who runs it (FEDGROVE_USER, such as
# 1000:1000). Data that lie elsewhere need a line under volumes.
services:
  {side}:
    build:
      context: .
      dockerfile: Containerfile
    command: [{words}]
    user: "${{FEDGROVE_USER:-1000:1000}}"
    volumes:
      - ..:/side
      - cache:/cache
{published}    restart: on-failure
    stop_signal: SIGINT
    stop_grace_period: {_STOP_SECONDS}s
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
volumes:
  cache: {{}}
"""

"""A site of a deployment: its data, its budget, what it allows. ``site.toml`` is its word; the
server's is not.

``SitePlace`` is what the client half asks of the place where it runs (``place.py``): it refuses
jobs that the site file does not allow, reads the site's own data, validates what comes and logs
what comes and goes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError, field_validator

from fedgrove.deploy.audit import LOG, AuditLog, Direction
from fedgrove.deploy.certificates import DeployError, address, private_key, public_keys
from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.files import write_json
from fedgrove.ground.marks import keys_with
from fedgrove.ground.options import COLUMN, Text, Texts
from fedgrove.ground.plain import Given, Plain
from fedgrove.job.data import DataSection
from fedgrove.job.sections import Section
from fedgrove.job.toml import parse_toml
from fedgrove.secure.identity import NodeKeys
from fedgrove.wire import validate

if TYPE_CHECKING:
    from fedgrove.engines.flower.wire import Note
    from fedgrove.federation.federation import Client
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.secure.identity import Identity

FILE = "site.toml"
MEGABYTE = 1_000_000
_logger = getLogger(__name__)
SIZES = (
    "name",
    "group",
    "held_out",
    "train",
    "test",
    "validation",
)  # what a server must know of a client
RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SiteRefusal(FedgroveError):
    """The site does not allow what the server asked for. The sentence reaches the server."""


class SitePart(Section):
    """Who it is and whom it talks to."""

    name: Text = Field(description="The site's name in the federation.")
    server: Text = Field(description="host:port of the server.")

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        from fedgrove.ground.names import PLAIN

        if not PLAIN.fullmatch(name):
            raise ValueError(
                "use at most 64 letters, digits, '.', '_' and '-', with a letter or digit first."
            )
        return name

    @field_validator("server")
    @classmethod
    def _address(cls, server: str) -> str:
        try:
            address(server)
        except DeployError as error:
            raise ValueError(str(error)) from None
        return server


class DataPart(Section):
    """The site's own examples; they are read here and never leave."""

    path: Text = Field(
        description="The table (jsonl, json, csv, tsv, parquet), or a folder with a file train and "
        "a file test; from this folder."
    )
    columns: dict[str, str] = Field(
        {},
        description="The columns that may be read, by the job's key of [data], such as "
        '{ text = "note", label = "code" }. Empty: those that the job names.',
    )

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        known = keys_with(DataSection.offered(), COLUMN)
        for key in columns:
            if key not in known:
                raise ValueError(
                    f"{key} is no column of a job; the columns are {', '.join(known)}."
                )
        return columns


class BudgetPart(Section):
    """What the site can give."""

    rank: int = Field(8, ge=1, description="The largest rank that it trains.")
    threads: int | None = Field(None, ge=1, description="CPU threads. Not set: as the job says.")
    device: Text | None = Field(
        None, description='"cpu", "cuda" or "mps". Not set: as the job says.'
    )


class AllowPart(Section):
    """What a job may ask of the site. Everything else is refused before any work."""

    models: dict[str, str] = Field(
        min_length=1,
        description="Base models by the name that jobs give (NAME@REVISION where they give one), "
        "each with where it is "
        "here: a folder, or the same name again (embedded, or of the hub), such as { minilm = "
        '"minilm" }.',
    )
    methods: Texts = Field(description='Names of methods, or "*" for any (`fedgrove methods`).')
    targets: Texts = Field(
        ("auto",), description='Values that lora.targets may have; "*" allows any layer.'
    )
    max_rank: int = Field(16, ge=1, description="Largest lora.rank, the global one.")
    max_rounds: int = Field(100, ge=1, description="Largest run.rounds.")
    max_local_steps: int = Field(
        200,
        ge=1,
        description="Most optimiser steps in a round; epochs are counted in the site's own "
        "batches.",
    )
    max_message_mb: float = Field(64, gt=0, description="Largest message, either way.")
    share_counts: bool = Field(
        False,
        description="Whether the server learns how many examples each label has here, and how long "
        "texts are.",
    )
    share_head: bool = Field(False, description="Whether the classifier's head may leave the site.")
    fedgrove: Text = Field(
        "same",
        description='Versions of the server\'s Fedgrove: "same" as here, or a range such as '
        '">=0.1,<0.3".',
    )
    jobs: tuple[Text, ...] = Field(
        (),
        strict=False,
        description="Digests of the only jobs allowed (`fedgrove deploy digest`). Empty: any job.",
    )


class SiteFile(Section):
    """``site.toml``."""

    site: SitePart
    data: DataPart
    budget: BudgetPart = Field(default_factory=BudgetPart)
    allow: AllowPart

    @classmethod
    def load(cls, path: Path) -> SiteFile:
        """Raises ``DeployError`` or ``JobError`` with the key, the value and what would be
        right.
        """
        from fedgrove.job.sentences import job_error

        try:
            content = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DeployError(
                f"There is no {path}; `fedgrove deploy init` writes one, and a site's folder has "
                f"it."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DeployError(f"{path} cannot be read: {error}.") from None
        values = parse_toml(content, str(path))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise job_error(error, cls, values, str(path), what="the site file") from None


class SitePlace:
    """One site at work."""

    def __init__(self, folder: Path, file: SiteFile):
        self.folder, self.file = folder, file
        self.name = file.site.name
        self.audit = AuditLog(folder / LOG)
        self._round: object = None  # of the message that is being answered

    # ------------------------------------------------------------------ what it allows
    def admit(self, job: Job) -> Job:
        """The job as this site runs it: its own model folder, data, threads and device. Raises
        ``SiteRefusal``.
        """
        from fedgrove.federation.tasks import task_class

        allow = self.file.allow
        resolved = job.resolved()
        rank = resolved.lora.rank or 1
        if allow.jobs and job_digest(job) not in allow.jobs:
            self._refuse(f"the job {job_digest(job)[:12]}… is not among the jobs of allow.jobs")
        if model_of(job) not in allow.models:
            self._refuse(
                f"the base model {model_of(job)!r} is not allowed here; allowed are "
                f"{_listed(allow.models)}"
            )
        if job.model.adapter is not None:
            self._refuse(
                f"the job starts from the adapter {job.model.adapter!r} (model.adapter), a path of "
                "the server's; it can start from a model that has the adapter in it"
            )
        if not _allowed(job.method.name, allow.methods):
            self._refuse(
                f"the method {job.method.name!r} is not allowed here; allowed are "
                f"{_listed(allow.methods)}"
            )
        for target in job.lora.named_targets:
            if target not in allow.targets and "*" not in allow.targets:
                self._refuse(f"lora.targets has {target!r}, which is not allowed here; allowed are "
                             f"{_listed(allow.targets)}")  # fmt: skip
        if rank > allow.max_rank:
            self._refuse(f"lora.rank = {rank} is above the largest allowed here, {allow.max_rank}")
        if job.run.rounds > allow.max_rounds:
            self._refuse(
                f"run.rounds = {job.run.rounds} is above the largest allowed here, "
                f"{allow.max_rounds}"
            )
        if (job.train.local_steps or 0) > allow.max_local_steps:
            self._refuse(
                f"train.local_steps = {job.train.local_steps} is above the largest allowed here, "
                f"{allow.max_local_steps}"
            )
        head = job.federation.head
        if not allow.share_head and (
            head == "shared" or (head == "local" and job.federation.newcomer_head is True)
        ):
            self._refuse(
                "the job sends the classifier's head to the server, which is not allowed here "
                "(share_head)"
            )
        missing = task_class(job.data).lacks(job.data)
        if missing is not None:
            key, what = missing
            self._refuse(
                f"the job does not name {what}; set data.{key}, which all sites must agree on"
            )
        own = self._own(job)
        named = set(self.file.data.columns.values())
        read = [*task_class(own.data).columns(own.data), own.data.split]
        for column in read if named else ():
            if column is not None and column not in named:
                self._refuse(
                    f"the job reads the column {column!r}; data.columns names only "
                    f"{_listed(sorted(named))}"
                )
        return own

    def rank(self, job: Job) -> int | None:
        """The site's budget: the largest rank that it trains."""
        return self.file.budget.rank

    def identity(self, run: str) -> Identity:
        """The site's node key, and the other sites' public ones in its own ``keys``: the server's word
        on who they are counts for nothing. Raises ``SiteRefusal`` where it knows nobody.
        """
        private, others = private_key(self.folder / "node.key"), public_keys(self.folder)
        others.pop(self.name, None)
        if not others:
            self._refuse(
                "the job masks updates between sites, and keys/ has no other site's public key; "
                "get each node.pub from its site and keep it with `fedgrove deploy admit`"
            )
        return NodeKeys(private, {**others, self.name: private.public_key()})

    def _own(self, job: Job) -> Job:
        budget = self.file.budget
        train: Plain = {}
        if budget.threads is not None:
            train["threads"] = budget.threads
        if budget.device is not None:
            train["device"] = budget.device
        model = {"name": self.file.allow.models[model_of(job)]}
        read = keys_with(type(job.data).model_fields, COLUMN)
        columns = {key: name for key, name in self.file.data.columns.items() if key in read}
        return job.replace(model=model, data=columns, train=train)

    # ------------------------------------------------------------------ its data
    def data_path(self) -> Path:
        return self.folder / Path(self.file.data.path).expanduser()

    def client(self, job: Job) -> Client:
        """The site's rows, split as ``silos`` of the same names would be. ``job`` as ``admit``
        returned it.
        """
        from fedgrove.federation.federation import Client
        from fedgrove.federation.load import holding_of
        from fedgrove.federation.split import divided

        holding = holding_of(self.data_path(), job)
        parts = divided(self.name, holding, job.data, job.run.seed)
        allow = self.file.allow
        batch = job.train.batch_size * job.train.accumulation
        for key in ("local_epochs", "final_local_epochs"):
            steps = math.ceil(len(parts.train) / batch) * (getattr(job.train, key) or 0)
            if steps > allow.max_local_steps:
                self._refuse(f"train.{key} = {getattr(job.train, key)} takes {steps} steps here, "
                f"above the largest "
                             f"number allowed, {allow.max_local_steps}")  # fmt: skip
        return Client(self.name, parts.train, parts.test, parts.validation, None, held_out=False)

    def tells(self, row: Given) -> Plain:
        """What of a client's description leaves the site: sizes always, what they are made of where
        it is allowed.
        """
        if self.file.allow.share_counts:
            return dict(row)
        return {key: row[key] for key in SIZES if key in row} | {"labels": {}}

    def adapters(self, key: str) -> Path:
        """Where the personal adapter of a run is written, in a folder of the site's name: it stays
        here.
        """
        return self.folder / "runs" / key / "adapters"

    # ------------------------------------------------------------------ every message
    def received(self, note: Note, blob: bytes, method: Method | None) -> None:
        """Log a decoded message and validate it before it touches anything. Raises
        ``SiteRefusal``.
        """
        fault = self._fault(note, blob, method)
        self._round = note.head.get("round")
        self._log(note, blob, "received", f"refused: {fault}" if fault else "")
        if fault:
            self._refuse(f"the message {note.kind!r} was not used, because {fault}")

    def sending(self, note: Note, blob: bytes) -> None:
        """Log what is about to leave. Raises ``SiteRefusal`` where it is larger than the site
        allows.

        The measures that a finished run sends are kept here too, in ``runs/KEY/measures.json``.
        """
        too_large = validate.size_fault(blob, self._limit())
        self._log(
            note,
            blob,
            "sent",
            f"not sent: {too_large}" if too_large else str(note.head.get("sentence", "")),
        )
        if note.kind == "finish" and isinstance(row := note.head.get("row"), Mapping):
            kept = {
                key: value if value is None or math.isfinite(value) else None
                for key, value in row.items()
            }
            write_json(self.folder / "runs" / str(note.head["run"]) / "measures.json", kept)
        if too_large:
            self._refuse(f"its answer to {note.kind!r} was not sent, because {too_large}")

    def _fault(self, note: Note, blob: bytes, method: Method | None) -> str | None:
        if too_large := validate.size_fault(blob, self._limit()):
            return too_large
        run = note.head.get("run")
        if not (isinstance(run, str) and RUN.fullmatch(run)):  # it becomes a folder's name
            return "it does not name its run with letters and digits"
        if note.kind in ("hello", "open") and (
            fault := self._version_fault(str(note.head.get("version", "")))
        ):
            return fault
        return validate.offer_fault(note.body, method=method)

    def _version_fault(self, version: str) -> str | None:
        import fedgrove

        wanted = self.file.allow.fedgrove
        if wanted == "same":
            if version != fedgrove.__version__:
                return f"the server runs Fedgrove {version or '(unknown)'} and this site {fedgrove.__version__}"
            return None
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            if version and SpecifierSet(wanted, prereleases=True).contains(version):
                return None
        except (InvalidSpecifier, ValueError):
            return f"allow.fedgrove = {wanted!r} in its site file is no range of versions"
        return f"the server runs Fedgrove {version or 'of an unknown version'}, and this site allows {wanted}"

    def _limit(self) -> int:
        return int(self.file.allow.max_message_mb * MEGABYTE)

    def _log(self, note: Note, blob: bytes, direction: Direction, remark: str) -> None:
        number = note.head.get("round", self._round)
        if number:
            where = f" of round {number}"
        else:
            where = ""
        _logger.info(
            "%s %s%s, %s bytes%s",
            direction,
            note.kind,
            where,
            f"{len(blob):,}",
            remark and f": {remark}",
        )
        self.audit.write(
            run=str(note.head.get("run", ""))[:64],
            round=number if isinstance(number, int) else 0,
            direction=direction,
            kind=note.kind,
            blob=blob,
            tree=note.body,
            note=remark,
        )

    def _refuse(self, why: str) -> None:
        raise SiteRefusal(f"{self.name} refuses: {why}.")


def open_place(path: str) -> SitePlace:
    """The site whose folder is ``path``. Raises ``FedgroveError``."""
    folder = Path(path).expanduser()
    return SitePlace(folder, SiteFile.load(folder / FILE))


def model_of(job: Job) -> str:
    """The base model as a site's ``allow.models`` names it. Another revision of a hub's model is
    another model.
    """
    if job.model.revision is None:
        return job.model.name
    return f"{job.model.name}@{job.model.revision}"


def job_digest(job: Job) -> str:
    """SHA-256 of what a job asks, the same before and after the server's automatic choices were
    written into it.
    """
    from fedgrove.federation.tasks import task_name

    asked = job.resolved().opened("machine")
    task = {"task": task_name(job.data)}
    return asked.replace(data=task, federation={"newcomer_head": "auto"}).digest()


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)

"""A client at work: a message in, a message out. No Flower here, so that a test or an agent can
drive it directly.

The base model, the method and the encoded data are kept for the life of the process; the private
store is on disk. An error never leaves as an exception: the server gets a sentence. From a site it
gets no more than that and the place in the code, because the text of an unforeseen exception may
quote data. What is wrong with a site's data is told to the site alone.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.engines.flower.confidant import Confidant
from fedgrove.engines.flower.spending import Spending
from fedgrove.engines.flower.stores import Stores
from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.ground.errors import AdapterError, DataError, FedgroveError, RunError
from fedgrove.ground.files import write_text
from fedgrove.methods.contract import ClientInfo

if TYPE_CHECKING:
    from fedgrove.engines.flower.place import Machine
    from fedgrove.federation.federation import Client
    from fedgrove.federation.tasks.base import Example
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.runs.parts import Parts
    from fedgrove.training.client import ClientHalf

Data = Mapping[str, "list[Example]"]  # split -> encoded examples
HalfOf = Callable[["Parts"], "ClientHalf"]  # what runs the client's half of a job

_OPENED = "open.json"
_DATA = "data.sha256"  # of the site's rows, for the site alone


@dataclass(frozen=True, eq=False)
class Workshop:
    """What a process keeps for one run: everything that does not depend on the client."""

    parts: Parts
    half: ClientHalf
    data: dict[str, Data]  # by client

    @property
    def job(self) -> Job:
        return self.parts.job


class Workshops:
    """What a process keeps between messages: one workshop, because it works for one run at a
    time.
    """

    def __init__(self, half: HalfOf | None = None) -> None:
        """``half``: what trains; default the job's own kernels."""
        self._half = half
        self._key: tuple[str, str] | None = None
        self._workshop: Workshop | None = None

    def of(
        self,
        run: str,
        job: Job,
        info: ClientInfo,
    ) -> Workshop:
        """The workshop for a run, built at the first call."""
        import torch

        from fedgrove.runs.parts import Parts, one_by_one
        from fedgrove.runs.prepare import machine_choices

        job = one_by_one(machine_choices(job))
        torch.set_num_threads(int(job.train.threads))
        key = run, job.digest()
        if self._workshop is None or self._key != key:
            self._workshop = None  # before the next model is loaded
            parts = Parts.of(job, [info])
            if self._half is None:
                half = parts.client_half()
            else:
                half = self._half(parts)
            self._workshop, self._key = Workshop(parts, half, {}), key
        return self._workshop


class Runtime:
    """Answers the server's messages for the client whose place this is, with what the process
    keeps.
    """

    def __init__(
        self,
        place: Machine,
        workshops: Workshops,
        *,
        simulated: bool = False,
    ):
        self.place, self.workshops, self.simulated = place, workshops, simulated

    def handle(self, blob: bytes) -> bytes:
        """The answer to a message; an "error" message where there is none."""
        key = ""
        try:
            note = self._decoded(blob)
            key = str(note.head.get("run", ""))
            self.place.received(note, blob, self._method(note))
            answer = self._answer(note)
        except Exception as error:
            answer = self._error(error)
        answer = replace(answer, head={"run": key, **answer.head})
        try:
            return self._sent(answer)
        except Exception as error:
            return self._sent(self._error(error))

    def _decoded(self, blob: bytes) -> Note:
        """Raises ``AdapterError``, once what came is in the site's log all the same."""
        try:
            return decode(blob)
        except Exception as error:
            with suppress(FedgroveError):
                self.place.received(Note("unreadable", {}, {}), blob, None)
            if isinstance(error, AdapterError):
                raise
            raise AdapterError("A message cannot be read.") from error

    def _method(self, note: Note) -> Method | None:
        """The run's method, to check a message against; None before the model is loaded."""
        if note.kind in ("hello", "open", "here"):
            return None
        with suppress(Exception):  # it is told where the message is answered
            return self._ready(note)[0].half.method
        return None

    def _sent(self, answer: Note) -> bytes:
        blob = encode(answer)
        self.place.sending(answer, blob)
        return blob

    def _answer(self, note: Note) -> Note:
        handlers = {
            "hello": self._hello,
            "open": self._open,
            "train": self._train,
            "keys": lambda note: self._confidant(note).keys(note),
            "shares": lambda note: self._confidant(note).shares(note),
            "unmask": lambda note: self._confidant(note).unmask(note),
            "evaluate": self._evaluate,
            "probe": self._probe,
            "finish": self._finish,
            "here": lambda note: Note("here"),
        }
        if note.kind not in handlers:
            raise RunError(f"A client has no answer to a message of the kind {note.kind!r}.")
        return handlers[note.kind](note)

    # ------------------------------------------------------------------ getting to know each other
    def _hello(self, note: Note) -> Note:
        import fedgrove
        from fedgrove.federation import Federation
        from fedgrove.federation.tasks import task_class

        job = self._job(note.head["job"])
        client = self.place.client(job)
        row = Federation((client,), job.data.classes, {}, task_class(job.data)).table()["clients"][
            0
        ]
        return Note(
            "hello",
            {
                "row": self.place.tells(row),
                "rank": self.place.rank(job),
                "version": fedgrove.__version__,
            },
        )

    def _open(self, note: Note) -> Note:
        given = note.head["client"]
        info = ClientInfo(
            str(given["name"]),
            int(given["rank"]),
            int(given["examples"]),
        )
        job = self._job(note.head["job"])
        affordable = self.place.rank(job)
        if affordable is not None and info.rank > affordable:
            raise RunError(
                f"The rank {info.rank} is above what {self.place.name} affords, {affordable}."
            )
        if not 1 <= info.rank <= (job.resolved().lora.rank or 1):
            raise RunError(
                f"The rank {info.rank} is none that lora.rank = {job.resolved().lora.rank} gives a "
                f"client."
            )
        if not self.simulated and info.name != self.place.name:  # it names folders
            raise RunError(f"This is {self.place.name}, and no other client.")
        home = self._home(note)
        home.mkdir(parents=True, exist_ok=True)
        write_text(home / _OPENED, json.dumps({"job": note.head["job"], "client": vars(info)}))
        data = self._ready(note)[2]
        if info.examples != len(data["train"]):
            raise RunError(
                f"{info.name} trains on {len(data['train'])} examples, and not on {info.examples}."
            )
        return Note("open")

    # ------------------------------------------------------------------ work
    def _train(self, note: Note) -> Note:
        shop, info, data = self._ready(note)
        head, stores = note.head, self._stores(note)
        round = int(head["round"])
        if not 1 <= round <= shop.job.run.rounds:
            raise RunError(f"The job has {shop.job.run.rounds} rounds, and no round {round}.")
        offer, store = note.body["offer"], stores.load(int(head["store"]))
        outcome = shop.half.train(
            info,
            data["train"],
            offer,
            store,
            round,
        )
        content = dict(outcome.update.content)
        if shop.job.privacy.secure_aggregation:
            content = self._confidant(note).masked(note, shop.half, outcome.update, offer)
        answer = Note(
            "train",
            {
                "loss": outcome.loss,
                "steps": outcome.steps,
                "trained": outcome.trained,
                "seconds": outcome.seconds,
            },
            {"update": content},
            shop.job.run.compress,
        )
        encode(answer)  # refuses what is private, before anything is kept
        Spending(self._home(note)).spend(
            round,
            offer,
            store,
            outcome.store,
        )
        stores.save(
            round,
            outcome.store,
            keep=int(head["keep"]),
        )
        return answer

    def _evaluate(self, note: Note) -> Note:
        shop, info, data = self._ready(note)
        split = str(note.head["split"])
        if split not in ("test", "validation"):
            raise RunError(f"A client is not measured on a split {split[:40]!r}.")
        assembly = shop.half.personal(
            info,
            note.body["offer"],
            self._stores(note).load(int(note.head["store"])),
        )
        measures = shop.half.measure(info.name, assembly, data[split])
        return Note("evaluate", {"measures": measures})

    def _probe(self, note: Note) -> Note:
        shop, info, data = self._ready(note)
        report = shop.half.probe(
            info,
            data["train"],
            note.body["offer"],
        )
        return Note(
            "probe",
            {},
            {"report": report} if report is not None else {},
            shop.job.run.compress,
        )

    def _finish(self, note: Note) -> Note:
        from fedgrove.runs.leave import leave

        shop, info, data = self._ready(note)
        folder = self.place.adapters(str(note.head["run"]))
        store = Spending(self._home(note)).told(self._stores(note).load(int(note.head["store"])))
        held_out = bool(note.head["held_out"])
        if shop.job.privacy.secure_aggregation:
            self._confidant(note).forget()
        left = leave(
            shop.parts, shop.half, info, data, note.body["offer"], store, folder,
            held_out=held_out, keep_texts=self.simulated, measure=bool(note.head["measure"]),
        )  # fmt: skip
        head = {"row": left.row, "stored": left.stored}
        own = json.dumps({"artefacts": left.artefacts, "texts": left.texts})
        if self.simulated:
            return Note("finish", {**head, "own": own})
        write_text(
            self._home(note) / "own.json", own
        )  # what a client knows of itself is for its own eyes
        return Note("finish", head)

    def _confidant(self, note: Note) -> Confidant:
        """The client's part in this run's masked rounds. Raises ``RunError`` where it has none."""
        info, job = self._opened(note)
        if not job.privacy.secure_aggregation:
            raise RunError("The job has no secure aggregation, so there is nothing to mask.")
        run = str(note.head["run"])
        return Confidant(
            self._home(note), job, info, self.place.identity(run), simulated=self.simulated
        )

    # ------------------------------------------------------------------ what it works with
    def _opened(self, note: Note) -> tuple[ClientInfo, Job]:
        """Who the client is in this run, and its job; after a restart from what ``open`` left on disk."""
        try:
            opened = json.loads((self._home(note) / _OPENED).read_text(encoding="utf-8"))
        except OSError:
            raise RunError(
                f"{self.place.name} does not know this run; it was not opened here."
            ) from None
        return ClientInfo(**opened["client"]), self._job(opened["job"])

    def _ready(self, note: Note) -> tuple[Workshop, ClientInfo, Data]:
        """The workshop, who the client is, and its data."""
        info, job = self._opened(note)
        shop = self.workshops.of(
            str(note.head["run"]),
            job,
            info,
        )
        if info.name not in shop.data:
            client = self.place.client(job)
            if not self.simulated:
                self._same_data(
                    self._home(note) / _DATA,
                    client,
                    job,
                )
            shop.data[info.name] = shop.parts.encode(client)
        return shop, info, shop.data[info.name]

    def _same_data(
        self,
        mark: Path,
        client: Client,
        job: Job,
    ) -> None:
        """A site that comes back to a run has the rows that it had before. Raises ``RunError``
        where it has others.
        """
        from fedgrove.federation import Federation
        from fedgrove.federation.tasks import task_class
        from fedgrove.runs.prepare import fingerprint_of

        now = fingerprint_of(Federation((client,), (), {}, task_class(job.data)))
        if not mark.exists():
            write_text(mark, now + "\n")
        elif mark.read_text(encoding="utf-8").strip() != now:
            raise RunError(
                f"The data of {client.name} changed since this run began; bring them back, or "
                f"start a new run."
            )

    def _job(self, text: str) -> Job:
        from fedgrove.job import Job

        return self.place.admit(Job.parse(text, "the server's job"))

    def _home(self, note: Note) -> Path:
        key = str(note.head["run"])
        if not key.isalnum():
            raise RunError("The server's key of the run is none.")
        return self.place.folder / "runs" / key

    def _stores(self, note: Note) -> Stores:
        return Stores(self._home(note))

    def _error(self, error: Exception) -> Note:
        if self.simulated:
            trace = "".join(traceback.format_tb(error.__traceback__))
        else:
            trace = _places(error)
        if isinstance(error, DataError) and not self.simulated:  # it names rows, labels and files
            getLogger(__name__).error("%s", error)
            sentence = f"{self.place.name} cannot use its data for this job; it has been told why."
            return Note("error", {"sentence": sentence, "trace": ""})
        if isinstance(error, FedgroveError):
            return Note("error", {"sentence": str(error), "trace": ""})
        if self.simulated:
            words = " ".join(str(error).split())[:300]
        else:
            words = "its text stays with the client"
        return Note(
            "error", {"sentence": f"Unexpected {type(error).__name__}: {words}.", "trace": trace}
        )


def _places(error: BaseException) -> str:
    """Where an exception came from: our files, lines and functions, no values."""
    frames = traceback.extract_tb(error.__traceback__)
    return "".join(
        f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}\n" for frame in frames
    )

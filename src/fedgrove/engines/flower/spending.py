"""What a client's trainings in one run have spent of its examples' privacy, whatever the server
made of them.

A client's store goes back with the server: a round whose update was lost, refused or asked for
again is not in it. What was spent on it is spent all the same, and a server could ask for one round
again and again with other offers. So every training is noted here, once for each answer that it can
give: the same key, offer and round give the same noise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedgrove.adapters.tree import pack
from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_text
from fedgrove.ground.plain import Given, Plain
from fedgrove.privacy.example_dp import NOTES

Steps = list[list[float]]  # [[sampling rate, steps], ...]


class Spending:
    """``spent.json`` in a run's folder at the client: answer -> [[sampling rate, steps], ...]."""

    def __init__(self, folder: Path):
        self.path = folder / "spent.json"

    def spend(
        self,
        round: int,
        offer: Given,
        before: Given,
        after: Given,
    ) -> None:
        """Note a training between two stores. To be called before its answer leaves."""
        if NOTES not in after:
            return
        earlier = _spent(before)
        more: Steps = []
        for rate, steps in _spent(after).items():
            added = steps - earlier.get(rate, 0)
            if added:
                more.append([rate, added])
        key = after[NOTES]["key"]
        purpose = f"{key} {round} ".encode()
        answer = hashlib.sha256(purpose + pack(dict(offer))).hexdigest()
        noted = self._noted()
        noted[answer] = more
        words = json.dumps(noted, indent=1)
        write_text(self.path, words + "\n")

    def told(self, store: Given) -> Plain:
        """The store with all that was spent in place of what its own line of rounds spent."""
        if NOTES not in store:
            return dict(store)
        total: dict[float, float] = {}
        for entry in self._noted().values():
            for rate, steps in entry:
                total[rate] = total.get(rate, 0) + steps
        spent = [[rate, steps] for rate, steps in total.items()]
        notes = dict(store[NOTES])
        if spent:
            notes["spent"] = spent
        return {**store, NOTES: notes}

    def _noted(self) -> dict[str, Steps]:
        try:
            words = self.path.read_text(encoding="utf-8")
            noted: dict[str, Steps] = json.loads(words)
            return noted
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path} cannot be read, so what this run spent of the examples' privacy is "
                f"not known; bring the "
                "file back."
            ) from error


def _spent(store: Given) -> dict[float, int]:
    notes = store.get(NOTES, {})
    spent = notes.get("spent", [])
    return {float(rate): int(steps) for rate, steps in spent}

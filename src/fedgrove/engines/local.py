"""Everything in this process: one resident base, the clients one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedgrove.adapters.assembly import Assembly
from fedgrove.engines.base import Arrival, OfferOf
from fedgrove.federation.tasks.base import Example
from fedgrove.methods.contract import ClientInfo
from fedgrove.training.client import ClientHalf, Store
from fedgrove.tree import nbytes, numbers

Data = Mapping[str, Mapping[str, Sequence[Example]]]  # client -> split -> encoded examples


class LocalEngine:
    """The simulation engine. Stores stay in memory; a checkpoint is handed those that changed."""

    def __init__(self, half: ClientHalf, clients: Mapping[str, ClientInfo], data: Data):
        self.half, self.clients, self.data = half, clients, data
        self._stores: dict[str, Store] = {}
        self._changed: set[str] = set()

    def train(self, round: int, clients: Sequence[str], offer: OfferOf) -> Iterator[Arrival]:
        for name in clients:
            given = offer(name)
            outcome = self.half.train(self.clients[name], self.data[name]["train"], given, self.store(name), round)
            bytes_up, bytes_down = nbytes(outcome.update.content), nbytes(given)  # refuses what is private
            self._stores[name] = outcome.store
            self._changed.add(name)
            yield Arrival(
                update=outcome.update,
                loss=outcome.loss,
                steps=outcome.steps,
                trained=outcome.trained,
                up=numbers(outcome.update.content),
                down=numbers(given),
                bytes_up=bytes_up,
                bytes_down=bytes_down,
                seconds=outcome.seconds,
            )

    def evaluate(self, clients: Sequence[str], offer: OfferOf, split: str) -> Iterator[tuple[str, dict[str, float]]]:
        for name in clients:
            assembly = self.half.deployed(self.personal(name, offer(name)))
            yield name, self.half.kernel.evaluate(assembly, self.data[name][split])

    def personal(self, client: str, offer: Mapping[str, Any]) -> Assembly:
        """The client's model as it would deploy it, head included."""
        return self.half.personal(self.clients[client], offer, self.store(client))

    def store(self, client: str) -> Store:
        return self._stores.get(client, {})

    def changed(self) -> dict[str, Store]:
        stores = {name: self._stores[name] for name in sorted(self._changed)}
        self._changed.clear()
        return stores

    def restore(self, stores: Mapping[str, Store]) -> None:
        self._stores = dict(stores)
        self._changed.clear()

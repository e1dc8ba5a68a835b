"""A site that spoils each of its updates in another way: ``python hostile.py FOLDER`` instead of
``deploy site``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.deploy.attend import attend
from fedgrove.engines.flower import client
from fedgrove.engines.flower.wire import Note, decode

done: list[int] = []  # rounds
honest, handle = client.Runtime._train, client.Runtime.handle


def spoilt(self: client.Runtime, note: Note) -> Note:
    answer = honest(self, note)
    part: Any = answer.body["update"]["method"]
    adapter = part["adapter"]
    site = next(iter(adapter))
    factors = adapter[site]
    done.append(int(note.head["round"]))
    match len(done):
        case n if n == 1 or n >= 8:
            factors.A[0, 0] = float("nan")
        case 2:
            adapter[site] = Factors(
                torch.ones(9, factors.A.shape[1]), torch.ones(factors.B.shape[0], 9), factors.scale
            )
        case 3:
            adapter["encoder.layer.99.attention.self.query"] = factors
        case 5:
            factors.B[0, 0] = 1e30
        case 6:
            part["ballast"] = torch.zeros(1_000_000)
        case 7:
            del adapter[
                site
                # only trying it shows that; the server's half of the method cannot place such a
                # newcomer
            ]
    return answer


def garbled(self: client.Runtime, blob: bytes) -> bytes:
    answer = handle(self, blob)
    return b"no message at all" if decode(blob).kind == "train" and len(done) == 4 else answer


client.Runtime._train = spoilt  # type: ignore[method-assign]
client.Runtime.handle = garbled  # type: ignore[method-assign]
attend(Path(sys.argv[1]), say=lambda sentence: print(sentence, flush=True))

"""A site that dies by SIGKILL in the second round or later, when a message of one kind is there and before it is
answered: ``python quitting.py FOLDER KIND`` instead of ``deploy site``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fedgrove.deploy.attend import attend
from fedgrove.engines.flower import client
from fedgrove.engines.flower.wire import decode

handle = client.Runtime.handle


def dying(self: client.Runtime, blob: bytes) -> bytes:
    note = decode(blob)
    if note.kind == sys.argv[2] and note.head.get("round", 0) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return handle(self, blob)


client.Runtime.handle = dying  # type: ignore[method-assign]
attend(Path(sys.argv[1]), say=lambda sentence: print(sentence, flush=True))

"""Messages between the server and a client: one blob each, in the encoding of ``tree``, which
refuses what is private.

A message is its kind, a head of plain values, and a body of tensors. The blob is all that travels,
so its length is the cost and its hash identifies it (a site's audit log). Beside the tensors it
costs about 90 bytes for each of them and 200 for the message: 1 % of a rank-8 adapter of a small
encoder.

``hello``     the job as text -> who the client is, what it holds (counts, no rows), its versions
``open``      the resolved job and the client's rank -> the client has loaded the model
``train``     an offer -> an update and figures
``keys``      nothing -> this round's public keys, signed (``secure.messages``, as the next two)
``shares``    the keys of a client's neighbours -> shares of its secrets for them
``unmask``    whose masked updates arrived -> what takes the masks out of their sum
``evaluate``  an offer -> the personal model's measures on one split
``probe``     a newcomer's offer -> what its probe found
``finish``    an offer -> the client's adapter stays with the client; measures go up
``here``      nothing -> nothing: the client is there, and done with what it was sent before
``error``     the answer to any of them: a sentence, and where it came from
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedgrove.adapters.tree import Tree, pack, unpack
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.plain import Given
from fedgrove.wire.compress import Compression, expand, squeeze

KINDS = (
    "hello",
    "open",
    "keys",
    "shares",
    "train",
    "unmask",
    "evaluate",
    "probe",
    "finish",
    "here",
)


@dataclass(frozen=True, eq=False)
class Note:
    """One message. ``head``: plain values, dicts and lists of them; ``body``: a tree, compressed
    only on the way.
    """

    kind: str
    head: Given = field(default_factory=dict)
    body: Tree = field(default_factory=dict)
    compress: Compression = "none"


def encode(note: Note) -> bytes:
    """The blob of a message. Raises ``PrivacyError`` where the body holds a client's private
    tensor.
    """
    return pack(
        {"kind": note.kind, "head": dict(note.head), "body": squeeze(note.body, note.compress)}
    )


def decode(blob: bytes) -> Note:
    """The message in a blob. Raises ``AdapterError`` where it is none."""
    tree = unpack(blob)
    kind, head, body = tree.get("kind"), tree.get("head"), tree.get("body")
    if not (
        isinstance(kind, str)
        and kind in (*KINDS, "error")
        and isinstance(head, dict)
        and isinstance(body, dict)
    ):
        raise AdapterError(
            "A message is none of Fedgrove's; the two sides may run different versions."
        )
    return Note(kind, head, expand(body))

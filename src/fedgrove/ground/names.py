"""What a client may be called, and the folder that is its own."""

from __future__ import annotations

import hashlib
import re
import unicodedata

#: a name that is a folder's on any file system, never one of ours (``_global``); a site's must be
PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
#: letters and digits of any script, single spaces, and signs that occur in names
_CLIENT = re.compile(r"a(?:(?:[a_.'&+,()-]| (?! )){0,62}[a_)'+-])?")  # "a" for any letter
LONGEST = 64  # characters
_MARKS = "Mn", "Mc"  # signs that stand on or beside a letter, which \w leaves out

#: the rule in words, for messages
RULE = (
    "at most 64 letters, digits, single spaces and . _ - ' & + , ( ), with a letter or digit first"
)


def client_name(text: str) -> str | None:
    """The name in Unicode's composed form (two file systems may spell one "é" differently), or None
    where ``text`` cannot be one.
    """
    name = unicodedata.normalize("NFC", text)
    bare = "".join("a" if is_letter(sign) else sign for sign in name)
    if _CLIENT.fullmatch(bare) and len(name) <= LONGEST:
        return name
    return None


def is_letter(sign: str) -> bool:
    """Whether a character is a letter or digit of any script, or a mark on one."""
    return sign.isalnum() or unicodedata.category(sign) in _MARKS


def folder_of(name: str) -> str:
    """A name for the folder of a client, safe on any file system: its own where that is plain, else
    what a–z has of it and a hash, so that no two names share one.
    """
    if PLAIN.fullmatch(name):
        return name
    flat = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    start = re.sub(r"[^A-Za-z0-9]+", "-", flat).strip("-")[:40] or "client"
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

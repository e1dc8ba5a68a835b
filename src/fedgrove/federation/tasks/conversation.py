"""Checks prompts, completions and conversations as they come out of users' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedgrove.federation.readers import Place, text_of, whole
from fedgrove.ground.errors import DataError

ROLES = ("system", "user", "assistant")
#: what other tools call them
SAME = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
TOOLS = ("tool", "function", "function_call", "observation")
SPELLINGS = (("role", "content"), ("from", "value"))


def answers(
    value: Any,
    column: str,
    place: Place,
) -> list[str]:
    """The right completions of a row, the one to learn first: a text, or a list of texts. Raises
    DataError.
    """
    if not isinstance(value, list | tuple):
        return [text_of(value, column, place)]
    if not value:
        raise DataError(
            f"{place}: the column {column!r} is an empty list; give at least one completion"
        )
    return [text_of(each, column, place) for each in value]


def conversation(
    value: Any,
    column: str,
    place: Place,
) -> list[dict[str, str]]:
    """``[{"role": "user", "content": "..."}, ..., {"role": "assistant", ...}]``; other keys are
    dropped.

    A message may also be ``{"from": "human", "value": "..."}``, and a content a list of parts
    ``{"type": "text", "text": "..."}``. Raises DataError: no list, an unknown role, an empty
    message, a system message that is not the first, an end that is not the assistant's, nothing
    before that end.
    """

    def wrong(what: str) -> DataError:
        return DataError(f"{place}: the column {column!r} {what}")

    if not isinstance(value, list | tuple):
        raise wrong(
            f"is a {type(value).__name__}, not a list of messages with a role and a content"
        )
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value, start=1):
        role, content = _said(message, number, wrong)
        if role == "system" and number > 1:
            raise wrong(f"has a system message at place {number}; it can only be the first")
        if not isinstance(content, str) or not content.strip():
            raise wrong(f"has a message {number} whose content is empty or no text")
        messages.append({"role": role, "content": whole(content, column, place)})
    if not messages or messages[-1]["role"] != "assistant":
        end = f"a message of the {messages[-1]['role']}" if messages else "nothing"
        raise wrong(
            f"ends in {end}; the last message must be the assistant's, because it is what is learnt"
        )
    if len(messages) == 1 or messages[-2]["role"] != "user":
        raise wrong("has no user's message before the last answer, so there is nothing to answer")
    return messages


def _said(
    message: Any,
    number: int,
    wrong: Callable[[str], DataError],
) -> tuple[str, Any]:
    """Role and content of a message, in either spelling; parts of a content are joined."""
    if not isinstance(message, dict):
        raise wrong(f"has a message {number} that is no object with a role and a content")
    if message.get("tool_calls") or _plain(message.get("role", message.get("from"))) in TOOLS:
        raise wrong(f"has a message {number} of tools, which is not learnt; leave such rows out")
    for role_key, content_key in SPELLINGS:
        if role_key in message and content_key in message:
            role, content = message[role_key], message[content_key]
            break
    else:
        raise wrong(f"has a message {number} that is no object with a role and a content")
    plain = SAME.get(_plain(role), _plain(role))
    if plain not in ROLES:
        raise wrong(f"has a message {number} with the role {role!r}; roles are {', '.join(ROLES)}")
    if isinstance(content, list | tuple):
        content = "".join(_part(part, number, wrong) for part in content)
    return plain, content


def _plain(role: Any) -> str:
    """A role as it is compared: small letters."""
    if isinstance(role, str):
        return role.strip().lower()
    return ""


def _part(
    part: Any,
    number: int,
    wrong: Callable[[str], DataError],
) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise wrong(f"has a message {number} with a part of the kind {kind!r}; only text is learnt")
    return text

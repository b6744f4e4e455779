"""The role of an event's type: what an event does to its user's sequence and lists.

    view=click,purchase=click+exclude,dislike=exclude,impression=ignore

A settings file has the same as a table, and JSON is understood too. The type ``*`` stands for all that are not named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from streamrec.schemas import CLICK, EXCLUDE, Role

REST = "*"
ROLES = {
    "click": CLICK,
    "exclude": EXCLUDE,
    "click+exclude": Role(click=True, exclude=True),
    "ignore": None,
}
FORM = "write view=click,purchase=click+exclude,impression=ignore, or JSON"


def pairs_of(value: object) -> dict[str, str]:
    """Return the pairs of type and text that a setting has.

    Raises:
        ValueError: it has none; the message says how to write it.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    elif isinstance(value, str):
        parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
        value = {kind.strip() if sign else "": text.strip() for kind, sign, text in parts}
    if not isinstance(value, dict) or not all(value) or any(isinstance(text, (dict, list)) for text in value.values()):
        raise ValueError(FORM)
    return {kind: str(text) for kind, text in value.items()}


def check_roles(roles: Mapping[str, str]) -> None:
    """Check that all roles are known.

    Raises:
        ValueError: one is not; the message is the reason.
    """
    for kind, role in roles.items():
        if role not in ROLES:
            raise ValueError(f"{role!r} of {kind!r} is no role: roles are {', '.join(ROLES)}; {FORM}")


def excludes(roles: Mapping[str, str]) -> bool:
    """Return whether events of some type take items out of lists."""
    return any(role is not None and role.exclude for role in map(ROLES.get, roles.values()))


class Roles:
    """The roles of all types."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        self._of = {kind: ROLES[role] for kind, role in roles.items() if kind != REST}
        self._of_rest = ROLES[roles[REST]] if REST in roles else None

    def of(self, event_type: object) -> Role | None:
        """Return the role of a type, None if its events are ignored; an event without a type is a click."""
        if event_type is None:
            return CLICK
        return self._of.get(event_type, self._of_rest) if isinstance(event_type, str) else self._of_rest

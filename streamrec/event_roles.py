"""The role of an event's type: what an event does to its user's sequence and lists, and how good a click is.

    view=click,purchase=click+exclude,dislike=exclude,impression=ignore
    view=0.2,purchase=1

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
ROLES_FORM = "write view=click,purchase=click+exclude,impression=ignore, or JSON"
OUTCOMES_FORM = "write view=0.2,purchase=1, or JSON, with numbers from 0 to 1"


def roles_of(value: object) -> dict[str, str]:
    """Return the roles that a setting has, by type.

    Raises:
        ValueError: it has none, or an unknown one; the message says how to write them.
    """
    roles = _pairs_of(value, ROLES_FORM)
    for kind, role in roles.items():
        if role not in ROLES:
            raise ValueError(f"{role!r} of {kind!r} is no role: roles are {', '.join(ROLES)}; {ROLES_FORM}")
    return roles


def outcomes_of(value: object) -> dict[str, float]:
    """Return the outcomes that a setting has, by type.

    Raises:
        ValueError: it has none, or one is no number from 0 to 1; the message says how to write them.
    """
    texts = _pairs_of(value, OUTCOMES_FORM)
    try:
        outcomes = {kind: float(text) for kind, text in texts.items()}
    except ValueError:
        raise ValueError(OUTCOMES_FORM) from None
    if not all(0 <= outcome <= 1 for outcome in outcomes.values()):
        raise ValueError(OUTCOMES_FORM)
    return outcomes


def _pairs_of(value: object, form: str) -> dict[str, str]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    elif isinstance(value, str):
        parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
        value = {kind.strip() if sign else "": text.strip() for kind, sign, text in parts}
    if not isinstance(value, dict) or not all(value) or any(isinstance(text, (dict, list)) for text in value.values()):
        raise ValueError(form)
    return {kind: str(text) for kind, text in value.items()}


def excludes(roles: Mapping[str, str]) -> bool:
    """Return whether events of some type take items out of lists."""
    return any(role is not None and role.exclude for role in map(ROLES.get, roles.values()))


class Roles:
    """The roles of all types, with their outcomes.

    Raises:
        ValueError: a type has an outcome, and its events are no clicks.
    """

    def __init__(self, roles: Mapping[str, str], outcomes: Mapping[str, float]) -> None:
        named = {kind: ROLES[role] for kind, role in roles.items()} or {REST: CLICK}
        rest = named.get(REST)
        for kind in outcomes:
            role = named.get(kind, rest)
            if role is None or not role.click:
                raise ValueError(f"events_outcomes names {kind!r}, and events_roles makes no click of its events")
            named[kind] = role
        others = outcomes.get(REST, 1.0)
        self._of = {
            kind: None if role is None else role._replace(outcome=outcomes.get(kind, others))
            for kind, role in named.items()
        }
        self._of_rest = self._of.get(REST)

    def of(self, event_type: object) -> Role | None:
        """Return the role of a type, None if its events are ignored; an event without a type is a click."""
        if event_type is None:
            return CLICK
        return self._of.get(event_type, self._of_rest) if isinstance(event_type, str) else self._of_rest

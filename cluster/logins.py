"""Logins in addresses: they come from the environment, and are neither kept nor shown.

An address such as ``postgresql://me:${DB_PASSWORD}@host/db`` is kept and shown as it stands; the variable is
looked up where the address is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from cluster.references import UserError

_LOGIN = re.compile(r"://([^/@]*)@")

_VARIABLE = re.compile(r"\$\{(\w+)\}")

#: What stands before a secret, and the secret: ``user:password@``, and what a query calls one.
_SECRETS = (
    re.compile(r"(://[^/@\s]*?:)(\S+)(?=@)"),
    re.compile(r"([?&;][\w.-]*(?:pass|pwd|token|secret|key|credential|sig)[\w.-]*=)([^&;#\s]+)", re.I),
)


class LoginError(UserError):
    """An address holds a password, or a variable that it names is not set; says which and what to do."""


def masked(text: str) -> str:
    """``text`` with the passwords in all its addresses hidden; variables that stand for some stay."""

    def hide(found: re.Match[str]) -> str:
        return found[0] if not _VARIABLE.sub("", found[2]) else f"{found[1]}***"

    for pattern in _SECRETS:
        text = pattern.sub(hide, text)
    return text


def without_logins(tree: dict[str, Any]) -> dict[str, Any]:
    """The values of an older file, which may hold passwords, with them hidden."""
    return _replaced(tree, masked)


def problem(key: str, address: str | None) -> str | None:
    """Why an address cannot be kept as it is, without repeating it; None where it can."""
    return None if address is None or masked(address) == address else f"{key}: {_cure(key)}"


def written_out(key: str, address: str, *, quoted: bool = False) -> str:
    """An address with its variables looked up, for the one place that uses it.

    Args:
        key: Configuration key, for the message.
        address: The address as it is kept.
        quoted: Whoever reads it expects special characters of a login as ``%40``, as SQLAlchemy does.

    Raises:
        LoginError: A variable is not set, or the address holds a password, or held one that is hidden.
    """
    if problem(key, address) or "***" in address:
        raise LoginError(f"{key}: {_cure(key)}")

    def look_up(found: re.Match[str]) -> str:
        value = os.environ.get(found[1])
        if value is None:
            raise LoginError(f"{key}: {address}: the environment has no variable {found[1]}")
        return value

    def in_a_login(found: re.Match[str]) -> str:
        return f"://{_VARIABLE.sub(lambda name: quote(look_up(name), safe=''), found[1])}@"

    return _VARIABLE.sub(look_up, _LOGIN.sub(in_a_login, address) if quoted else address)


def place(address: str | None) -> str | None:
    """The address without the login, which may change while the place stays the same."""
    return address if address is None else _LOGIN.sub("://", address)


def hidden(text: str, address: str) -> str:
    """A message about an address, from elsewhere, with the values of the address's variables hidden."""
    for name in _VARIABLE.findall(address):
        for value in {os.environ.get(name, ""), quote(os.environ.get(name, ""), safe="")} - {""}:
            text = text.replace(value, f"${{{name}}}")
    return masked(text)


def _cure(key: str) -> str:
    if key == "tracking.uri":
        cure = "give the login as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    else:
        cure = f"name a variable of the environment: {key}='...://user:${{PASSWORD}}@...'"
    return f"no password belongs into an address, which is kept and shown; {cure}"


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(own, change) for key, own in value.items()}
    if isinstance(value, list):
        return [_replaced(own, change) for own in value]
    return change(value) if isinstance(value, str) and "://" in value else value

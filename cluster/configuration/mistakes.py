"""What pydantic found wrong with a section, in plain words."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import ValidationError

from cluster.configuration.choices import KINDS
from cluster.configuration.sections import Section
from cluster.logins import masked
from cluster.references import did_you_mean, nearest


def in_plain_words(error: ValidationError, root: type[Section], above: str = "") -> str:
    """One line a mistake: the key, what was found, what is allowed.

    Args:
        error: What pydantic found.
        root: The section that was validated.
        above: Key of that section with a dot behind it; nothing for the whole configuration.
    """
    lines = []
    for mistake in error.errors():
        where = above + ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            section: Any = root
            for part in mistake["loc"][:-1]:
                # Of a mapping of sections, such as the tiers by name, each value is one.
                section = get_args(section)[1] if get_args(section) else section.model_fields[part].annotation
            prefix = where.rpartition(".")[0]
            known = list(section.model_fields)
            near = nearest(mistake["loc"][-1], known)
            hint = f"; did you mean {prefix + '.' if prefix else ''}{near}?" if near else ""
            lines.append(f"{where}: unknown key; known here: {', '.join(known)}{hint}")
        elif mistake["type"] == "tuple_type":
            found = mistake["input"]
            lines.append(f"{where}: a list, found {_short(found)}; write {where}=[{found}]")
        elif mistake["type"] == "model_type":
            named = f"{where}.name={mistake['input']}" if where in KINDS else f"{where}.<key>=<value>"
            lines.append(
                f"{where}: a section of keys and values, found {_short(mistake['input'])}; write {named}"
            )
        elif mistake["type"] == "literal_error":
            allowed = re.findall(r"'([^']*)'", mistake["ctx"]["expected"])
            hint = did_you_mean(mistake["input"], allowed)
            lines.append(f"{where}: {mistake['msg']}, found {_short(mistake['input'])}{hint}")
        elif mistake["type"] == "value_error":
            found = f"{where}: found {_short(mistake['input'])}; " if mistake["loc"] else ""
            lines.append(found + str(mistake["ctx"]["error"]))
        else:
            lines.append(f"{where}: {mistake['msg']}, found {_short(mistake['input'])}")
    return masked("\n".join(lines))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text):,} characters)"

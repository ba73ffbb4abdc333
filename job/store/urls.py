"""Checks a URL or a path, whatever it names."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from job.errors import without_secrets


def unusable(place: str) -> str:
    """Explain why a place cannot be a URL or a path; empty if it may be one."""
    if without_secrets(place) != place and "://" in place:
        return (
            f"{without_secrets(place)[:300]!r} contains credentials or options, which do not belong in a spec; use the "
            "platform's own variables or roles"
        )
    try:
        path = unquote(urlsplit(place).path) if "://" in place else place
    except ValueError as error:
        return f"{place[:300]!r} is not a URL ({error})"
    return f"{place[:300]!r} contains the character NUL, which no path can contain" if "\0" in path else ""

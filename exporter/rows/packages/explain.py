"""Explain which remotes and rules are tried for a URL, and why each of them fails. No network access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .identity import (
    Response,
    apply_rule,
    authority_of,
    context_of,
    decoded_path,
    missing_context,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from .identity import Remotes
    from .rules import Remote, RemoteMatch, Rule

_NO_RESPONSE = Response(None, None)


def explain(
    remotes: Remotes, host: str, path: str, *, scheme: str = "", port: int | None = None
) -> Iterator[str]:
    """Yield lines, in the order in which `Remotes.identify` tries remotes and rules.

    The arguments are those of `Remotes.identify`.
    """
    host = host.rstrip(".").lower()
    text = decoded_path(path)
    if text is None:
        yield "path: too long, not printable, or ambiguous, so that no package is identified"
        text = ""
    elif text != path:
        yield f"path: {text}"
    authority = authority_of(host, scheme, port)
    named = remotes.remotes_of_host(host, scheme, port)
    if not named:
        yield f"no remote has the host {authority}"
    for remote in (*named, *(remotes.remotes_of_path(text) if text and host else ())):
        found = yield from _explain_remote(remote, authority, text)
        if found:
            return
    yield "no other remote of any host has this path"


def _explain_remote(remote: Remote, authority: str, path: str) -> Generator[str, None, bool]:
    """Yield the lines of one remote; return whether it is the last one to try."""
    match = remote.match(path, authority)
    label = "remote" if remote.host else "remote of any host"
    if match is None:
        yield f"{label} {remote.name.text}: its path does not match"
        return False
    if remote.needs_oci_response:
        yield f"{label} {match.name}: needs the response of an OCI registry"
        return False
    if match.rules is None:
        yield f"{label} {match.name}: has no format"
        return True
    yield f"{label} {match.name}: matches {match.prefix or '/'}; the rules see {match.path or '(nothing)'}"
    identified = yield from _explain_rules(match, authority)
    if not identified and match.is_guess:
        yield "  no rule matches, so that it is not this remote"
    return identified or not match.is_guess


def _explain_rules(match: RemoteMatch, authority: str) -> Generator[str, None, bool]:
    """Yield a line for each rule that is tried; return whether one matches."""
    context, path = context_of(authority, match, _NO_RESPONSE), match.path.encode()
    others: list[str] = []
    for rule in match.rules.rules if match.rules else ():
        missing = missing_context(context, match, rule)
        identity = None if missing else apply_rule(match.name, rule, path, context)
        if identity is not None:
            yield from _unmatched(others)
            yield f"  {rule.label}: {identity.artifact_kind} {identity.purl or '(no package)'}"
            return True
        reason = _failure(rule, path, missing)
        if reason is None:
            others.append(rule.label)
        else:
            yield f"  {rule.label}: {reason}"
    yield from _unmatched(others)
    return False


def _unmatched(labels: list[str]) -> Iterator[str]:
    """Yield one line with the rules of each format: `pypi#1 2 4`."""
    numbers: dict[str, list[str]] = {}
    for label in labels:
        name, _, number = label.partition("#")
        numbers.setdefault(name, []).append(number)
    if numbers:
        rules = ", ".join(f"{name}#{' '.join(each)}" for name, each in numbers.items())
        yield f"  re does not match: {rules}"


def _failure(rule: Rule, path: bytes, missing: list[str]) -> str | None:
    """Say why a rule fails; None if its pattern does not match."""
    values = rule.pattern.search(path)
    if values is None:
        return None
    if rule.refinement is not None and rule.match(path) is None:
        start = rule.refinement.after.fill(values)
        value = values[rule.refinement.group] or ""
        return f"then does not match {value!r}, which must start with {start!r} and go on as its re says"
    if missing:
        return f"no value for {', '.join(missing)}"
    return "a value for its purl is missing, or a filter rejects it"

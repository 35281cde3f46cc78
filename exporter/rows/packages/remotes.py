"""Read the table of remotes from YAML and check it; asks nothing of any path.

A file has two parts. `formats` says, for each kind of registry, which shapes of path name a
package. `remotes` says which hosts, and which folders of them, are a registry of which format. A
user's own file goes on top: its remotes are tried first, its formats are added, or replace the
shipped one of the same name. `configs/remotes.yaml` explains each key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import yaml

from .purl_template import PurlTemplate
from .rules import (
    GIVEN,
    KINDS,
    LARGE_SET_MEMORY,
    Folder,
    Pattern,
    Refinement,
    Remote,
    Rule,
    RuleSet,
    Template,
    folder,
    host_pattern,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

ANY = "any"  # the format of a mirror of unknown kind: the rules of all formats, where `any` allows


class RemotesError(Exception):
    """A table of remotes is wrong: a sentence a line, each with file, line and what is wrong."""


def read_remotes(paths: Sequence[Path]) -> tuple[Remote, ...]:
    """The remotes of these files, in the order they are tried: a later file's before an earlier's.

    Raises:
        RemotesError: a file can't be read, or is wrong somewhere; every place is named.
    """
    problems: list[str] = []
    formats: dict[str, _Format] = {}
    remotes: list[_RemoteDefinition] = []
    for path in paths:
        root = _root(path, problems)
        if root is not None:
            fields = root.fields("the file", optional=("formats", "remotes"))
            own = _formats(fields.get("formats"))
            formats = own | {name: f for name, f in formats.items() if name not in own}
            remotes = [*_remotes(fields.get("remotes")), *remotes]
    _check_references(formats, remotes)
    if problems:
        raise RemotesError("\n".join(problems))
    rules = _rule_sets(formats)
    return tuple(
        Remote(r.name, r.host, r.paths, rules[r.format] if r.format else None, rules, r.vendor)
        for r in remotes
    )


class _Place(NamedTuple):
    """A node of a file, and how to say what is wrong with it."""

    path: Path
    problems: list[str]
    node: yaml.Node

    def at(self, node: yaml.Node) -> _Place:
        return self._replace(node=node)

    def wrong(self, sentence: str) -> None:
        self.problems.append(f"{self.path}, line {self.node.start_mark.line + 1}: {sentence}.")

    def pairs(self, what: str) -> Iterator[tuple[str, _Place]]:
        """The keys and values of a mapping; a key given twice is refused."""
        if not isinstance(self.node, yaml.MappingNode):
            self.wrong(f"{what} is no mapping")
            return
        seen: set[str] = set()
        for key_node, value in self.node.value:
            key = str(key_node.value)
            if key in seen:
                self.at(key_node).wrong(f"{what} has {key} twice")
            else:
                seen.add(key)
                yield key, self.at(value)

    def fields(
        self, what: str, required: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> dict[str, _Place]:
        """A mapping of known keys; unknown ones are refused, missing ones named."""
        found: dict[str, _Place] = {}
        known = (*required, *optional)
        for key, place in self.pairs(what):
            if key in known:
                found[key] = place
            else:
                place.wrong(f"{what} has the key {key}, expected one of {', '.join(known)}")
        missing = [key for key in required if key not in found]
        if missing and isinstance(self.node, yaml.MappingNode):
            self.wrong(f"{what} lacks {', '.join(missing)}")
        return found

    def items(self, what: str) -> list[_Place]:
        """The members of a list."""
        if isinstance(self.node, yaml.SequenceNode):
            return [self.at(node) for node in self.node.value]
        self.wrong(f"{what} is no list")
        return []

    def text(self, what: str) -> str:
        """A plain value; empty if it is none, which is then named."""
        if isinstance(self.node, yaml.ScalarNode) and self.node.value:
            return str(self.node.value)
        self.wrong(f"{what} is no text")
        return ""

    def texts(self, what: str) -> list[str]:
        """One plain value, or a list of them."""
        if isinstance(self.node, yaml.SequenceNode):
            return [place.text(what) for place in self.items(what)]
        return [self.text(what)]


class _Format(NamedTuple):
    rules: tuple[Rule, ...]
    for_any: tuple[Rule, ...]  # those also tried under `any`
    other_name_of: str | None
    place: _Place


class _RemoteDefinition(NamedTuple):
    """A remote whose format is still a name."""

    name: Template
    label: str  # the name as written
    host: str
    paths: tuple[Folder, ...]
    format: str | None
    vendor: str | None
    place: _Place

    @property
    def knows_vendor(self) -> bool:
        return self.vendor is not None or any("vendor" in _groups(path) for path in self.paths)


def _root(path: Path, problems: list[str]) -> _Place | None:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as e:
        problems.append(f"{path}: can't be read ({e.strerror}).")
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text.")
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        problems.append(f"{path}, line {line}: is no YAML: {e.problem}.")
    except yaml.YAMLError as e:
        problems.append(f"{path}: is no YAML: {' '.join(str(e).split())}.")
    else:
        return None if node is None else _Place(path, problems, node)  # an empty file adds nothing
    return None


def _formats(place: _Place | None) -> dict[str, _Format]:
    formats: dict[str, _Format] = {}
    for name, format_place in place.pairs("formats") if place else ():
        if name == ANY:
            format_place.wrong(f"a format can't be called {ANY}")
        elif isinstance(format_place.node, yaml.ScalarNode):
            other = format_place.text(f"format {name}")
            formats[name] = _Format((), (), other, format_place)
        else:
            formats[name] = _rules(name, format_place)
    return formats


def _rules(name: str, place: _Place) -> _Format:
    rules: list[Rule] = []
    for_any: list[Rule] = []
    if isinstance(place.node, yaml.SequenceNode) and not place.node.value:
        place.wrong(f"format {name} has no rules")
    for number, rule_place in enumerate(place.items(f"format {name}"), start=1):
        label = f"{name}#{number}"
        keys = ("then", "purl", "any")
        fields = rule_place.fields(f"rule {label}", required=("re", "kind"), optional=keys)
        rule = _rule(label, fields)
        if rule is not None:
            rules.append(rule)
            if _tried_under_any(label, fields.get("any")):
                for_any.append(rule)
    return _Format(tuple(rules), tuple(for_any), None, place)


def _rule(label: str, fields: Mapping[str, _Place]) -> Rule | None:
    if "re" not in fields or "kind" not in fields:
        return None
    kind = fields["kind"].text(f"kind of rule {label}")
    if kind and kind not in KINDS:
        fields["kind"].wrong(
            f"rule {label} has the kind {kind}, expected one of {', '.join(KINDS)}"
        )
    source = fields["re"].text(f"re of rule {label}")
    pattern = _pattern(f"rule {label}", source, fields["re"])
    if pattern is None:
        return None
    then = _then(label, fields["then"], pattern) if "then" in fields else None
    groups = {*pattern.groups, *(then.pattern.groups if then else ())}
    purl = _purl(label, fields["purl"], groups) if "purl" in fields else None
    wants = purl.required - groups if purl else frozenset()
    return Rule(label, source, pattern, then, kind, purl, wants)


def _tried_under_any(label: str, place: _Place | None) -> bool:
    if place is None:
        return True
    text = place.text(f"any of rule {label}")
    if text not in {"true", "false"}:
        place.wrong(f"rule {label} has any: {text}, expected true or false")
    return text == "true"


def _pattern(what: str, text: str, place: _Place) -> Pattern | None:
    try:
        return Pattern(text)
    except ValueError as e:
        place.wrong(f"{what} has a pattern that can't be used ({e})")
        return None


def _then(label: str, place: _Place, pattern: Pattern) -> Refinement | None:
    fields = place.fields(f"then of rule {label}", required=("group", "re"), optional=("after",))
    if "group" not in fields or "re" not in fields:
        return None
    group = fields["group"].text(f"group of rule {label}")
    after = Template(fields["after"].text(f"after of rule {label}") if "after" in fields else "")
    source = fields["re"].text(f"then of rule {label}")
    second = _pattern(f"then of rule {label}", source, fields["re"])
    _check_groups(f"then of rule {label}", {group, *after.names}, set(pattern.groups), place)
    return None if second is None else Refinement(group, after, second)


def _purl(label: str, place: _Place, groups: set[str]) -> PurlTemplate | None:
    try:
        purl = PurlTemplate(place.text(f"purl of rule {label}"))
    except ValueError as e:
        place.wrong(f"rule {label} has a purl that can't be filled: it {e}")
        return None
    _check_groups(f"purl of rule {label}", purl.names, groups | GIVEN, place)
    return purl


def _check_groups(what: str, wanted: Iterable[str], there: set[str], place: _Place) -> None:
    for name in sorted(wanted):
        if name and name not in there:
            groups = ", ".join(sorted(there)) or "none"
            place.wrong(f"{what} uses {{{name}}}, which is no group of its pattern ({groups})")


def _remotes(place: _Place | None) -> list[_RemoteDefinition]:
    remotes: list[_RemoteDefinition] = []
    names: set[str] = set()
    for remote_place in place.items("remotes") if place else ():
        keys = ("path", "format", "vendor")
        fields = remote_place.fields("a remote", required=("name", "host"), optional=keys)
        remote = _remote(remote_place, fields)
        if remote is not None and remote.label in names:
            fields["name"].wrong(f"remote {remote.label} is there twice")
        elif remote is not None:
            names.add(remote.label)
            remotes.append(remote)
    return remotes


def _remote(place: _Place, fields: Mapping[str, _Place]) -> _RemoteDefinition | None:
    if "name" not in fields or "host" not in fields:
        return None
    label = fields["name"].text("name of a remote")
    what = f"remote {label}"
    name = Template(label)
    paths = _paths(what, fields["path"]) if "path" in fields else ("",)
    for path in paths:
        _check_groups(f"name of {what}", name.names, _groups(path), fields["name"])
    try:
        host = host_pattern(fields["host"].texts(f"host of {what}"))
    except ValueError as e:
        fields["host"].wrong(f"{what} {e}")
        return None
    chosen = fields["format"].text(f"format of {what}") if "format" in fields else None
    vendor = fields["vendor"].text(f"vendor of {what}") if "vendor" in fields else None
    return _RemoteDefinition(name, label, host, paths, chosen, vendor, place)


def _paths(what: str, place: _Place) -> tuple[Folder, ...]:
    patterns: list[Folder] = []
    for text in place.texts(f"path of {what}"):
        try:
            patterns.append(folder(text))
        except ValueError as e:
            place.wrong(f"{what} has a path that can't be used ({e})")
    return tuple(patterns)


def _groups(path: Folder) -> set[str]:
    return set() if isinstance(path, str) else {*path.groups}


def _check_references(formats: Mapping[str, _Format], remotes: Sequence[_RemoteDefinition]) -> None:
    """What only the whole table can say: does each format exist, does a rule get its vendor."""
    for name, each in formats.items():
        other = each.other_name_of
        if other is not None and (other not in formats or formats[other].other_name_of is not None):
            each.place.wrong(f"format {name} is another name of {other}, which is no format")
    for remote in remotes:
        if remote.format is None or remote.format == ANY:
            continue
        if remote.format not in formats:
            known = ", ".join(sorted({ANY, *formats}))
            remote.place.wrong(
                f"remote {remote.label} has the format {remote.format}, expected one of {known}"
            )
        elif _wants_vendor(formats, remote.format) and not remote.knows_vendor:
            remote.place.wrong(
                f"remote {remote.label} has no vendor, which purls of its format need"
            )


def _wants_vendor(formats: Mapping[str, _Format], name: str) -> bool:
    rules = (formats.get(formats[name].other_name_of or name) or formats[name]).rules
    return any("vendor" in rule.wants for rule in rules)


def _rule_sets(formats: Mapping[str, _Format]) -> dict[str, RuleSet]:
    sets = {n: RuleSet(each.rules) for n, each in formats.items() if each.other_name_of is None}
    for name, each in formats.items():
        if each.other_name_of is not None:
            sets[name] = sets[each.other_name_of]
    every = [rule for each in formats.values() for rule in each.for_any]
    sets[ANY] = RuleSet(every, LARGE_SET_MEMORY)
    return sets

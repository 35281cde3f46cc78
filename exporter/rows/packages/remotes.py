"""Read and check YAML files of remotes. Matches no paths.

A file has two parts. `formats` defines, for each kind of registry, how paths name packages.
`remotes` defines which hosts, and which folders on them, are registries of which format. The remotes
of a user's file are tried before the shipped ones. A format in a user's file replaces the shipped
one with the same name. `configs/remotes.yaml` explains each key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import yaml

from .purl_template import PurlTemplate
from .rules import (
    ANY,
    CERTAIN,
    CONTEXT_NAMES,
    KINDS,
    LARGE_SET_BYTES,
    Folder,
    Pattern,
    Refinement,
    Remote,
    Rule,
    RuleSet,
    RuleSets,
    Template,
    host_pattern,
    parse_folder,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_PLACE = re.compile(r"%\{(\w+)\}")  # in a pattern, for a named one
# Values of a rule's key `any`, but for `unnamed`: each allows what those before it allow.
_LEVELS = ("false", "named", "folder", "true", "certain")
_UNNAMED = "unnamed"
_MAX_NAMES = 5  # in one warning
_MAX_PATTERN_DEPTH = 8  # named patterns in named patterns


class RemotesError(Exception):
    """Files of remotes are not valid. The message has one line per error, with file and line."""


def read_remotes(paths: Sequence[Path]) -> tuple[tuple[Remote, ...], tuple[str, ...]]:
    """Return the remotes of these files in the order to try them, starting with the last file.

    Also returns warnings about the files after the first one, one sentence each.

    Raises:
        RemotesError: a file can't be read or is not valid. The message lists all errors.
    """
    errors: list[str] = []
    patterns: dict[str, str] = {}
    formats: dict[str, _Format] = {}
    remotes: list[_RemoteDefinition] = []
    for path in paths:
        root = _read_file(path, patterns, errors)
        if root is not None:
            fields = root.fields("the file", optional=("formats", "remotes", "patterns"))
            _parse_patterns(fields.get("patterns"), patterns)
            own_formats = _parse_formats(fields.get("formats"))
            # The file's own formats come first, because their rules are also tried first under `any`.
            formats = own_formats | {n: f for n, f in formats.items() if n not in own_formats}
            remotes = [*_parse_remotes(fields.get("remotes")), *remotes]
    _check_references(formats, remotes)
    if errors:
        raise RemotesError("\n".join(errors))
    rule_sets = _rule_sets(formats)
    result = tuple(
        Remote(
            remote.name,
            remote.host,
            remote.folders,
            remote.format,
            rule_sets,
            remote.vendor,
            remote.is_guess,
            remote.needs_oci_response,
        )
        for remote in remotes
    )
    return result, tuple(_warnings(paths[0], formats, remotes))


class _Node(NamedTuple):
    """A YAML node that reports errors with its file and line.

    The argument `label` of the methods is the name of the node in error messages.
    """

    path: Path
    patterns: Mapping[str, str]  # by name, to use in others
    errors: list[str]
    yaml_node: yaml.Node

    def at(self, node: yaml.Node) -> _Node:
        """Return another node of the same file."""
        return self._replace(yaml_node=node)

    def report(self, sentence: str) -> None:
        """Add an error."""
        self.errors.append(f"{self.path}, line {self.yaml_node.start_mark.line + 1}: {sentence}.")

    def pairs(self, label: str) -> Iterator[tuple[str, _Node]]:
        """Yield the keys and values of a mapping; report duplicate keys."""
        if not isinstance(self.yaml_node, yaml.MappingNode):
            self.report(f"{label} must be a mapping")
            return
        seen: set[str] = set()
        for key_node, value_node in self.yaml_node.value:
            key = str(key_node.value)
            if key in seen:
                self.at(key_node).report(f"{label} has the key {key} twice")
            else:
                seen.add(key)
                yield key, self.at(value_node)

    def fields(
        self, label: str, required: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> dict[str, _Node]:
        """Return the values of the known keys of a mapping; report unknown and missing keys."""
        fields: dict[str, _Node] = {}
        known = (*required, *optional)
        for key, node in self.pairs(label):
            if key in known:
                fields[key] = node
            else:
                node.report(f"{label} has the key {key}, expected one of {', '.join(known)}")
        missing = [key for key in required if key not in fields]
        if missing and isinstance(self.yaml_node, yaml.MappingNode):
            self.report(f"{label} is missing {', '.join(missing)}")
        return fields

    def items(self, label: str) -> list[_Node]:
        """Return the items of a list."""
        if isinstance(self.yaml_node, yaml.SequenceNode):
            return [self.at(node) for node in self.yaml_node.value]
        self.report(f"{label} must be a list")
        return []

    def text(self, label: str) -> str:
        """Return a scalar as text, or report an error and return an empty text."""
        if isinstance(self.yaml_node, yaml.ScalarNode) and self.yaml_node.value:
            return str(self.yaml_node.value)
        self.report(f"{label} must be a non-empty string")
        return ""

    def pattern(self, label: str) -> str:
        """Return a scalar as text, with named patterns put in place."""
        text = self.text(label)
        for _ in range(_MAX_PATTERN_DEPTH):
            names = set(_PLACE.findall(text))
            for name in sorted(names - self.patterns.keys()):
                self.report(f"{label} uses %{{{name}}}, which is not one of patterns")
            if not names <= self.patterns.keys():
                return ""
            if not names:
                return text
            text = _PLACE.sub(lambda match: self.patterns[match[1]], text)
        self.report(f"{label} uses named patterns that contain themselves")
        return ""

    def flag(self, label: str) -> bool:
        """Return a scalar that is true or false."""
        text = self.text(label)
        if text not in {"true", "false"}:
            self.report(f"{label} is {text}, expected true or false")
        return text == "true"

    def each(self) -> list[_Node]:
        """Return the items of a list, or the node itself."""
        if isinstance(self.yaml_node, yaml.SequenceNode):
            return [self.at(node) for node in self.yaml_node.value]
        return [self]

    def texts(self, label: str) -> list[str]:
        """Return one scalar, or a list of scalars, as texts."""
        return [node.text(label) for node in self.each()]


class _Format(NamedTuple):
    rules: tuple[tuple[Rule, str], ...]  # with the value of the key `any`
    alias_of: str | None  # then it has no rules
    node: _Node

    def rules_from(self, level: str, *, unnamed: bool = False) -> tuple[Rule, ...]:
        """Return the rules that allow this level, and those that are only for unnamed hosts."""
        levels = {*_LEVELS[_LEVELS.index(level) :], *([_UNNAMED] if unnamed else [])}
        return tuple(rule for rule, allowed in self.rules if allowed in levels)


class _RemoteDefinition(NamedTuple):
    """A remote whose format is still a name."""

    name: Template
    label: str  # the name as written
    globs: tuple[str, ...]  # of hosts; none: any host
    host: str | None  # their pattern
    folders: tuple[Folder, ...]
    format: str | None
    vendor: str | None
    is_guess: bool
    needs_oci_response: bool
    node: _Node

    @property
    def has_vendor(self) -> bool:
        return self.vendor is not None or any("vendor" in _groups(f) for f in self.folders)


def _read_file(path: Path, patterns: Mapping[str, str], errors: list[str]) -> _Node | None:
    """Return the root node, or None if the file is empty or not valid."""
    try:
        root = _compose(path.read_text(encoding="utf-8"))
    except OSError as e:
        errors.append(f"{path}: can't be read ({e.strerror}).")
    except UnicodeDecodeError:
        errors.append(f"{path}: is not UTF-8 text.")
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        errors.append(f"{path}, line {line}: is not valid YAML: {e.problem}.")
    except yaml.YAMLError as e:
        errors.append(f"{path}: is not valid YAML: {' '.join(str(e).split())}.")
    else:
        return None if root is None else _Node(path, patterns, errors, root)
    return None


def _compose(text: str) -> yaml.Node | None:
    try:
        # libyaml is ten times faster. It is missing if PyYAML was built without it.
        return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return yaml.compose(text, Loader=yaml.SafeLoader)  # its messages have the better line


def _parse_patterns(node: _Node | None, patterns: dict[str, str]) -> None:
    """Add the named patterns of a file. Their text is checked where it is used."""
    for name, pattern_node in node.pairs("patterns") if node else ():
        if re.fullmatch(r"\w+", name):
            patterns[name] = pattern_node.text(f"pattern {name}")
        else:
            pattern_node.report(f"the pattern name {name} must have only letters, digits and _")


def _parse_formats(node: _Node | None) -> dict[str, _Format]:
    formats: dict[str, _Format] = {}
    for name, format_node in node.pairs("formats") if node else ():
        if name in {ANY, CERTAIN}:
            format_node.report(f"the format name {name} is reserved, expected another name")
        elif isinstance(format_node.yaml_node, yaml.ScalarNode):
            alias_of = format_node.text(f"format {name}")
            formats[name] = _Format((), alias_of, format_node)
        else:
            formats[name] = _parse_format(name, format_node)
    return formats


def _parse_format(name: str, node: _Node) -> _Format:
    rules: list[tuple[Rule, str]] = []
    if isinstance(node.yaml_node, yaml.SequenceNode) and not node.yaml_node.value:
        node.report(f"format {name} has no rules")
    for number, rule_node in enumerate(node.items(f"format {name}"), start=1):
        label = f"{name}#{number}"
        fields = rule_node.fields(
            f"rule {label}", required=("re", "kind"), optional=("then", "purl", "any")
        )
        rule = _parse_rule(label, fields)
        if rule is not None:
            rules.append((rule, _parse_any(label, fields.get("any"))))
    return _Format(tuple(rules), None, node)


def _parse_rule(label: str, fields: Mapping[str, _Node]) -> Rule | None:
    if "re" not in fields or "kind" not in fields:
        return None
    kind = fields["kind"].text(f"kind of rule {label}")
    if kind and kind not in KINDS:
        fields["kind"].report(
            f"rule {label} has the kind {kind}, expected one of {', '.join(KINDS)}"
        )
    source = fields["re"].pattern(f"re of rule {label}")
    pattern = _parse_pattern(f"rule {label}", source, fields["re"])
    if pattern is None:
        return None
    refinement = _parse_refinement(label, fields["then"], pattern) if "then" in fields else None
    groups = {*pattern.groups, *(refinement.pattern.groups if refinement else ())}
    purl = _parse_purl(label, fields["purl"], groups) if "purl" in fields else None
    required_context = purl.required - groups if purl else frozenset()
    return Rule(label, source, pattern, refinement, kind, purl, required_context)


def _parse_any(label: str, node: _Node | None) -> str:
    if node is None:
        return "true"
    text = node.text(f"any of rule {label}")
    if text not in {*_LEVELS, _UNNAMED}:
        known = ", ".join((*_LEVELS, _UNNAMED))
        node.report(f"rule {label} has any: {text}, expected one of {known}")
        return "false"
    return text


def _parse_pattern(label: str, text: str, node: _Node) -> Pattern | None:
    try:
        return Pattern(text)
    except ValueError as e:
        node.report(f"{label} has an invalid pattern ({e})")
        return None


def _parse_refinement(rule_label: str, node: _Node, rule_pattern: Pattern) -> Refinement | None:
    label = f"then of rule {rule_label}"
    fields = node.fields(label, required=("group", "re"), optional=("after", "ignore_case"))
    if "group" not in fields or "re" not in fields:
        return None
    group = fields["group"].text(f"group in {label}")
    after = Template(fields["after"].text(f"after in {label}") if "after" in fields else "")
    pattern = _parse_pattern(label, fields["re"].pattern(f"re in {label}"), fields["re"])
    ignores_case = "ignore_case" in fields and fields["ignore_case"].flag(f"ignore_case in {label}")
    _check_names(label, {group, *after.names}, set(rule_pattern.groups), node)
    return None if pattern is None else Refinement(group, after, pattern, ignores_case)


def _parse_purl(rule_label: str, node: _Node, groups: set[str]) -> PurlTemplate | None:
    label = f"purl of rule {rule_label}"
    try:
        purl = PurlTemplate(node.text(label))
    except ValueError as e:
        node.report(f"{label} is not valid: it {e}")
        return None
    _check_names(label, purl.names, groups | CONTEXT_NAMES, node)
    return purl


def _check_names(label: str, names: Iterable[str], groups: set[str], node: _Node) -> None:
    for name in sorted(names):
        if name and name not in groups:
            known = ", ".join(sorted(groups)) or "none"
            node.report(f"{label} uses {{{name}}}, which is not a group of its pattern ({known})")


def _parse_remotes(node: _Node | None) -> list[_RemoteDefinition]:
    remotes: dict[str, _RemoteDefinition] = {}
    for remote_node in node.items("remotes") if node else ():
        fields = remote_node.fields(
            "a remote",
            required=("name",),
            optional=("host", "path", "format", "vendor", "guess", "response"),
        )
        if "host" not in fields and "path" not in fields:
            remote_node.report("a remote is missing host")
            continue
        remote = _parse_remote(remote_node, fields)
        if remote is None:
            continue
        if "host" in remote.name.names:  # such a name stands for many remotes
            remotes[f"{remote.label} {len(remotes)}"] = remote
        elif remote.label in remotes:
            fields["name"].report(f"remote {remote.label} is defined twice")
        else:
            remotes[remote.label] = remote
    return list(remotes.values())


def _parse_remote(node: _Node, fields: Mapping[str, _Node]) -> _RemoteDefinition | None:
    if "name" not in fields:
        return None
    name = fields["name"].text("name of a remote")
    label = f"remote {name}"
    template = Template(name)
    folders = _parse_folders(label, fields["path"]) if "path" in fields else ("",)
    for folder in folders:
        _check_names(f"name of {label}", template.names - {"host"}, _groups(folder), fields["name"])
    host: str | None = None
    globs: tuple[str, ...] = ()
    if "host" in fields:
        globs = tuple(fields["host"].texts(f"host of {label}"))
        try:
            host = host_pattern(globs)
        except ValueError as e:
            fields["host"].report(f"{label} {e}")
            return None
    format_name = fields["format"].text(f"format of {label}") if "format" in fields else None
    vendor = fields["vendor"].text(f"vendor of {label}") if "vendor" in fields else None
    is_guess = fields["guess"].flag(f"guess of {label}") if "guess" in fields else host is None
    response = fields["response"].text(f"response of {label}") if "response" in fields else "any"
    if response not in {"any", "oci"}:
        fields["response"].report(f"{label} has response: {response}, expected oci")
    return _RemoteDefinition(
        template, name, globs, host, folders, format_name, vendor, is_guess, response == "oci", node
    )


def _parse_folders(label: str, node: _Node) -> tuple[Folder, ...]:
    folders: list[Folder] = []
    for path_node in node.each():
        try:
            folders.append(parse_folder(path_node.pattern(f"path of {label}")))
        except ValueError as e:
            path_node.report(f"{label} has an invalid path ({e})")
    return tuple(folders)


def _groups(folder: Folder) -> set[str]:
    return set() if isinstance(folder, str) else set(folder.groups)


def _check_references(formats: Mapping[str, _Format], remotes: Sequence[_RemoteDefinition]) -> None:
    """Check what depends on all files: formats must exist, and vendors must be set where needed."""
    for name, each in formats.items():
        target = each.alias_of
        if target in {None, CERTAIN}:
            continue
        if target not in formats or formats[target].alias_of is not None:
            each.node.report(
                f"format {name} refers to {target}, expected the name of a format with rules"
            )
    for remote in remotes:
        if remote.format in {None, ANY, CERTAIN}:
            continue
        if remote.format not in formats:
            known = ", ".join(sorted({ANY, CERTAIN, *formats}))
            remote.node.report(
                f"remote {remote.label} has the format {remote.format}, expected one of {known}"
            )
        elif _requires_vendor(formats, remote.format) and not remote.has_vendor:
            remote.node.report(
                f"remote {remote.label} has no vendor, which purls of its format require"
            )


def _requires_vendor(formats: Mapping[str, _Format], name: str) -> bool:
    target = formats.get(formats[name].alias_of or name)  # None: an alias of an unknown format
    return target is not None and any("vendor" in rule.required_context for rule, _ in target.rules)


def _warnings(
    shipped: Path, formats: Mapping[str, _Format], remotes: Sequence[_RemoteDefinition]
) -> Iterator[str]:
    """Find the mistakes of a user's remotes that leave them, or others, without effect."""
    for index, remote in enumerate(remotes):
        if remote.node.path == shipped:
            return
        place = f"{remote.node.path}, line {remote.node.yaml_node.start_mark.line + 1}"
        hidden = _hidden_by(remote, remotes[index + 1 :])
        if hidden:
            yield (
                f"{place}: remote {remote.label} covers the whole host, so that these remotes after it "
                f"are not tried there: {', '.join(hidden)}. Give it a path, or put it after them."
            )
        known = formats.get(remote.format or "")
        is_oci = "oci" in {remote.format, known.alias_of if known else None}
        for folder in remote.folders if is_oci else ():
            if isinstance(folder, str) and folder.endswith("/v2"):
                yield (
                    f"{place}: remote {remote.label} never matches, because the format oci expects /v2 "
                    f"after the path. Leave it out of the path {folder}."
                )


def _hidden_by(remote: _RemoteDefinition, later: Iterable[_RemoteDefinition]) -> list[str]:
    """Return names of later remotes, with another format, for whose host this one is tried first."""
    if "" not in remote.folders or remote.is_guess or remote.host is None:
        return []
    hidden = []
    for each in later:
        is_same = (each.format, each.folders) == (remote.format, ("",))
        is_vague = each.host is None or each.is_guess or "host" in each.name.names
        if is_same or is_vague:
            continue
        if _may_match_same_host(remote, each):
            hidden.append(each.label)
    if len(hidden) > _MAX_NAMES:
        hidden[_MAX_NAMES:] = [f"and {len(hidden) - _MAX_NAMES} others"]
    return hidden


def _may_match_same_host(first: _RemoteDefinition, second: _RemoteDefinition) -> bool:
    """Whether an example of one's hosts is a host of the other."""
    return any(
        re.search(pattern or "", _example(glob)) is not None
        for globs, pattern in ((first.globs, second.host), (second.globs, first.host))
        for glob in globs
    )


def _example(glob: str) -> str:
    """Return a host:port that a glob matches."""
    name = glob.replace("**", "x.x").replace("*", "x")
    return name if re.search(r":\d+$", name) and name.count(":") == 1 else f"{name}:443"


def _rule_sets(formats: Mapping[str, _Format]) -> RuleSets:
    """Make the rule sets of each format, of its aliases, of `any` and of `certain`."""

    def by_format(level: str) -> dict[str, RuleSet]:
        sets = {n: RuleSet(f.rules_from(level)) for n, f in formats.items() if f.alias_of is None}
        aliases = {n: f.alias_of for n, f in formats.items() if f.alias_of is not None}
        sets |= common
        return sets | {name: sets[target] for name, target in aliases.items()}

    def of_all(level: str, *, unnamed: bool = False) -> RuleSet:
        rules = [r for f in formats.values() for r in f.rules_from(level, unnamed=unnamed)]
        return RuleSet(rules, LARGE_SET_BYTES)

    common = {ANY: of_all("folder"), CERTAIN: of_all("certain", unnamed=True)}
    sets = RuleSets(
        by_format("false"), of_all("true", unnamed=True), by_format("named"), by_format("folder")
    )
    for each in (*sets.by_format.values(), sets.any_at_root):
        _ = each.patterns  # the others have fewer, so that they can't be too large
    return sets

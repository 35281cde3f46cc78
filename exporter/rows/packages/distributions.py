"""Names of distributions in folders and repositories, and the vendors that Package URLs have for them.

A Package URL of a deb, rpm, apk or alpm package must have its vendor (purl-spec, types/*.json), and a
mirror has it only in the name of a folder or a repository: `rockylinux`, `apt-ubuntu-jammy`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

# By type and vendor: the words for its packages, in lower case and without the release after them.
_WORDS = {
    "deb": {
        "debian": "debian",
        "kali": "kali",
        "linuxmint": "linuxmint",
        "raspbian": "raspbian raspberrypi",
        "ubuntu": "ubuntu",
    },
    "rpm": {
        "almalinux": "almalinux alma",
        "amzn": "al2 al2023 amazonlinux amzn",
        "centos": "centos centosstream",
        "fedora": "fedora epel",
        "opensuse": "opensuse",
        "oracle": "ol7 ol8 ol9 ol10 oraclelinux",
        "redhat": "redhat rhel ubi",
        "rocky": "rocky rockylinux",
    },
    "apk": {"alpine": "alpine alpinelinux", "wolfi": "wolfi"},
    "alpm": {
        "arch": "arch archlinux",
        "archarm": "archlinuxarm",
        "manjaro": "manjaro",
        "msys": "msys msys2",
    },
}
# Releases that are called by a name alone. Other projects use these words as well, so that all other
# words of the name must be neutral.
_RELEASES = {
    "deb": {
        "debian": "stretch buster bullseye bookworm trixie forky sid",
        "ubuntu": "trusty xenial bionic focal jammy noble oracular plucky questing",
    },
    "rpm": {"opensuse": "leap tumbleweed"},
}
_NEUTRAL = """
    aarch amd apt archive arm backports cache contrib deb dists free group i lts main mirror multiverse non
    os oss proxy release remote repo restricted rpm security universe update updates upstream virtual x yum
"""
# Packages of others for a distribution, or of the company itself.
_OTHERS = """
    artifactory ceph chef chrome clickhouse cloudera cni confluent copr cran cri cuda custom datadog
    deadsnakes docker dotnet elastic elasticsearch elrepo envoy falco gitea github gitlab google grafana
    hashicorp helm hosted icinga influx influxdata inhouse internal ius jenkins k8s kafka kubernetes llvm
    local mariadb microsoft mongo mongodb mssql mysql neo4j newrelic nginx node nodejs nodesource nvidia
    oneapi ondrej opensearch openresty openstack own percona pgdg php postgres postgresql ppa private
    puppet python r rabbitmq redis remi ros rpmfusion salt saltstack steam sury tailscale terraform third
    thirdparty varnish virtualbox vscode wine zabbix
"""
_EPEL = "epel"  # for RHEL and its relatives, whose name often stands beside it

# Folders on mirrors that have packages of others.
_FOLDERS = {
    "docker-ce": "docker",
    "elasticstack": "elastic",
    "gitlab-ce": "gitlab",
    "gitlab-ee": "gitlab",
    "llvm-apt": "llvm",
}

_NEUTRAL_WORDS = frozenset(_NEUTRAL.split())
_OTHER_WORDS = frozenset(_OTHERS.split())
_VENDORS = _FOLDERS | {
    word: vendor
    for vendors in _WORDS.values()
    for vendor, words in vendors.items()
    for word in words.split()
}


def vendor_of(name: str) -> str:
    """Return the vendor for the name of a distribution, such as a folder's; other names in lower case."""
    return _VENDORS.get(name.lower(), name.lower())


@lru_cache(1024)  # repositories
def vendor_of_repository(name: str, purl_type: str) -> str | None:
    """Return the vendor of the packages of this type in a repository, such as apt-ubuntu-jammy.

    None: its name does not say it, says two, or names somebody else's packages for a distribution.
    Only the words before a slash can say it, because Acme/rocky has packages of Acme.
    """
    if not _OTHER_WORDS.isdisjoint(_without_releases(_words(name))):
        return None
    words = _words(name.partition("/")[0])
    plain = _without_releases(words)
    pairs = map("".join, pairwise(plain))  # amazon-linux
    found = _named(_WORDS, [*words, *plain, *pairs], purl_type)
    if not found and all(
        word in _NEUTRAL_WORDS or not word.isalpha() or _named(_RELEASES, [word], purl_type)
        for word in plain
    ):
        found = _named(_RELEASES, plain, purl_type)
    if _EPEL in plain:
        found &= {"fedora"}
    return found.pop() if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _without_releases(words: list[str]) -> list[str]:
    """Remove the number of a release after each word, as in debian12."""
    return [re.sub(r"(?<=[a-z])\d+$", "", word) for word in words]


def _named(table: dict[str, dict[str, str]], words: list[str], purl_type: str) -> set[str]:
    vendors = table.get(purl_type, {})
    return {vendor for vendor, names in vendors.items() if not set(words).isdisjoint(names.split())}

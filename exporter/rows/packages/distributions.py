"""Names of distributions in folders and repositories, and the vendors that Package URLs have for them.

A Package URL of a deb, rpm, apk or alpm package must have its vendor (purl-spec, types/*.json). On a
mirror, only the name of a folder or a repository tells it: `rockylinux`, `apt-ubuntu-jammy`.
"""

from __future__ import annotations

import re
from functools import lru_cache

# By type and vendor: words for its packages, in lower case; a number after them is that of a release.
_WORDS = {
    "deb": {
        "debian": "debian stretch buster bullseye bookworm trixie forky sid",
        "devuan": "devuan",
        "kali": "kali",
        "linuxmint": "linuxmint",
        "raspbian": "raspbian raspberrypi",
        "ubuntu": "ubuntu trusty xenial bionic focal jammy noble oracular plucky questing",
    },
    "rpm": {
        "almalinux": "almalinux alma",
        "amzn": "al2 al2023 amazonlinux amzn",
        "centos": "centos centosstream",
        "fedora": "fedora epel",
        "mageia": "mageia",
        "openeuler": "openeuler",
        "opensuse": "opensuse leap tumbleweed",
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
# Words that say nothing of whose packages a repository has. Any other word may be the name of somebody
# who has packages for a distribution: docker-ubuntu, debian-acme.
_NEUTRAL = """
    aarch all amd apk appstream apt archive arm backports base baseos cache cached cdn com community contrib
    core crb deb debs dist dists dnf edge el everything external extra extras for free ftp full group http
    https i linux lts main mirror mirrors multiverse net noarch non nonfree official org os oss pacman pkg
    pkgs pool ports powertools proxied proxy pub public raw rawhide remote repo repos repositories repository
    restricted rolling rpm rpms security server snapshot snapshots stable stream sync testing universe
    unstable update updates upstream vault virtual x yum
    au br ca ch cn de eu fr in it jp kr nl ru se sg uk us
"""
# Folders on mirrors that have packages of others.
_FOLDERS = {
    "docker-ce": "docker",
    "elasticstack": "elastic",
    "gitlab-ce": "gitlab",
    "gitlab-ee": "gitlab",
    "llvm-apt": "llvm",
}
_EPEL = "epel"  # for RHEL and its relatives, whose name often stands beside it

_VENDORS_BY_TYPE = {
    purl_type: {word: vendor for vendor, words in vendors.items() for word in words.split()}
    for purl_type, vendors in _WORDS.items()
}
_VENDORS = {
    name: vendor
    for vendors in (*_VENDORS_BY_TYPE.values(), _FOLDERS)
    for name, vendor in vendors.items()
}
_NEUTRAL_WORDS = frozenset(_NEUTRAL.split())
# JFrog's convention for names: what, the type of packages, and where they are from (ubuntu-debian-remote).
_ARTIFACTORY_TYPE = re.compile(r"[-_.]debian[-_.](?:federated|remote|virtual)\b")
_TWO_WORDS = re.compile(r"(amazon|oracle)[-_.](linux)|(red)[-_.](hat)|(linux)[-_.](mint)")


def vendor_of(name: str) -> str:
    """Return the vendor for the name of a distribution, such as a folder's; other names in lower case."""
    return _VENDORS.get(name.lower(), name.lower())


@lru_cache(1024)  # repositories
def vendor_of_repository(name: str, purl_type: str) -> str | None:
    """Return the vendor of the packages of this type in a repository, such as apt-ubuntu-jammy.

    None: its name does not say it, says two, or has a word that may be the name of somebody else.
    """
    vendors = _VENDORS_BY_TYPE.get(purl_type, {})
    found: set[str] = set()
    text = _TWO_WORDS.sub(lambda match: "".join(filter(None, match.groups())), name.lower())
    words = re.findall(r"[^\W_]+", text)
    for word in words:
        plain = word.rstrip("0123456789")
        vendor = vendors.get(word) or vendors.get(plain)
        if vendor is not None:
            found.add(vendor)
        elif plain and plain not in _NEUTRAL_WORDS:
            return None
    if any(word.startswith(_EPEL) for word in words):
        found &= {"fedora"}
    if len(found) > 1 and _ARTIFACTORY_TYPE.search(text):
        found.discard("debian")
    return found.pop() if len(found) == 1 else None

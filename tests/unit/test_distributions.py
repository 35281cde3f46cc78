"""The vendor of a distribution's packages, from the name of a repository."""

from __future__ import annotations

import pytest

from exporter.rows.packages.distributions import vendor_of, vendor_of_repository


@pytest.mark.parametrize(
    ("name", "purl_type", "vendor"),
    [
        ("debian", "deb", "debian"),
        ("Debian_12", "deb", "debian"),
        ("debian12-proxy", "deb", "debian"),
        ("security.debian", "deb", "debian"),
        ("ubuntu22.04-main", "deb", "ubuntu"),
        ("ubuntu", "rpm", None),  # no packages of this type
        ("raspbian-mirror", "deb", "raspbian"),
        ("team-raspbian", "deb", None),  # anybody's packages for it
        ("jammy-security", "deb", "ubuntu"),
        ("bookworm", "deb", "debian"),
        ("acme-bookworm", "deb", None),  # not Debian's word alone
        ("ubuntu-debian-remote", "deb", "ubuntu"),  # a convention for Artifactory
        ("debian-virtual", "deb", "debian"),
        ("ubuntu-rc", "deb", None),
        ("alpine-release", "apk", None),
        ("debian-ubuntu", "deb", None),  # either
        ("us-archive-ubuntu-net", "deb", "ubuntu"),
        ("centos-fedora", "rpm", None),
        ("epel-8-centos", "rpm", "fedora"),
        ("docker-ce-debian", "deb", None),  # packages of Docker for Debian
        ("debian-local", "deb", None),  # the company's own
        ("rhel-9-for-x86_64-baseos-rpms", "rpm", "redhat"),
        ("rhel_misc", "rpm", None),
        ("red-hat-9", "rpm", "redhat"),
        ("amzn2-core", "rpm", "amzn"),
        ("amazonlinux-2023", "rpm", "amzn"),
        ("amazon-linux-2", "rpm", "amzn"),
        ("al2023", "rpm", "amzn"),
        ("ol9-baseos", "rpm", "oracle"),
        ("leap156-oss", "rpm", "opensuse"),
        ("bookworm-amd64", "deb", "debian"),
        ("el9", "rpm", None),  # RHEL and everything made from it
        ("alma_9", "rpm", "almalinux"),
        ("any-arch", "rpm", None),
        ("full-arch", "alpm", "arch"),
        ("alpine-remote", "apk", "alpine"),
        ("Rocky_Linux_9/BaseOS", "rpm", "rocky"),
        ("Acme/rocky", "rpm", None),
        ("CentOS/docker-ce", "rpm", None),
        ("", "deb", None),
    ],
)
def test_vendor_of_repository(name: str, purl_type: str, vendor: str | None) -> None:
    assert vendor_of_repository(name, purl_type) == vendor


@pytest.mark.parametrize(
    ("name", "vendor"),
    [("archlinux", "arch"), ("EPEL", "fedora"), ("rockylinux", "rocky"), ("Acme", "acme")],
)
def test_vendor_of_folder(name: str, vendor: str) -> None:
    assert vendor_of(name) == vendor

"""Several hosts in a connection string: the one that works gets its chance, whatever the others do."""

from __future__ import annotations

import itertools
import shutil
import socket
import threading
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import SettingsError, check_dsn
from exporter.postgres.connection import connect
from exporter.postgres.dsn import connection_string
from exporter.settings import DatabaseSettings
from exporter.write.database import Database, DatabaseUnavailable
from tests.support.postgres import Postgres, available
from tests.support.relay import Relay
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.slow

_COUNT = "SELECT count(*) FROM access_log"
_UNRESOLVABLE = "no-such-host.invalid"
_FAULTS = ("deaf", "refused", "unresolvable")
# The good host at each place among one to three hosts with different faults, in every order.
_ORDERS = [
    (*others[:place], "good", *others[place:])
    for count in range(len(_FAULTS) + 1)
    for others in itertools.permutations(_FAULTS, count)
    for place in range(count + 1)
]


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        yield deaf.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def with_hosts(dsn: str, hosts: list[tuple[str, int]]) -> str:
    """The connection string with other hosts and ports."""
    names, ports = ",".join(h for h, _ in hosts), ",".join(str(p) for _, p in hosts)
    kept = [part for part in dsn.split(" ") if not part.startswith(("host=", "port="))]
    return " ".join((f"host={names}", f"port={ports}", *kept))


def parameters_of(connection: psycopg.Connection[tuple[object, ...]]) -> dict[str, str]:
    """What libpq used for this connection."""
    return {o.keyword.decode(): o.val.decode() for o in connection.pgconn.info if o.val is not None}


@pytest.mark.parametrize("order", _ORDERS, ids=",".join)
def test_good_host_is_reached_wherever_it_stands_in_the_list(
    dsn: str,
    query: Query,
    postgres: Postgres,
    deaf_port: int,
    closed_port: int,
    order: tuple[str, ...],
) -> None:
    hosts = {
        "good": ("127.0.0.1", postgres.port),
        "deaf": ("127.0.0.1", deaf_port),
        "refused": ("127.0.0.1", closed_port),
        "unresolvable": (_UNRESOLVABLE, postgres.port),
    }
    several = with_hosts(dsn, [hosts[name] for name in order])
    database = Database(DatabaseSettings(dsn=several, connect_seconds=2.0))
    assert database.write([make_entry(1)]) == []  # at the first attempt
    database.close()
    assert query(_COUNT) == [(1,)]


@pytest.mark.parametrize("deaf_hosts", [1, 2, 3, 7])
def test_deaf_hosts_in_front_leave_time_for_the_last_one(
    dsn: str, postgres: Postgres, deaf_port: int, deaf_hosts: int
) -> None:
    hosts = [("127.0.0.1", deaf_port)] * deaf_hosts + [("127.0.0.1", postgres.port)]
    started = time.monotonic()
    with connect(with_hosts(dsn, hosts), DatabaseSettings(connect_seconds=2.0)) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert time.monotonic() - started < 1.5


def test_host_behind_one_that_fails_starts_at_once(
    dsn: str, postgres: Postgres, deaf_port: int, closed_port: int
) -> None:
    ports = (closed_port, closed_port, deaf_port, closed_port, postgres.port)
    started = time.monotonic()
    with connect(
        with_hosts(dsn, [("127.0.0.1", port) for port in ports]),
        DatabaseSettings(connect_seconds=12.0),
    ) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert (
        time.monotonic() - started < 4.5
    )  # the deaf one is followed after 3 s, the others at once


def test_slow_host_behind_deaf_ones_gets_half_of_the_time(
    dsn: str, postgres: Postgres, deaf_port: int
) -> None:
    """It needs more than a third of the time, and less than half."""
    with Relay(("127.0.0.1", postgres.port)) as relay:
        relay.delay(0.25)  # a login and the first query take six times as long, and more
        hosts = [("127.0.0.1", deaf_port), ("127.0.0.1", deaf_port), relay.address]
        with connect(
            with_hosts(dsn, hosts) + " sslmode=disable", DatabaseSettings(connect_seconds=4.0)
        ) as connection:
            relay.mend()
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_slow_host_in_front_is_not_given_up_for_a_deaf_one(
    dsn: str, postgres: Postgres, deaf_port: int
) -> None:
    with Relay(("127.0.0.1", postgres.port)) as relay:
        relay.delay(0.4)
        hosts = [relay.address, ("127.0.0.1", deaf_port), ("127.0.0.1", deaf_port)]
        with connect(
            with_hosts(dsn, hosts) + " sslmode=disable", DatabaseSettings(connect_seconds=3.0)
        ) as connection:
            relay.mend()
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_host_that_logs_in_and_then_goes_deaf_is_passed_over(dsn: str, postgres: Postgres) -> None:
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        relay.swallow_from_message("to_server", 1)  # after the startup message
        several = with_hosts(dsn, [relay.address, ("127.0.0.1", postgres.port)])
        with connect(
            f"{several} sslmode=disable", DatabaseSettings(connect_seconds=2.0)
        ) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert relay.struck


def test_second_address_of_a_name_is_tried_although_the_first_is_deaf(
    dsn: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo

    def two_addresses(host: str, *arguments: object, **options: object) -> list[object]:
        addresses = ["127.0.0.2", "127.0.0.1"] if host == "db.example" else [host]
        return [a for address in addresses for a in look_up(address, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    with socket.create_server(("127.0.0.2", postgres.port)):
        named = with_hosts(dsn, [("db.example", postgres.port)])
        started = time.monotonic()
        with connect(named, DatabaseSettings(connect_seconds=2.0)) as connection:
            assert parameters_of(connection)["hostaddr"] == "127.0.0.1"
            assert parameters_of(connection)["host"] == "db.example"
        assert time.monotonic() - started < 1.5


def test_name_that_takes_for_ever_to_look_up_does_not_hold_up_the_next_host(
    dsn: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    look_up = socket.getaddrinfo

    def slow(host: str, *arguments: object, **options: object) -> object:
        if host == "slow.example":
            answer.wait(30)
        return look_up(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    hosts = [("slow.example", postgres.port), ("127.0.0.1", postgres.port)]
    with connect(with_hosts(dsn, hosts), DatabaseSettings(connect_seconds=2.0)) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    answer.set()


def test_failure_names_what_each_host_did(dsn: str, deaf_port: int, closed_port: int) -> None:
    hosts = [("127.0.0.1", deaf_port), ("127.0.0.1", closed_port), (_UNRESOLVABLE, 5432)]
    database = Database(DatabaseSettings(dsn=with_hosts(dsn, hosts), connect_seconds=0.5))
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable) as caught:
        database.open()
    assert time.monotonic() - started < 1.2
    reason = str(caught.value)
    assert f"127.0.0.1:{deaf_port} did not answer in time" in reason
    assert f"port {closed_port} failed: Connection refused" in reason
    assert _UNRESOLVABLE in reason


def test_failed_attempts_leave_no_socket_and_no_thread(
    dsn: str, postgres: Postgres, deaf_port: int
) -> None:
    """Checked by the fixture no_leaks; each attempt ends with the hosts that it did not need."""
    hosts = [("127.0.0.1", deaf_port)] * 3 + [("127.0.0.1", postgres.port)]
    for _ in range(3):
        connect(with_hosts(dsn, hosts), DatabaseSettings(connect_seconds=1.0)).close()
    nowhere = with_hosts(dsn, hosts[:3])
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable):
            Database(DatabaseSettings(dsn=nowhere, connect_seconds=0.3)).open()


# What the connection string, the service file and the PG* variables say, holds.


def test_users_connect_timeout_holds_for_each_host(deaf_port: int) -> None:
    deaf = with_hosts("connect_timeout=2", [("127.0.0.1", deaf_port)] * 2)
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        Database(DatabaseSettings(dsn=deaf, connect_seconds=60.0)).open()
    assert 3.5 < time.monotonic() - started < 6


def test_settings_of_a_service_file_are_not_overridden(
    postgres: Postgres,
    deaf_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "pg_service.conf"
    lines = [
        "[logs]",
        f"host=127.0.0.1,127.0.0.1\nport={deaf_port},{postgres.port}",
        "user=postgres\ndbname=postgres",
        "application_name=from-the-service\nconnect_timeout=3",
        "keepalives_idle=77\ntcp_user_timeout=4321",
        "options=-c tcp_keepalives_count=7",
    ]
    file.write_text("\n".join(lines))
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with connect("service=logs", DatabaseSettings(connect_seconds=2.0)) as connection:
        found = parameters_of(connection)
        assert (found["port"], found["connect_timeout"]) == (str(postgres.port), "3")
        assert (found["keepalives_idle"], found["tcp_user_timeout"]) == ("77", "4321")
        assert found["keepalives_count"] == "2"  # ours
        assert connection.execute("SHOW application_name").fetchone() == ("from-the-service",)
        assert connection.execute("SHOW tcp_keepalives_count").fetchone() == ("7",)
        assert connection.execute("SHOW tcp_keepalives_interval").fetchone() == ("5",)  # ours


def test_settings_of_variables_are_not_overridden(
    postgres: Postgres, deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": "127.0.0.1,127.0.0.1",
        "PGPORT": f"{deaf_port},{postgres.port}",
        "PGAPPNAME": "from-a-variable",
        "PGCONNECT_TIMEOUT": "4",
        "PGOPTIONS": "-c client_connection_check_interval=9s",
    }.items():
        monkeypatch.setenv(name, value)
    with connect(
        "user=postgres dbname=postgres", DatabaseSettings(connect_seconds=2.0)
    ) as connection:
        assert parameters_of(connection)["connect_timeout"] == "4"
        assert connection.execute("SHOW application_name").fetchone() == ("from-a-variable",)
        assert connection.execute("SHOW client_connection_check_interval").fetchone() == ("9s",)


def test_settings_of_the_role_are_not_overridden(postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE patient SUPERUSER LOGIN")
        admin.execute("ALTER ROLE patient SET tcp_keepalives_idle = 99")
        try:
            dsn = postgres.dsn().replace("user=postgres", "user=patient")
            with connect(dsn, DatabaseSettings()) as connection:
                assert connection.execute("SHOW tcp_keepalives_idle").fetchone() == ("99",)
        finally:
            admin.execute("DROP ROLE patient")


def test_unknown_service_is_reported(dsn: str) -> None:
    with pytest.raises(DatabaseUnavailable, match='service "nowhere" not found'):
        Database(DatabaseSettings(dsn=f"{dsn} service=nowhere")).open()


def test_wrong_number_of_ports_is_reported() -> None:
    wrong = "host=127.0.0.1,127.0.0.1 port=1,2,3"
    with pytest.raises(DatabaseUnavailable, match="could not match 3 port numbers to 2 hosts"):
        Database(DatabaseSettings(dsn=wrong)).open()


def test_addresses_without_names_and_one_port_for_all(postgres: Postgres) -> None:
    with socket.create_server(("127.0.0.2", postgres.port)):
        several = f"hostaddr=127.0.0.2,127.0.0.1 port={postgres.port} user=postgres dbname=postgres"
        with connect(several, DatabaseSettings(connect_seconds=2.0)) as connection:
            assert parameters_of(connection)["hostaddr"] == "127.0.0.1"
        named = several.replace("hostaddr=", "host=one.invalid,two.invalid hostaddr=")
        with connect(named, DatabaseSettings(connect_seconds=2.0)) as connection:
            assert parameters_of(connection)["host"] == "two.invalid"


def test_load_balance_hosts_uses_all_hosts(dsn: str, postgres: Postgres) -> None:
    with Relay(("127.0.0.1", postgres.port)) as one, Relay(("127.0.0.1", postgres.port)) as two:
        several = with_hosts(dsn, [one.address, two.address]) + " load_balance_hosts=random"
        for _ in range(30):
            connect(several, DatabaseSettings()).close()
        assert one.accepted
        assert two.accepted
        assert one.accepted + two.accepted == 30


@pytest.fixture(scope="module")
def standby() -> Iterator[Postgres]:
    """A server in recovery, which takes no writes."""
    with Postgres(available()["18"]) as server:
        server.stop("fast")
        signal = server.data / "standby.signal"
        signal.touch()
        shutil.chown(signal, server.data.stat().st_uid)
        server.start()
        yield server


@pytest.mark.parametrize(
    ("wanted", "in_recovery"),
    [
        ("any", True),
        ("read-write", False),
        ("primary", False),
        ("standby", True),
        ("prefer-standby", True),
    ],
)
@pytest.mark.parametrize("standby_first", [True, False])
@pytest.mark.not_on_citus("its standby is not one of the cluster")
def test_target_session_attrs_decides_among_the_hosts(
    postgres: Postgres,
    standby: Postgres,
    deaf_port: int,
    wanted: str,
    *,
    in_recovery: bool,
    standby_first: bool,
) -> None:
    both = [("127.0.0.1", standby.port), ("127.0.0.1", postgres.port)]
    hosts = both if standby_first else both[::-1]
    if wanted == "any":
        in_recovery = standby_first
    several = with_hosts(postgres.dsn(), [*hosts, ("127.0.0.1", deaf_port)])
    with connect(
        f"{several} target_session_attrs={wanted}", DatabaseSettings(connect_seconds=4.0)
    ) as connection:
        assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (in_recovery,)


@pytest.mark.parametrize("source", ["string", "variable"])
def test_prefer_standby_takes_a_primary_if_there_is_no_standby(
    postgres: Postgres,
    deaf_port: int,
    closed_port: int,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = [("127.0.0.1", port) for port in (deaf_port, closed_port, postgres.port)]
    several = with_hosts(postgres.dsn(), hosts)
    if source == "string":
        several += " target_session_attrs=prefer-standby"
    else:
        monkeypatch.setenv("PGTARGETSESSIONATTRS", "prefer-standby")
    with connect(several, DatabaseSettings(connect_seconds=2.0)) as connection:
        assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)


def test_only_what_the_user_leaves_open_gets_our_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    file.write_text("[logs]\nhost=db.example\nconnect_timeout=9\nkeepalives_idle=77\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    ours = connection_string("service=logs", DatabaseSettings())
    assert "connect_timeout" not in ours
    assert "keepalives_idle" not in ours
    assert "application_name=artifactapi" in ours
    monkeypatch.setenv("PGAPPNAME", "mine")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    ours = connection_string("dbname=x", DatabaseSettings())
    assert "application_name" not in ours
    assert "connect_timeout" not in ours
    monkeypatch.setenv("PGSERVICE", "logs")
    assert "keepalives_idle" not in connection_string("dbname=x", DatabaseSettings())
    assert "keepalives_idle=5" in connection_string("keepalives_idle=5", DatabaseSettings())


def test_unresolvable_host_is_named() -> None:
    with pytest.raises(psycopg.OperationalError, match=r"'nowhere\.invalid' cannot be resolved"):
        connect("host=nowhere.invalid", DatabaseSettings())


# Sockets, and names that look like mistakes.


def test_sockets_are_hosts_too(postgres: Postgres, closed_port: int) -> None:
    folder = str(postgres.folder)
    for hosts in ([folder], ["localhost", folder], [folder, "localhost"]):
        ports = [postgres.port if host == folder else closed_port for host in hosts]
        several = with_hosts(postgres.dsn(), list(zip(hosts, ports, strict=True)))
        check_dsn(several)
        with connect(several, DatabaseSettings()) as connection:
            assert parameters_of(connection)["host"] == folder


def test_abstract_sockets_are_hosts_too() -> None:
    with Postgres(available()["18"]) as server:
        server.stop("fast")
        name = f"@artifactapi-test-{server.port}"
        server.configure(unix_socket_directories=f"'{name}'")
        server.start()
        for hosts in (name, f"{_UNRESOLVABLE},{name}"):
            dsn = f"host={hosts} port={server.port} user=postgres dbname=postgres"
            check_dsn(dsn)
            with connect(dsn, DatabaseSettings()) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)


def test_database_name_with_an_at_sign(postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute('CREATE DATABASE "logs@corp"')
        try:
            for dsn in (
                postgres.dsn("logs@corp"),
                f"postgresql://postgres@127.0.0.1:{postgres.port}/logs@corp",
                f"postgresql://127.0.0.1:{postgres.port}/logs%40corp?user=postgres",
            ):
                check_dsn(dsn)
                with connect(dsn, DatabaseSettings()) as connection:
                    assert connection.info.dbname == "logs@corp"
        finally:
            admin.execute('DROP DATABASE "logs@corp"')


@pytest.mark.parametrize(
    "dsn",
    [
        "host=localhost,/run/postgresql",
        "host=/run/postgresql,localhost dbname=me@corp",
        "host=@abstract",
        "host=@abstract,db1,/run port=1,,3",
        "host=a,b port=,",
        "host=h user=me@corp password=a/b@c dbname=x/y",
        "postgresql://%2Frun%2Fpostgresql/x",
        "postgresql://%40abstract/x",
        "postgresql:///x?host=@abstract",
        "postgresql:///x?host=localhost,/run/postgresql",
        "postgresql://me%40corp:p%2Fw@h1:1,h2:2/a%40b",
        "postgresql://me:pass@h/logs@corp",
        "postgresql://me:pass?word@h/logs",
        "postgres://h?host=/run/postgresql",
        "postgresql://h/x?options=-csearch_path%3Da&user=me@corp",
        "postgresql://u:p%40ss@h1:5432,h2:5433/x?application_name=a@b",
    ],
)
def test_connection_strings_with_sockets_lists_and_at_signs_are_accepted(dsn: str) -> None:
    check_dsn(dsn)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://boss:pa/s3cret@127.0.0.1:55491/logs",
        "postgresql://boss:pa@s3cret@127.0.0.1/logs",
        "postgresql://boss:pa@s3/cret@127.0.0.1/logs",
        "postgresql://boss:pa@s3/cret@127.0.0.1:5432",
        "postgresql://boss:pa@s3cret@h/x",
        "postgresql://boss:1/s3cret@h/logs",
        "postgresql://boss:1/s3cret@h",
        "postgres://boss:pa/s3cret@h?sslmode=require",
        "host=h port=s3cret",
    ],
)
def test_passwords_with_unencoded_signs_are_still_refused(dsn: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_dsn(dsn)
    assert "s3cret" not in str(caught.value)

"""Credentials against a server that wants them (SCRAM): every way, changes under load, and that nothing shows them.

What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pwd
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import pytest

from shmpool import Pool
from shmpool.credentials import Lookup
from shmpool.names import SHM_DIR, Names
from shmpool.observation import observe
from shmpool.opening import REFUSED_PAUSE_S
from shmpool.states import Health, Verdict
from shmpool.status import EndpointReport
from shmpool_coordinator.config import parse, warnings_of
from shmpool_coordinator.probe import Probe
from tests.support.coordinator import CoordinatorProcess, endpoint_keys, pool_config, running_coordinator
from tests.support.load import fork_worker, run_thread
from tests.support.pools import endpoint_settings
from tests.support.postgres import require_postgres
from tests.support.secrets import is_shown
from tests.support.translating import translating
from tests.support.waiting import wait_until
from tests.support.workers import (
    PROBE,
    backend,
    end_session,
    is_ready,
    is_whole,
    lease_of,
    one_value,
    pool_of,
    read_line,
    sessions,
    worker,
)
from tools.pg_cluster import Cluster, Server

ROLE, OTHER_ROLE = "app", "app_b"
LOCKED = f"host all {ROLE},{OTHER_ROLE} 127.0.0.1/32 scram-sha-256\n"
GROUP = 'connections = 4\ntarget = "primary"\nautocommit = true\nper_worker_max = 4\ntimeout = "10s"'


def set_password(server: Server, role: str, password: str) -> None:
    """Change a role's password at the server."""
    server.execute(f"ALTER ROLE {role} PASSWORD '{password}'")


def replace(file: Path, content: str) -> None:
    """Put another file in the place of one, at once."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(content)
    fresh.chmod(0o600)
    os.replace(fresh, file)


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server that lets two roles in by password only; the superuser needs none."""
    require_postgres()
    with Cluster() as servers:
        server = servers.primary
        for role in (ROLE, OTHER_ROLE):
            server.execute(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_stats, pg_signal_backend")
        rules = server.data / "pg_hba.conf"
        rules.write_text(LOCKED + rules.read_text())
        server.execute("SELECT pg_reload_conf()")
        wait_until(lambda: server.execute(f"SELECT 1 FROM pg_hba_file_rules WHERE '{ROLE}' = ANY (user_name)"))
        wait_until(lambda: not _lets_in(server), what="the server wants a password")
        yield server


def _lets_in(server: Server) -> bool:
    try:
        psycopg2.connect(server.conninfo(user=ROLE)).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.fixture
def password(locked: Server) -> str:
    """The password of both roles, one of this test alone."""
    secret = f"geheim-{os.urandom(6).hex()}"
    for role in (ROLE, OTHER_ROLE):
        set_password(locked, role, secret)
    return secret


@pytest.fixture
def file(tmp_path: Path, password: str) -> Path:
    """A file that holds it."""
    path = tmp_path / "password"
    replace(path, f"{password}\n")
    return path


def config_of(pool: str, server: Server, credentials: str, group: str = GROUP, **conninfo: str) -> str:
    """Return the configuration of a pool with one endpoint and one group."""
    endpoints = {"pg1": endpoint_keys(server.conninfo(user=ROLE, **conninfo)), "pg1.credentials": credentials}
    return pool_config(pool, endpoints, {"work": group}, PROBE)


@pytest.fixture
def config(locked: Server, pool_name: str, file: Path) -> str:
    """The configuration of a pool whose password is in the file."""
    return config_of(pool_name, locked, f'password_file = "{file}"')


@contextmanager
def coordinated(pool: str, config: str, *arguments: str) -> Iterator[CoordinatorProcess]:
    """A coordinator that has found its endpoint UP."""
    with running_coordinator(config, pool, *arguments) as process:
        wait_until(lambda: is_ready(pool), within=10, what=lambda: process.log)
        yield process


@contextmanager
def served(pool: str, config: str, lookup: Lookup | None = None) -> Iterator[Pool]:
    """A pool of this process, on a coordinator of its own."""
    with coordinated(pool, config), pool_of(pool, credentials=lookup) as made:
        yield made


def endpoint(pool: str) -> EndpointReport:
    """Return how the first endpoint is."""
    return observe(Names.of(pool)).endpoints[0]


@contextmanager
def without_garbage() -> Iterator[None]:
    """Let nothing be freed but by its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def expire(pool: Pool) -> None:
    """Let the next checkout open a connection."""
    pool.rest()


# -- every way


class Way(NamedTuple):
    """Where a password is read: the credentials table, libpq keywords, environment variables."""

    credentials: str = ""
    conninfo: Mapping[str, str] = {}
    environment: Mapping[str, str] = {}


def by_file(tmp: Path, server: Server, secret: str) -> Way:
    """`password_file`."""
    replace(tmp / "secret", f"{secret}\n")
    return Way(credentials=f'password_file = "{tmp}/secret"')


def by_variable(tmp: Path, server: Server, secret: str) -> Way:
    """`password_env`."""
    return Way(credentials='password_env = "APP_SECRET"', environment={"APP_SECRET": secret})


def by_program(tmp: Path, server: Server, secret: str) -> Way:
    """`password_command`."""
    replace(tmp / "secret", f"{secret}\n")
    return Way(credentials=f'password_command = ["/bin/cat", "{tmp}/secret"]')


def by_passfile(tmp: Path, server: Server, secret: str) -> Way:
    """libpq's passfile, named in the conninfo."""
    replace(tmp / "pgpass", f"127.0.0.1:{server.port}:*:{ROLE}:{secret}\n")
    return Way(conninfo={"passfile": f"{tmp}/pgpass"})


def by_passfile_variable(tmp: Path, server: Server, secret: str) -> Way:
    """libpq's passfile, named in the environment."""
    replace(tmp / "pgpass", f"127.0.0.1:{server.port}:*:{ROLE}:{secret}\n")
    return Way(environment={"PGPASSFILE": f"{tmp}/pgpass"})


def by_service(tmp: Path, server: Server, secret: str) -> Way:
    """libpq's service file."""
    replace(tmp / "service", f"[locked]\npassword={secret}\n")
    return Way(conninfo={"service": "locked"}, environment={"PGSERVICEFILE": f"{tmp}/service"})


def by_libpq_variable(tmp: Path, server: Server, secret: str) -> Way:
    """libpq's own variable."""
    return Way(environment={"PGPASSWORD": secret})


MakeWay = Callable[[Path, Server, str], Way]
WAYS: tuple[MakeWay, ...] = (
    by_file,
    by_variable,
    by_program,
    by_passfile,
    by_passfile_variable,
    by_service,
    by_libpq_variable,
)
BY_NAME = pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which libpq finds nothing by itself."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", "/nowhere/pgpass")
    return monkeypatch


@BY_NAME
def test_every_way_serves_workers_and_coordinator(
    locked: Server, password: str, pool_name: str, tmp_path: Path, no_variables: pytest.MonkeyPatch, make: MakeWay
) -> None:
    """The password is found by a worker and by the coordinator, and another one in its place is refused."""
    way = make(tmp_path, locked, password)
    for name, value in way.environment.items():
        no_variables.setenv(name, value)
    config = config_of(pool_name, locked, way.credentials, **way.conninfo)
    with coordinated(pool_name, config), pool_of(pool_name) as pool:
        with pool.connection("work") as conn:
            assert one_value(conn, "SELECT current_user") == ROLE
        expire(pool)
        for name, value in make(tmp_path, locked, "wrong").environment.items():
            no_variables.setenv(name, value)
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            pool.checkout("work")


def test_callable_goes_before_the_configuration(password: str, pool_name: str, config: str) -> None:
    """`Pool(credentials=...)` is asked at each connect, in the thread that connects; the coordinator reads its own."""
    asked: list[tuple[str, int]] = []

    def lookup(name: str) -> Mapping[str, str]:
        asked.append((name, threading.get_ident()))
        return {"user": OTHER_ROLE, "password": password}

    with served(pool_name, config, lookup) as pool:
        assert "lookup" not in repr(pool)
        for _ in range(2):
            with pool.connection("work") as conn:
                assert one_value(conn, "SELECT current_user") == OTHER_ROLE
        assert asked == [("pg1", threading.get_ident())], "a connection that rests is not opened again"
        expire(pool)
        pool.checkout("work").close()
        assert len(asked) == 2


def test_callable_that_fails_holds_nothing(password: str, pool_name: str, config: str) -> None:
    """What the callable raises is the cause of an OperationalError, told at once; permits and thread go on."""
    failures = [LookupError("vault is sealed")] * 2

    def lookup(name: str) -> str:
        if failures:
            raise failures.pop()
        return password

    with served(pool_name, config, lookup) as pool:
        with pytest.raises(psycopg2.OperationalError, match=r"credentials\(\) raised LookupError$") as caught:
            pool.checkout("work")
        assert isinstance(caught.value.__cause__, LookupError)
        assert is_whole(pool_name)
        with pool.connection("work") as conn:
            assert one_value(conn, "SELECT current_user") == ROLE


def test_endpoint_without_a_password_is_passed_over(locked: Server, pool_name: str, file: Path, tmp_path: Path) -> None:
    """An endpoint whose password cannot be read counts as one that refuses: another one serves."""
    conninfo = locked.conninfo(user=ROLE)
    endpoints = {
        "pg1": f"{endpoint_keys(conninfo)}\nweight = 100",
        "pg1.credentials": f'password_file = "{tmp_path}/missing"',
        "pg2": endpoint_keys(conninfo),
        "pg2.credentials": f'password_file = "{file}"',
    }
    group = GROUP.replace('"primary"', '"any"')
    with running_coordinator(pool_config(pool_name, endpoints, {"work": group}, PROBE), pool_name):
        wait_until(lambda: observe(Names.of(pool_name)).endpoints[1].health is Health.UP, within=10)
        with pool_of(pool_name) as pool, without_garbage():
            conn = pool.checkout("work")
            assert lease_of(conn).recipe.endpoint.name == "pg2"
            assert endpoint(pool_name).health is not Health.DOWN
            del conn
            pool.look_after_idle()
            assert pool.statistics()["work"]["held"] == 0, "what failed before keeps no forgotten connection alive"


def test_group_with_a_user_of_its_own_has_a_password_of_its_own(
    locked: Server, password: str, pool_name: str, file: Path, tmp_path: Path
) -> None:
    """The endpoint's password is not sent for another user: libpq looks for that one."""
    replace(tmp_path / "pgpass", f"*:*:*:{OTHER_ROLE}:other-{password}\n")
    set_password(locked, OTHER_ROLE, f"other-{password}")
    group = f'{GROUP}\nconninfo = "user={OTHER_ROLE}"'
    config = config_of(pool_name, locked, f'password_file = "{file}"', group, passfile=f"{tmp_path}/pgpass")
    with coordinated(pool_name, config), pool_of(pool_name) as pool, pool.connection("work") as conn:
        assert one_value(conn, "SELECT current_user") == OTHER_ROLE


# -- once more, and not for ever


def test_second_try_has_the_password_of_then(password: str, pool_name: str, config: str) -> None:
    """A password that was replaced between reading and use costs a second try: same checkout, no error, one permit."""
    given = ["stale", password]
    held: list[float] = []
    pools: list[Pool] = []

    def lookup(name: str) -> str:
        held.append(pools[0].statistics()["work"]["held"])
        return given.pop(0)

    with served(pool_name, config, lookup) as pool:
        pools.append(pool)
        with pool.connection("work") as conn:
            assert one_value(conn, "SELECT current_user") == ROLE
        assert held == [1, 1], "both tries are made with the same permit"
        numbers = pool.statistics()["work"]
        assert (numbers["opens"], numbers["errors"], numbers["held"]) == (1, 0, 1)


@pytest.mark.parametrize(("timeout", "asked"), [(None, 2), (0, 1)])
def test_wrong_password_is_told_after_one_more_try(
    password: str, pool_name: str, config: str, timeout: float | None, asked: int
) -> None:
    """A password that stays wrong is asked for twice, within the timeout, and told at once; the next one serves."""
    given: list[str] = []
    answer = ["wrong"]

    def lookup(name: str) -> str:
        given.append(answer[0])
        return answer[0]

    with served(pool_name, config, lookup) as pool:
        began = time.monotonic()
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed") as caught:
            pool.checkout("work", timeout)
        assert time.monotonic() - began < 2
        assert len(given) == asked
        assert not is_shown(caught.value, password)
        assert is_whole(pool_name)
        answer[0] = password
        pool.checkout("work", timeout).close()
        assert endpoint(pool_name).health is Health.UP


def test_empty_file_for_a_moment(password: str, pool_name: str, file: Path, config: str) -> None:
    """A file that is being written, empty for a moment, costs a second look and no error."""
    with served(pool_name, config) as pool:
        file.write_text("")
        timer = threading.Timer(0.02, file.write_text, (password,))
        timer.start()
        try:
            pool.checkout("work").close()
        finally:
            timer.join()


def test_refusals_in_another_language(locked: Server, password: str, pool_name: str, file: Path) -> None:
    """Where the server writes Russian, a password that changed is tried all the same, and the endpoint stays UP."""
    given = ["stale", password]

    def lookup(name: str) -> str:
        return given.pop(0) if given else "wrong"

    with translating(locked.port) as translator:
        conninfo = translator.conninfo(user=ROLE, dbname="postgres")
        endpoints = {"pg1": endpoint_keys(conninfo), "pg1.credentials": f'password_file = "{file}"'}
        config = pool_config(pool_name, endpoints, {"work": GROUP}, f'{PROBE}\ndowninter = "0.1s"\nfall = 2')
        with coordinated(pool_name, config) as coordinator, pool_of(pool_name, credentials=lookup) as pool:
            pool.checkout("work").close()
            expire(pool)
            with pytest.raises(psycopg2.OperationalError, match="ВАЖНО:  пользователь"):
                pool.checkout("work", timeout=0.3)
            assert is_whole(pool_name), "a refused connect has no session: its permits are back at once"
            replace(file, "wrong")
            assert cut_coordinator(locked, pool_name)
            wait_until(lambda: endpoint(pool_name).verdict is Verdict.MISCONFIGURED, what=lambda: coordinator.log)
            assert "28P01: пользователь" in coordinator.log
            assert endpoint(pool_name).health is Health.UP, "a refusal that counted would be the second bad probe"
            replace(file, password)
            wait_until(lambda: endpoint(pool_name).verdict is Verdict.OK, what=lambda: coordinator.log)


def cut_coordinator(server: Server, pool: str) -> int:
    """End the coordinator's sessions; return how many there were."""
    name = f"shmpool:{pool}:coordinator"
    found = server.execute(f"SELECT pid FROM pg_stat_activity WHERE application_name = '{name}'")
    for (pid,) in found:
        end_session(server, pid)
    return len(found)


def test_coordinator_finds_a_changed_password(
    locked: Server, password: str, pool_name: str, file: Path, config: str
) -> None:
    """A coordinator that has to connect again reads the password again; a wrong one takes no endpoint out."""

    def lookup(name: str) -> str:
        return f"{password}-2"

    with coordinated(pool_name, config) as coordinator, pool_of(pool_name, credentials=lookup) as pool:
        set_password(locked, ROLE, f"{password}-2")
        assert cut_coordinator(locked, pool_name)
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.MISCONFIGURED, what=lambda: coordinator.log)
        assert endpoint(pool_name).health is Health.UP
        pool.checkout("work").close()
        replace(file, f"{password}-2\n")
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.OK, what=lambda: coordinator.log)
        assert password not in coordinator.log


@pytest.mark.parametrize(("then", "verdict"), [(None, Verdict.OK), ("wrong", Verdict.MISCONFIGURED)])
def test_probe_looks_once_more(locked: Server, password: str, then: str | None, verdict: Verdict) -> None:
    """A probe that was refused reads the password again, and tries once more within the same check."""
    given: list[str] = []

    def lookup(name: str) -> str:
        given.append("stale" if not given else then or password)
        return given[-1]

    settings = endpoint_settings()._replace(conninfo=locked.conninfo(user=ROLE))
    with closing(Probe(settings, pool="web", timeout_s=5, lookup=lookup)) as probe:
        result = probe.check()
    assert (result.verdict, len(given)) == (verdict, 2), result
    assert ("28P01" in result.error) == (verdict is Verdict.MISCONFIGURED)
    assert "auth.c" not in result.error


HOLDING = """
import sys
from shmpool import Pool

pool = Pool(sys.argv[1])
held = [pool.checkout("work") for _ in range(4)]
print("ready", flush=True)
with held[0].cursor() as cur:
    cur.execute("SELECT pg_sleep(60)")
"""


def test_orphans_are_looked_after_with_the_password_of_now(
    locked: Server, password: str, pool_name: str, file: Path, config: str
) -> None:
    """Sessions of a worker that was killed after a change are found and ended: permits do not wait for the grace."""
    with coordinated(pool_name, config) as coordinator, worker(HOLDING, pool_name) as process:
        assert read_line(process) == "ready"
        set_password(locked, ROLE, f"{password}-2")
        replace(file, f"{password}-2\n")
        process.kill()
        process.wait()
        wait_until(lambda: is_whole(pool_name), within=5, what=lambda: coordinator.log)
        assert sessions(locked, pool_name) == []


# -- a password that changes under load

PROCESSES, THREADS = 4, 4
CHANGES = 8
CHANGE_EVERY_S = 0.25
GAP_S = 0.01  # between server and file: until then one of them knows only the old password
LOADED = f"""
connections = {PROCESSES * THREADS // 2}
target = "primary"
autocommit = true
per_worker_max = {THREADS}
max_lifetime = "0.2s"
"""


def run_worker(pool_name: str, until: float) -> dict[str, Any]:
    """Serve requests in several threads; tell how many, how often it connected, and what went wrong."""
    pool = Pool(pool_name)
    answer: dict[str, Any] = {"served": 0, "longest_wait": 0.0, "errors": []}
    threads = [threading.Thread(target=run_thread, args=(pool, "work", until, 0.002, answer)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = pool.statistics()["work"]
    pool.close()
    return answer | {"opens": numbers["opens"], "failed_opens": numbers["errors"]}


def change_password(server: Server, file: Path, fresh: str, order: str) -> float:
    """Change the role's password at the server and in the file, one after the other; return how long that took."""
    began = time.monotonic()
    if order == "file first":
        replace(file, f"{fresh}\n")
        time.sleep(GAP_S)
        set_password(server, ROLE, fresh)
    else:
        set_password(server, ROLE, fresh)
        time.sleep(GAP_S)
        replace(file, f"{fresh}\n")
    return time.monotonic() - began


@pytest.mark.parametrize("order", ["server first", "file first"])
def test_password_changes_under_load(locked: Server, password: str, pool_name: str, file: Path, order: str) -> None:
    """A role's password changes again and again under load: no request fails, and what is open goes on."""
    config = config_of(pool_name, locked, f'password_file = "{file}"', LOADED).replace(
        "max_connections = 20", f"max_connections = {PROCESSES * THREADS}"
    )
    with coordinated(pool_name, config) as coordinator, ExitStack() as stack:
        kept = stack.enter_context(pool_of(pool_name)).checkout("work")
        before = backend(kept)
        until = time.monotonic() + CHANGES * CHANGE_EVERY_S + 0.5
        children = [fork_worker(lambda: run_worker(pool_name, until)) for _ in range(PROCESSES)]
        gaps = []
        for number in range(CHANGES):
            time.sleep(CHANGE_EVERY_S)
            gaps.append(change_password(locked, file, f"{password}-{number}", order))
        answers = []
        for pid, read in children:
            with os.fdopen(read) as pipe:
                answers.append(json.loads(pipe.read()))
            assert os.waitpid(pid, 0)[1] == 0
        assert one_value(kept, "SELECT pg_backend_pid()") == before
        kept.close()
        assert endpoint(pool_name).health is Health.UP, coordinator.log
    errors = [error for answer in answers for error in answer["errors"]]
    served, opens, failed = (sum(a[key] for a in answers) for key in ("served", "opens", "failed_opens"))
    longest = max(answer["longest_wait"] for answer in answers)
    print(
        f"\n{order}, up to {max(gaps) * 1000:.0f} ms between: {CHANGES} changes under {PROCESSES} processes with "
        f"{THREADS} threads: {served} requests, {len(errors)} failed; {opens:.0f} connects, {failed:.0f} failed twice; "
        f"longest wait {longest * 1000:.0f} ms"
    )
    assert errors == [] or max(gaps) >= REFUSED_PAUSE_S, "only where this machine stood still between the two"
    assert opens >= PROCESSES * CHANGES, "connections were to be opened after every change"


# -- nothing shows a secret


@pytest.mark.parametrize("make", [by_file, by_variable, by_program, by_passfile, by_service], ids=lambda m: m.__name__)
def test_secret_is_nowhere(
    locked: Server,
    password: str,
    pool_name: str,
    tmp_path: Path,
    no_variables: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: MakeWay,
) -> None:
    """Neither shared memory nor logs, reports, command lines, representations and errors show a password."""
    caplog.set_level(logging.DEBUG)
    way = make(tmp_path, locked, password)
    for name, value in way.environment.items():
        no_variables.setenv(name, value)
    shown: dict[str, str | bytes] = {}
    config = config_of(pool_name, locked, way.credentials, **way.conninfo)
    with coordinated(pool_name, config, "--log-level", "debug") as coordinator, pool_of(pool_name) as pool:
        with pool.connection("work") as conn:
            lease = lease_of(conn)
            shown |= {f"repr of {type(o).__name__}": repr(o) for o in (pool, conn, lease.connection, lease.recipe)}
            shown["dsn"] = lease.connection.dsn
            shown["dsn parameters"] = repr(lease.connection.get_dsn_parameters())
            del lease
        expire(pool)
        set_password(locked, ROLE, f"another than {password[::-1]}")
        cut_coordinator(locked, pool_name)
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed") as caught:
            pool.checkout("work")
        wait_until(lambda: endpoint(pool_name).verdict is Verdict.MISCONFIGURED, what=lambda: coordinator.log)
        assert not is_shown(caught.value, password)
        for path in Names.of(pool_name).leftovers():
            if path.suffix != ".sock":
                shown[str(path)] = path.read_bytes()
        for pid in (coordinator.pid, os.getpid()):
            for name in ("cmdline", "comm"):
                shown[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes()
        environment = Path(f"/proc/{coordinator.pid}/environ").read_bytes()
        assert (password.encode() in environment) == (make is by_variable)
        for program in (
            ["shmpool.cli", "status", pool_name, "--json"],
            ["shmpool.cli", "status", pool_name, "--all"],
            ["shmpool_coordinator", "check-config", str(coordinator.config)],
            ["shmpool_coordinator", "info", pool_name],
        ):
            done = subprocess.run([sys.executable, "-m", *program], capture_output=True, text=True, check=False)
            assert done.stdout, done.stderr
            shown[" ".join(program)] = done.stdout + done.stderr
        shown["coordinator's log"] = coordinator.log
        shown["worker's log"] = caplog.text
    assert len([name for name in shown if name.startswith(str(SHM_DIR))]) > 4
    assert "misconfigured" in str(shown["coordinator's log"])
    for where, told in shown.items():
        found = told if isinstance(told, bytes) else told.encode()
        assert password.encode() not in found, where


def test_passphrase_of_a_key_is_masked(password: str, pool_name: str, config: str) -> None:
    """psycopg2 masks the password alone in `dsn` and `repr`; the passphrase of a client's key is masked as well."""

    def lookup(name: str) -> Mapping[str, str]:
        return {"password": password, "sslpassword": f"key-{password}"}

    with served(pool_name, config, lookup) as pool, pool.connection("work") as conn:
        assert "sslpassword=xxx" in repr(conn)
        assert password not in repr(conn) + conn.dsn


# -- what the documentation shows

PAGE = (Path(__file__).parents[3] / "docs" / "credentials.md").read_text()


def block(language: str, mark: str) -> str:
    """Return the page's code block in a language that has a mark in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if mark in block]
    return str(found)


def test_documented_configuration_is_valid() -> None:
    """The tables of the page are accepted, together and without a warning; so are the ways that it leaves out."""
    text = f"{block('toml', 'password_file')}\n{block('toml', '[access]')}"
    assert warnings_of(parse(tomllib.loads(text), "page")) == []
    others = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# password_")]
    assert len(others) == 2
    for other in others:
        assert parse(tomllib.loads(re.sub(r"^password_file.*$", other, text, flags=re.MULTILINE)), "page")


def test_documented_callable_works(password: str, pool_name: str, config: str, tmp_path: Path) -> None:
    """The callable of the page, on a real server, gives the role and the password of its file."""
    replace(tmp_path / "pg1", f"{OTHER_ROLE}:{password}\n")
    example, shared = block("python", "credentials=credentials"), block("python", "uid=")
    code = example.replace("/run/secrets", str(tmp_path)).replace('"web"', f'"{pool_name}"').replace('"read"', '"work"')
    code += f"    assert cursor.fetchone() == ('{OTHER_ROLE}',)\n"
    code += shared.replace('"owner"', repr(pwd.getpwuid(os.geteuid()).pw_name)).replace('"web"', f'"{pool_name}"')
    code += 'pool.connection("work").__enter__().close()\n'
    with coordinated(pool_name, config):
        environment = os.environ | {"PGPASSWORD": password}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr

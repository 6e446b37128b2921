"""The command `shmpool`, on a real segment without a coordinator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmpool import cli, semaphores
from shmpool.layout import RECALL_WORDS, SLOT_WORDS, USE_WORDS
from shmpool.names import SHM_DIR, Names
from shmpool.observation import pools_of
from shmpool.rows import Locks
from shmpool.states import SegmentState, Use
from tests.support.pools import CONNINFO, OfflinePool, offline_pool, remove_all, unique_names

# Holds the coordinator's lock of a pool until its standard input ends.
STAND_IN = """
import sys
from shmpool.names import Names
from shmpool.rows import Locks
assert Locks(Names.of(sys.argv[1]), int(sys.argv[2])).try_coordinator()
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def pool() -> Iterator[OfflinePool]:
    """A pool that nobody coordinates."""
    with offline_pool() as pool:
        yield pool


@contextmanager
def stand_in(pool: OfflinePool) -> Iterator[int]:
    """Hold the coordinator's lock in another process, with a fresh heartbeat."""
    arguments = [sys.executable, "-c", STAND_IN, pool.names.pool, str(pool.segment.header("lock_inode"))]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        pool.beat()
        yield process.pid


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command here; return its exit code and all its output."""
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_fine_is_0(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool with a coordinator and nothing wrong: exit code 0, one line says so."""
    with stand_in(pool) as pid:
        code, text = run(capsys, "status", pool.names.pool)
    assert code == 0, text
    assert f"{pool.names.pool}: fine   coordinator pid {pid}" in text
    assert "invariants hold" in text


def test_without_coordinator_2_and_everything_shown(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """With no coordinator the tables are there all the same, and the exit code is 2."""
    table = pool.attach_worker()
    token = pool.open_connection(table)
    code, text = run(capsys, "status", pool.names.pool)
    assert code == 2
    assert "no coordinator" in text
    for word in ("pg1", "read", "ACTIVE", "4242", "1/3", str(os.getpid())):
        assert word in text
    assert max(map(len, text.splitlines()[:-2])) <= 100
    assert CONNINFO not in text
    table.release(token)


def test_a_waiter_without_permits_is_1(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """A group whose permits are all held while somebody waits is degraded."""
    table = pool.attach_worker()
    tokens = [pool.open_connection(table) for _ in range(3)]
    waiter = table.take(pool.permits()[0])
    pool.segment.words[waiter.use_at] = Use.WAITING
    with stand_in(pool):
        code, text = run(capsys, "status", pool.names.pool)
    assert code == 1, text
    assert "none of 3 permits is free" in text
    for token in tokens:
        table.release(token)


def test_json_schema(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is one document with the schema, the level and no connection string."""
    table = pool.attach_worker()
    token = pool.open_connection(table, Use.IDLE)
    pool.segment.words[pool.segment.layout.at(RECALL_WORDS, token.number)] = pool.segment.words[token.word_at]
    with stand_in(pool):
        code, text = run(capsys, "status", pool.names.pool, "--json")
    document = json.loads(text)
    assert (code, document["schema"], document["exit_code"], document["level"]) == (0, 1, 0, "fine")
    (worker,) = document["workers"]
    (slot,) = [s for s in worker["slots"] if s["is_held"]]
    assert (worker["pid"], worker["state"]) == (os.getpid(), "held")
    assert (slot["use"], slot["word"], slot["is_recalled"]) == ("idle", "(g0,e0)", True)
    assert CONNINFO not in text
    table.release(token)


def test_slots_shows_only_slots(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """`shmpool slots` prints the slot tables and nothing else."""
    assert "no slot is used" in run(capsys, "slots", pool.names.pool)[1]
    table = pool.attach_worker()
    token = pool.open_connection(table)
    _, text = run(capsys, "slots", pool.names.pool)
    assert "slots of row 0" in text
    assert "endpoints" not in text
    table.release(token)


def test_status_takes_no_lock_and_stores_nothing(pool: OfflinePool) -> None:
    """Looking changes no byte of the segment, no semaphore and no lock."""
    with stand_in(pool) as pid:
        before = pool.segment.words.tobytes()
        values = {kind: semaphore.value for kind, semaphore in pool.opened.items()}
        assert cli.main(["status", pool.names.pool]) == 0
        assert pool.segment.words.tobytes() == before
        assert {kind: semaphore.value for kind, semaphore in pool.opened.items()} == values
        locks = Locks(pool.names, pool.segment.header("lock_inode"))
        assert locks.coordinator_pid() == pid


def test_a_retired_segment_is_read(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """A RETIRED segment is shown and called so."""
    pool.segment.set_header("state", SegmentState.RETIRED)
    with stand_in(pool):
        code, text = run(capsys, "status", pool.names.pool)
    assert code == 1
    assert "retired; waiting for" in text


@pytest.mark.parametrize("kind", ["g", "e", "b", "w"])
def test_a_lost_semaphore_is_reported(pool: OfflinePool, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A semaphore that is gone, or was made again, is a finding and never fatal."""
    name = pool.names.semaphore(pool.segment.token, kind, 0)
    keep = os.open(SHM_DIR / f"sem.{name[1:]}", os.O_RDONLY)  # so that its inode is not used again
    semaphores.unlink(name)
    with stand_in(pool):
        assert run(capsys, "status", pool.names.pool)[0] == 1
        impostor = semaphores.create(name, mode=0o600)
        code, text = run(capsys, "status", pool.names.pool, "--json")
    impostor.close()
    os.close(keep)
    findings = json.loads(text)["findings"]
    assert code == 1
    assert [finding["code"] for finding in findings] == ["name-lost"]


def test_a_replaced_lock_file_is_reported(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """A lock file that is not the header's is a finding; the coordinator counts as not running."""
    pool.names.lock.unlink()
    code, text = run(capsys, "status", pool.names.pool, "--json")
    assert code == 2
    assert "name-lost" in [finding["code"] for finding in json.loads(text)["findings"]]


@pytest.mark.parametrize("content", [b"", b"garbage" * 4000, bytes(8192)])
def test_garbage_is_a_clear_error(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no segment gives exit code 2 and a sentence, in tables and in JSON."""
    names = unique_names()
    names.segment.write_bytes(content)
    names.segment.chmod(0o600)
    try:
        code, text = run(capsys, "status", names.pool)
        assert code == 2
        assert str(names.segment) in text.replace("\n", "")
        assert run(capsys, "slots", names.pool)[0] == 2
        document = json.loads(run(capsys, "status", names.pool, "--json")[1])
        assert (document["level"], document["state"]) == ("not-running", None)
    finally:
        remove_all(names)


@pytest.mark.parametrize("nonsense", [0x00000000F0F0F0F4, 0xFFFFFFFFFFFFFFFF])
def test_scribbled_tables_are_reported(pool: OfflinePool, nonsense: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nonsense in the tables behind a good header is reported, not raised."""
    words, shape = pool.segment.words, pool.segment.layout
    pool.attach_worker()
    for table in (SLOT_WORDS, USE_WORDS, RECALL_WORDS):
        start, end = shape.span(table)
        for at in range(start, end):
            words[at] = nonsense
    code, text = run(capsys, "status", pool.names.pool, "--all")
    assert code == 2
    assert "VIOLATED" in text or "somebody wrote over it" in text.replace("\n", "")
    for table in (SLOT_WORDS, USE_WORDS, RECALL_WORDS):
        start, end = shape.span(table)
        for at in range(start, end):
            words[at] = 0


def test_an_unreadable_configuration_is_a_clear_error(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that cannot be read gives exit code 2 and says why."""
    pool.segment.set_header("config_crc_1", 1)
    code, text = run(capsys, "status", pool.names.pool)
    assert code == 2
    assert "CRC" in text


def test_no_pool_is_2_and_several_are_64(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a NAME: none is not running; several are listed, and the user has to choose."""
    monkeypatch.delenv("SHMPOOL_NAME", raising=False)
    monkeypatch.setattr(cli, "pools_of", lambda uid: [])
    assert run(capsys, "status")[0] == 2
    monkeypatch.setattr(cli, "pools_of", lambda uid: ["jobs", "web"])
    code, text = run(capsys, "status")
    assert code == 64
    assert "jobs, web" in text


def test_the_name_comes_from_the_environment_or_is_the_only_one(
    pool: OfflinePool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SHMPOOL_NAME names the pool; else the only pool there is."""
    monkeypatch.setenv("SHMPOOL_NAME", pool.names.pool)
    assert pool.names.pool in run(capsys, "status")[1]
    monkeypatch.delenv("SHMPOOL_NAME")
    monkeypatch.setattr(cli, "pools_of", lambda uid: [pool.names.pool])
    assert pool.names.pool in run(capsys, "status")[1]


def test_list_names_the_pools(pool: OfflinePool, capsys: pytest.CaptureFixture[str]) -> None:
    """`shmpool list` has a line for each pool of the user, not for its lock file or others' pools."""
    assert pools_of(os.geteuid()).count(pool.names.pool) == 1
    assert pool.names.pool not in pools_of(os.geteuid() + 1)
    code, text = run(capsys, "list")
    assert code == 0
    assert sum(line.startswith(pool.names.pool) for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "UPPER"],
        ["status", "../etc"],
        ["status", "a", "--watch", "never"],
        ["status", "--nonsense"],
        ["dance"],
        [],
        ["layout", "--workers", "0"],
    ],
)
def test_usage_errors_are_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line gives exit code 64 and a sentence."""
    code, text = run(capsys, *arguments)
    assert code == 64
    assert text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--help tells the exit codes and gives examples; --version prints one."""
    code, text = run(capsys, "status", "--help")
    assert code == 0
    assert "exit codes:" in text
    assert "shmpool status web --watch" in text
    assert run(capsys, "--version")[1].startswith("shmpool ")


def test_layout_prints_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    """`shmpool layout` shows tables, offsets and columns."""
    code, text = run(capsys, "layout", "--workers", "2", "--slots-per-worker", "3")
    assert code == 0
    for word in ("recall_words", "backend_pid", "semaphore_inode", "config 1"):
        assert word in text


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_watch_repeats_and_ends_cleanly(pool: OfflinePool, form: list[str]) -> None:
    """--watch prints again each interval outside a terminal; Ctrl-C ends it with exit code 0."""
    command = [sys.executable, "-m", "shmpool.cli", "status", pool.names.pool, *form, "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 3:
            seen += pool.names.pool in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")


def test_rich_is_for_tables_alone() -> None:
    """JSON needs no rich, and no psycopg2 is ever imported."""
    script = (
        "import sys; from shmpool import cli; cli.main(['status', 'none', '--json']);"
        "assert not {'rich', 'psycopg2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_those_of_the_user() -> None:
    """A pool's names carry the uid."""
    assert Names.of("web", 7).segment == Path("/dev/shm/shmpool.7.web")


@pytest.mark.parametrize("wish", ["drain", "ready", "maint"])
def test_admin_commands_need_a_coordinator(pool: OfflinePool, wish: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a coordinator: exit code 2 and where one was expected; nothing is changed."""
    before = pool.segment.words.tobytes()
    code, text = run(capsys, wish, "pg1", "--pool", pool.names.pool)
    assert code == 2
    assert f"no coordinator listens on {pool.names.socket}" in text
    assert pool.segment.words.tobytes() == before


def test_admin_commands_need_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """A command without an endpoint is a wrong command line."""
    assert run(capsys, "drain")[0] == 64

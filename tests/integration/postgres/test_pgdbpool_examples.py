"""Programs as pgdbpool's documentation shows them run unchanged but for the import.

Each is written anew here, in the shape of the documented one: its modules, its keys, its calls.  Only names of
servers, and what they cannot do (TLS), are those of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.twins import SECOND_HOST, Twins
from tests.support.twins import at_work as at_work
from tests.support.twins import twins as twins
from tools.pg_cluster import HOST

IMPORTS = {
    "from pgdbpool import pool": "from shmpool.pgdbpool import pool",
    "import pgdbpool as dbpool": "from shmpool import pgdbpool as dbpool",
}

SINGLE_DATABASE = f"""
import os

config = {{
    'type': 'threaded',
    'db': {{
        'host': '{HOST}',
        'name': 'postgres',
        'user': 'postgres',
        'pass': os.environ['PSQL_PASSWORD'],
        'ssl': 'prefer',
        'connect_timeout': 30,
        'connection_retry_sleep': 1,
        'query_timeout': 30000,
        'session_tmp_buffer': 128,
    }},
    'groups': {{
        'default': {{'connection_count': 10, 'autocommit': True}},
        'transactions': {{'connection_count': 5, 'autocommit': False}},
    }},
}}
"""

WSGI_APPLICATION = """
import DBConfig
from pgdbpool import pool as dbpool

dbpool.Connection.init(DBConfig.config)

def application(environ, start_response):
    if environ['REQUEST_METHOD'].upper() == 'GET':
        try:
            start_response('200 OK', [('Content-Type', 'application/json; charset=UTF-8')])
            people = []
            with dbpool.Handler('default') as db:
                for row in db.query("SELECT id, name, email FROM users WHERE active = true ORDER BY id"):
                    people.append({'id': row[0], 'name': row[1], 'email': row['email']})
            import json
            yield json.dumps(people).encode('utf-8')
        except Exception as e:
            start_response('500 Internal Server Error', [('Content-Type', 'text/plain')])
            yield b"Internal Server Error"
"""

SERVE_ONE_REQUEST = """
import app
print([chunk.decode() for chunk in app.application({'REQUEST_METHOD': 'GET'}, lambda status, headers: print(status))])
"""

SEVERAL_DATABASES = f"""
import pgdbpool as dbpool

config = {{
    'db': [
        {{'host': '{HOST}', 'name': 'postgres', 'user': 'postgres', 'pass': 'x', 'query_timeout': 12000}},
        {{'host': '{SECOND_HOST}', 'name': 'postgres', 'user': 'postgres', 'pass': 'x', 'query_timeout': 12000}},
    ],
    'groups': {{
        'read_pool': {{'connection_count': 4, 'autocommit': True}},
        'write_pool': {{'connection_count': 2, 'autocommit': False}},
    }},
}}

dbpool.Connection.init(config)

for group in ('read_pool', 'write_pool'):
    hosts = []
    for _ in range(8):
        with dbpool.Handler(group) as db:
            hosts.append(db.query("SELECT host(inet_server_addr())").fetchone()[0])
    print(group, *hosts)
"""

THREADS = f"""
import threading
from pgdbpool import pool

config = {{
    'type': 'threaded',
    'db': {{'host': '{HOST}', 'name': 'postgres', 'user': 'postgres', 'pass': 'x'}},
    'groups': {{
        'writer1': {{'connection_count': 3, 'autocommit': True}},
        'writer2': {{'connection_count': 2, 'autocommit': True}},
    }},
}}

pool.Connection.init(config)

def writer(group, first):
    for i in range(first, first + 20):
        with pool.Handler(group) as db1:
            db1.query("INSERT INTO table1 (col1, col2) VALUES ('test{{}}', 'x')".format(i))
            db1.query("UPDATE table1 SET col2 = %s WHERE col1 = %s", ('y', 'test{{}}'.format(i)))

threads = [
    threading.Thread(target=writer, args=('writer1', 0)),
    threading.Thread(target=writer, args=('writer2', 100)),
    threading.Thread(target=writer, args=('writer1', 200)),
]
for t in threads:
    t.start()
for t in threads:
    t.join()
with pool.Handler('writer1') as db1:
    print(db1.query("SELECT count(*) FROM table1 WHERE col2 = 'y'").fetchone()[0])
"""

ONE_THREAD = f"""
import os
from pgdbpool import pool as dbpool

config = {{
    'type': 'non-threaded',
    'db': {{
        'host': '{HOST}', 'name': 'postgres', 'user': 'postgres', 'pass': os.environ['PSQL_PASSWORD'], 'ssl': 'prefer'
    }},
    'groups': {{'worker_pool': {{'connection_count': 5, 'autocommit': True}}}},
}}

dbpool.Connection.init(config)
print(dbpool.Connection.get_threading_model())
pids = []
for _ in range(6):
    with dbpool.Handler('worker_pool') as db:
        pids.append(db.query("SELECT pg_backend_pid()").fetchone()[0])
print(len(set(pids)), pids[5] == pids[0])
"""

MANUAL_TRANSACTIONS = """
import DBConfig
from pgdbpool import pool as dbpool

dbpool.Connection.init(DBConfig.config)

def transfer_funds(from_account, to_account, amount):
    try:
        with dbpool.Handler('transactions') as db:
            db.query("UPDATE accounts SET balance = balance - %s WHERE id = %s", (amount, from_account))
            db.query("UPDATE accounts SET balance = balance + %s WHERE id = %s", (amount, to_account))
            db.query("INSERT INTO transaction_log VALUES (%s, %s, %s)", (from_account, to_account, amount))
            db.commit()
            return True
    except Exception as e:
        print(type(e).__name__)
        return False

print(transfer_funds(1, 2, 30))
print(transfer_funds(1, 2, 1000))
with dbpool.Handler('default') as db:
    print([row[0] for row in db.query("SELECT balance FROM accounts ORDER BY id")])
    print(db.query("SELECT count(*) FROM transaction_log").fetchone()[0])
"""

SEVERAL_GROUPS = f"""
from pgdbpool import pool as dbpool

config = {{
    'db': {{'host': '{HOST}', 'name': 'postgres', 'user': 'postgres', 'pass': 'x', 'ssl': False}},
    'groups': {{
        'group1': {{'connection_count': 5, 'autocommit': True}},
        'group2': {{'connection_count': 3, 'autocommit': False}},
    }},
}}

dbpool.Connection.init(config)

sql = 'SELECT count(*) FROM table1'

with dbpool.Handler('group2') as db2:
    db2.query("INSERT INTO table1 VALUES ('a', 'b')")
    with dbpool.Handler('group1') as db1:
        for rec in db1.query(sql):
            print(str(rec))
with dbpool.Handler('group1') as db1:
    for rec in db1.query(sql):
        print(str(rec))
"""

TABLES = {
    "users": "(id int, name text, email text, active boolean)",
    "accounts": "(id int, balance int CHECK (balance >= 0))",
    "transaction_log": "(from_id int, to_id int, amount int)",
    "table1": "(col1 text, col2 text)",
}


@pytest.fixture
def tables(at_work: Twins) -> Twins:
    """What the programs work on, new for each."""
    for name, columns in TABLES.items():
        at_work.first.execute(f"DROP TABLE IF EXISTS {name}")
        at_work.first.execute(f"CREATE TABLE {name} {columns}")
    return at_work


def run(directory: Path, program: str, **modules: str) -> list[str]:
    """Run a program with its modules beside it, each with the import changed, and return the lines that it prints."""
    changed = 0
    for name, text in {**modules, "main": program}.items():
        for before, after in IMPORTS.items():
            changed += text.count(before)
            text = text.replace(before, after)
        (directory / f"{name}.py").write_text(text)
    assert changed == 1
    done = subprocess.run(
        [sys.executable, "-W", "error", "main.py"],
        cwd=directory,
        env={**os.environ, "PSQL_PASSWORD": "x"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_wsgi_application(tables: Twins, tmp_path: Path) -> None:
    """The WSGI script with its configuration module answers a request with rows."""
    tables.first.execute(
        "INSERT INTO users VALUES (1, 'one', 'a@example.org', true), (2, 'two', 'b@example.org', false)"
    )
    assert run(tmp_path, SERVE_ONE_REQUEST, DBConfig=SINGLE_DATABASE, app=WSGI_APPLICATION) == [
        "200 OK",
        """['[{"id": 1, "name": "one", "email": "a@example.org"}]']""",
    ]


def test_wsgi_application_that_fails(tables: Twins, tmp_path: Path) -> None:
    """The script's own error path answers where the statement fails."""
    tables.first.execute("DROP TABLE users")
    assert run(tmp_path, SERVE_ONE_REQUEST, DBConfig=SINGLE_DATABASE, app=WSGI_APPLICATION) == [
        "200 OK",
        "500 Internal Server Error",
        "['Internal Server Error']",
    ]


def test_several_databases(tables: Twins, tmp_path: Path) -> None:
    """Connections of each group are spread over the databases."""
    assert run(tmp_path, SEVERAL_DATABASES) == [
        " ".join(["read_pool", *[HOST, SECOND_HOST] * 4]),
        " ".join(["write_pool", *[HOST, SECOND_HOST] * 4]),
    ]


def test_threaded_model(tables: Twins, tmp_path: Path) -> None:
    """Threads share the connections of two groups."""
    assert run(tmp_path, THREADS) == ["60"]


def test_non_threaded_model(tables: Twins, tmp_path: Path) -> None:
    """One thread uses its connections in turn."""
    assert run(tmp_path, ONE_THREAD) == ["non-threaded", "5 True"]


def test_manual_transactions(tables: Twins, tmp_path: Path) -> None:
    """A transfer is committed as a whole; one that fails half-way leaves nothing behind."""
    tables.first.execute("INSERT INTO accounts VALUES (1, 100), (2, 0)")
    assert run(tmp_path, MANUAL_TRANSACTIONS, DBConfig=SINGLE_DATABASE) == [
        "True",
        "DBQueryError",
        "False",
        "[70, 30]",
        "1",
    ]


def test_several_groups(tables: Twins, tmp_path: Path) -> None:
    """Groups with and without autocommit on one database behave as their names say."""
    assert run(tmp_path, SEVERAL_GROUPS) == ["[0]", "[1]"]

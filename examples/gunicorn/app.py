"""A guest book: reads from a replica, writes to the primary, within the host's budget of connections."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from html import escape
from typing import Any
from urllib.parse import parse_qs

import psycopg2

import shmpool

pool = shmpool.Pool(os.environ.get("SHMPOOL_NAME", "guestbook"))

PAGE = """<!doctype html>
<title>Guest book</title>
<h1>Guest book</h1>
<form method="post" action="/entries">
  <input name="name" placeholder="name" required> <input name="said" placeholder="what you say" required>
  <button>Write</button>
</form>
<ul>{entries}</ul>
<p>Read from the {role} on port {port}.</p>
"""


def read_entries() -> dict[str, Any]:
    """Return the latest entries and which server they came from."""
    with pool.connection("read") as db, db.cursor() as cursor:
        cursor.execute("SELECT name, said FROM entries ORDER BY id DESC LIMIT 20")
        entries = [{"name": name, "said": said} for name, said in cursor]
        return {"entries": entries, **server_of(cursor)}


def write_entry(name: str, said: str) -> dict[str, Any]:
    """Store an entry and return which server took it; leaving the block commits."""
    with pool.connection("write") as db, db.cursor() as cursor:
        cursor.execute("INSERT INTO entries (name, said) VALUES (%s, %s)", (name, said))
        return server_of(cursor)


def hold(milliseconds: float) -> dict[str, Any]:
    """Keep a connection busy for a while."""
    with pool.connection("read") as db, db.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", (milliseconds / 1000,))
        return server_of(cursor)


def server_of(cursor: psycopg2.extensions.cursor) -> dict[str, Any]:
    """Return which server the cursor's connection leads to."""
    cursor.execute("SELECT inet_server_port(), pg_is_in_recovery()")
    port, is_replica = cursor.fetchone() or (None, None)
    return {"role": "replica" if is_replica else "primary", "port": port, "worker": os.getpid()}


def page(book: dict[str, Any]) -> str:
    """Return the guest book for people."""
    entries = "".join(f"<li><b>{escape(e['name'])}</b>: {escape(e['said'])}</li>" for e in book["entries"])
    return PAGE.format(entries=entries, role=book["role"], port=book["port"])


def form(environ: dict[str, Any]) -> dict[str, str]:
    """Return the fields of the query string and of a posted form."""
    size = int(environ.get("CONTENT_LENGTH") or 0)
    text = environ.get("QUERY_STRING", "") + "&" + environ["wsgi.input"].read(size).decode()
    return {key: values[0] for key, values in parse_qs(text).items()}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request: HTML for browsers, else JSON."""
    is_browser = "text/html" in environ.get("HTTP_ACCEPT", "")
    status, headers, body = "200 OK", [], ""
    fields = form(environ)
    try:
        match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
            case "GET", "/":
                book = read_entries()
                body = page(book) if is_browser else json.dumps(book)
            case "POST", "/entries":
                body = json.dumps(write_entry(fields.get("name", "somebody"), fields.get("said", "")))
                status = "303 See Other" if is_browser else "201 Created"
                headers = [("Location", "/")]
            case "GET", "/slow":
                body = json.dumps(hold(float(fields.get("ms", "100"))))
            case "GET", "/health":
                body = json.dumps({"worker": os.getpid(), "groups": pool.statistics()})
            case _:
                status, body = "404 Not Found", json.dumps({"error": "no such page"})
    except psycopg2.OperationalError as error:  # the pool's own errors are of this kind, too
        status, headers = "503 Service Unavailable", [("Retry-After", "1")]
        body = json.dumps({"error": str(error).strip()})
    content = "text/html" if body.startswith("<") else "application/json"
    start_response(status, [("Content-Type", f"{content}; charset=utf-8"), *headers])
    return [body.encode()]

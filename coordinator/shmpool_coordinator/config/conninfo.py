"""What a conninfo may hold: one place for an endpoint's, none for what is laid over it, and never a secret."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from typing import Final

from shmpool_coordinator.config.findings import Finding
from shmpool_coordinator.probe import make_conninfo, parse_conninfo

SECRET_KEYWORDS: Final = frozenset(
    {"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
)
PLACE_KEYWORDS: Final = ("host", "hostaddr", "port", "service", "servicefile")
# Keywords that would work against the pool, and where their purpose is served.
REFUSED_KEYWORDS: Final[Mapping[str, str]] = {
    "application_name": "`application_name` of the group instead: [groups.<name>] application_name",
    "target_session_attrs": "`target` of the group instead: [groups.<name>] target",
}


def place_findings(path: str, name: str, conninfo: str) -> Iterator[Finding]:
    """Yield what an endpoint's conninfo may not hold, or lacks: it leads to one place."""
    keywords = yield from _conninfo_findings(path, conninfo)
    if keywords is None:
        return
    if not keywords.keys() & {"host", "hostaddr", "service"}:
        yield Finding(path, "no host", "host, hostaddr or service in it")
    places = ("host", "hostaddr", "port")
    hosts = max(len(keywords.get(key, "").split(",")) for key in places)
    if hosts > 1:
        tables = _split_tables(name, keywords, hosts)
        yield Finding(
            path,
            f"{hosts} hosts",
            f"one; write a table for each, with its own max_connections:{tables}",
        )


def overlay_findings(path: str, conninfo: str) -> Iterator[Finding]:
    """Yield what may not be laid over an endpoint's conninfo."""
    keywords = yield from _conninfo_findings(path, conninfo)
    for key in PLACE_KEYWORDS:
        if key in (keywords or {}):
            yield Finding(path, f"`{key}`", "no place in it: that is the endpoint's")


def _conninfo_findings(path: str, conninfo: str) -> Generator[Finding, None, dict[str, str] | None]:
    """Yield what no conninfo may hold; return its keywords, or None where libpq cannot parse it."""
    try:
        keywords = parse_conninfo(conninfo)
    except ValueError as error:
        # libpq quotes what it stumbled over, which may be the middle of a password.
        is_telling = not re.search("pass|secret|scram|@", conninfo, re.IGNORECASE)
        reason = f" ({error})" if is_telling else ""
        yield Finding(path, f"what libpq cannot parse{reason}", "keyword=value pairs or a URI")
        return None
    for key in sorted(SECRET_KEYWORDS & keywords.keys()):
        yield Finding(
            path,
            f"`{key}`",
            "no secret in it: give password_file, password_command or password_env in"
            " [endpoints.<name>.credentials], Pool(..., credentials=callable) in code, or use libpq's own ways"
            " (passfile, service file, PGPASSWORD)",
        )
    for key, place in REFUSED_KEYWORDS.items():
        if key in keywords:
            yield Finding(path, f"`{key}`", place)
    return keywords


def _split_tables(name: str, keywords: Mapping[str, str], hosts: int) -> str:
    """Return the tables that say the same as one conninfo with several hosts, indented."""
    kept = {k: v for k, v in keywords.items() if k not in SECRET_KEYWORDS | REFUSED_KEYWORDS.keys()}
    lines = []
    for number in range(hosts):
        own = dict(kept)
        for key in ("host", "hostaddr", "port"):
            values = kept.get(key, "").split(",")
            if len(values) > 1:
                own[key] = values[min(number, len(values) - 1)]
        conninfo = make_conninfo({key: value for key, value in own.items() if value})
        conninfo = conninfo.replace("\\", "\\\\").replace('"', '\\"')
        lines += [
            f"[endpoints.{name}{f'-{number + 1}' if number else ''}]",
            f'conninfo = "{conninfo}"',
        ]
    return "".join(f"\n      {line}" for line in lines)

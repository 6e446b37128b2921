"""What a conninfo may hold: one place for an endpoint's, none for what is laid over it, and never a secret."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

from shmpool_coordinator.config.findings import Finding
from shmpool_coordinator.config.tables import Endpoint
from shmpool_coordinator.probe import make_conninfo, parse_conninfo

SECRET_KEYWORDS: Final = frozenset(
    {"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
)
BALANCED: Final = "the group's `policy` over [endpoints.*] instead"
LISTS: Final = ("host", "hostaddr", "port")  # keywords that may hold several, separated by commas
MAX_NAME: Final = 32
PLACE_KEYWORDS: Final = ("host", "hostaddr", "port", "service", "servicefile")
# Keywords that would work against the pool, and where their purpose is served.
REFUSED_KEYWORDS: Final[Mapping[str, str]] = {
    "application_name": "`application_name` of the group instead: [groups.<name>] application_name",
    "target_session_attrs": "`target` of the group instead: [groups.<name>] target",
}


def place_findings(path: str, name: str, endpoint: Endpoint) -> Iterator[Finding]:
    """Yield what an endpoint's conninfo may not hold, or lacks: it leads to one place."""
    keywords = yield from _conninfo_findings(path, endpoint.conninfo)
    if keywords is None:
        return
    if not keywords.keys() & {"host", "hostaddr", "service"}:
        yield Finding(path, "no host", "host, hostaddr or service in it")
    if "load_balance_hosts" in keywords and endpoint.address == "instance":
        yield Finding(path, "`load_balance_hosts`", f'{BALANCED}, or address = "service" for a name of several servers')
    service = read_service(keywords)
    place = {key: value for key, value in service.items() if key in LISTS} | keywords
    counts = {key: len(place[key].split(",")) for key in LISTS if place.get(key)}
    hosts = max(counts.values(), default=1)
    if hosts > 1:
        where = f", in the service {keywords['service']}" if service.keys() & counts.keys() - keywords.keys() else ""
        expected = "one; write a table for each, with a max_connections of its own:"
        if set(counts.values()) <= {hosts, 1}:
            yield Finding(path, f"{hosts} hosts{where}", expected + _split_tables(name, place, hosts, endpoint))
        else:
            told = " and ".join(f"{count} in `{key}`" for key, count in counts.items())
            yield Finding(path, f"several hosts{where} ({told}, which do not belong together)", "one host and one port")


def read_service(keywords: Mapping[str, str]) -> Mapping[str, str]:
    """Return the keywords of the service that a conninfo names, from the first service file that has it.

    Empty where there is none, or where libpq alone knows the file: it is advice for this process's environment.
    """
    service = keywords.get("service")
    if not service:
        return {}
    own = keywords.get("servicefile") or os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf"
    for file in (own, f"{os.environ.get('PGSYSCONFDIR', '/etc')}/pg_service.conf"):
        try:
            lines = Path(os.path.expanduser(file)).read_text(errors="replace").splitlines()
        except (OSError, ValueError):
            continue
        if f"[{service}]" in lines:
            rest = lines[lines.index(f"[{service}]") + 1 :]
            section = itertools.takewhile(lambda line: not line.startswith("["), rest)
            pairs = (line.partition("=") for line in section if "=" in line and not line.startswith("#"))
            return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def overlay_findings(path: str, conninfo: str) -> Iterator[Finding]:
    """Yield what may not be laid over an endpoint's conninfo."""
    keywords = yield from _conninfo_findings(path, conninfo)
    for key in PLACE_KEYWORDS:
        if key in (keywords or {}):
            yield Finding(path, f"`{key}`", "no place in it: that is the endpoint's")
    if keywords is not None and "load_balance_hosts" in keywords:
        yield Finding(path, "`load_balance_hosts`", BALANCED)


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


def _split_tables(name: str, keywords: Mapping[str, str], hosts: int, endpoint: Endpoint) -> str:
    """Return the tables that say the same as one conninfo with several hosts, indented."""
    left_out = SECRET_KEYWORDS | REFUSED_KEYWORDS.keys() | {"load_balance_hosts"}
    kept = {key: value for key, value in keywords.items() if key not in left_out}
    lines = []
    for number in range(hosts):
        own = dict(kept)
        for key in LISTS:
            values = kept.get(key, "").split(",")
            own[key] = values[number if len(values) > 1 else 0]
        conninfo = make_conninfo({key: value for key, value in own.items() if value})
        conninfo = conninfo.replace("\\", "\\\\").replace('"', '\\"')
        suffix = f"-{number + 1}" if number else ""
        lines += [
            f"[endpoints.{name[: MAX_NAME - len(suffix)]}{suffix}]",
            f'conninfo = "{conninfo}"',
            f"max_connections = {endpoint.max_connections}  # at this server",
        ]
    return "".join(f"\n      {line}" for line in lines)

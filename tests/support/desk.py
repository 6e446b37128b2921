"""The coordinator's tables in the test's own process, with a worker's side beside them; no daemon, no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shmpool import invariants, views
from shmpool.layout import PERMITS, SLOT_WORDS
from shmpool.names import Names
from shmpool.rows import take_row
from shmpool.segment import private_page
from shmpool.semaphores import Semaphore
from shmpool.slots import EndpointPermits, GroupPermits, Outcome, SlotTable, Token
from shmpool.words import Control
from shmpool_coordinator.adoption import Access, lock_pool
from shmpool_coordinator.config import Config, parse
from shmpool_coordinator.registry import Registry

CONNINFO = "host=127.0.0.1 port=1 dbname=none"


def config_of(pool: str, groups: dict[str, int] | None = None, endpoints: dict[str, int] | None = None) -> Config:
    """Return a small configuration: caps by name."""
    raw = {
        "name": pool,
        "limits": {"workers": 4, "slots_per_worker": 4, "endpoints": 3, "groups": 3},
        "endpoints": {
            name: {"conninfo": CONNINFO, "max_connections": cap} for name, cap in (endpoints or {"pg1": 3}).items()
        },
        "groups": {
            name: {"connections": cap, "target": "any", "per_worker_max": 4}
            for name, cap in (groups or {"read": 2}).items()
        },
    }
    return parse(raw, "/nowhere.toml")


@dataclass
class Desk:
    """A registry, and one worker row that belongs to the same process."""

    registry: Registry
    table: SlotTable
    groups: dict[int, GroupPermits]
    endpoints: dict[int, EndpointPermits]

    def claim(self, group: int = 0) -> Token:
        """Claim a permit pair."""
        token = self.table.take(self.groups[group])
        outcome = self.table.claim(token, self.groups[group], list(self.endpoints.values()))
        assert outcome is Outcome.GRANTED
        return token

    def word(self, token: Token) -> int:
        """Return a token's slot word."""
        return int(self.registry.segment.words[token.word_at])

    def set_word(self, token: Token, word: int) -> None:
        """Write a slot word by hand."""
        self.registry.segment.words[token.word_at] = word

    def control(self, number: int) -> Control:
        """Return a control word; groups first."""
        return self.registry.permits.control(number)

    def counter(self, number: int, column: str) -> int:
        """Return a counter of a semaphore."""
        segment = self.registry.segment
        return int(segment.words[segment.layout.at(PERMITS, number, column)])

    def set_control(self, number: int, control: Control) -> None:
        """Write a control word by hand."""
        segment = self.registry.segment
        segment.words[segment.layout.at(PERMITS, number, "control")] = control.word()

    def violations(self) -> list[str]:
        """Return what a view of the pool violates."""
        view = views.read_pool(self.registry.segment, self.registry.permits.read_values)
        assert view.is_clean
        return [str(found) for found in invariants.check(view)]

    def slot_words(self) -> list[int]:
        """Return every slot word."""
        start, end = self.registry.segment.layout.span(SLOT_WORDS)
        return list(self.registry.segment.words[start:end])


def open_desk(config: Config) -> Registry:
    """Become the coordinator of a pool in this process."""
    names = Names.of(config.name)
    return Registry(names, config, lock_pool(names, Access.of(config)))


def close_desk(registry: Registry, *, unlink: bool = True) -> None:
    """Stop being the coordinator."""
    if unlink:
        registry.unlink()
    registry.close()
    registry.locks.release_coordinator()


@contextmanager
def desk(config: Config) -> Iterator[Desk]:
    """A pool whose permits circulate, and a worker's side of it."""
    registry = open_desk(config)
    registry.permits.tick(lambda slot, word: False)
    segment, names = registry.segment, registry.names
    opened: list[Semaphore] = []

    def semaphore(kind: str, index: int) -> Semaphore:
        opened.append(Semaphore(names.semaphore(segment.token, kind, index)))
        return opened[-1]

    assert registry.settings is not None
    groups = {
        g.index: GroupPermits(
            segment, g.index, semaphore("g", g.index), semaphore("b", g.index), semaphore("w", g.index)
        )
        for g in registry.settings.groups
    }
    endpoints = {
        e.index: EndpointPermits(
            segment, e.index, semaphore("e", e.index), [group.endpoint_bell for group in groups.values()]
        )
        for e in registry.settings.endpoints
    }
    table = SlotTable(segment, private_page())
    table.add_row(take_row(segment, registry.locks))
    try:
        yield Desk(registry, table, groups, endpoints)
    finally:
        table.forget()
        for one in opened:
            one.close()
        close_desk(registry)

"""What peers ask of the coordinator, and how each message is answered."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

from shmpool.frames import Message
from shmpool.layout import WORKERS
from shmpool.rows import owner_of
from shmpool.states import Admin, Role
from shmpool_coordinator.config import ConfigError
from shmpool_coordinator.control import Control, Peer, Reply, RequestError
from shmpool_coordinator.endpoints import UnknownEndpointError
from shmpool_coordinator.lookout import Lookout
from shmpool_coordinator.origin import Origin, password_findings
from shmpool_coordinator.registry import Registry
from shmpool_coordinator.repair import RepairError

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    """What a message may look at and set off."""

    registry: Registry
    lookout: Lookout
    control: Control

    def tick_soon(self) -> None:
        """Look at the tables in this turn of the loop."""

    def worker_ended(self, row: int) -> None:
        """Look in this turn whether the worker of a row has ended."""

    def reload(self) -> list[str]:
        """Read the configuration again; return what changed.

        Raises:
            ConfigError, ValueError, OSError: it cannot be used; nothing was changed.
        """

    def retire(self, asked_by: int) -> None:
        """Let everybody leave the segment, for a successor.  Raises as `reload`."""

    def stop(self) -> None:
        """End after this turn."""


class Requests:
    """Answers messages for a coordinator."""

    def __init__(self, coordinator: Coordinator, origin: Origin, *, heartbeat_s: float, linger_s: float | None) -> None:
        self._coordinator = coordinator
        self._origin = origin
        self._heartbeat_s = heartbeat_s
        self._linger_s = linger_s

    @property
    def _registry(self) -> Registry:
        """The registry of now: a successor's, once a retired segment was replaced."""
        return self._coordinator.registry

    def serve(self, peer: Peer, message: Message) -> Reply | None:
        """Serve one message; return the answer, None: there is none.

        Raises:
            RequestError: it cannot be served; says why.
        """
        serve = {
            "hello": self._hello,
            "look": self._look,
            "waiting": self._waiting,
            "evidence": self._evidence,
            "served": self._served,
            "info": self._info,
            "reload": self._reload,
            "admin": self._admin,
            "retire": self._retire,
            "repair": self._repair,
            "passwords": self._passwords,
            "stop": self._stop,
        }.get(message["type"])
        if serve is None:
            raise RequestError(f"message type {str(message['type'])[:40]!r} is not known")
        return serve(peer, message)

    def _hello(self, peer: Peer, message: Message) -> Reply:
        row, generation = _integer(message, "row"), _integer(message, "generation")
        if not self._registry.is_row_of(row, generation):
            raise RequestError(f"worker row {row} has not generation {generation}")
        peer.row, peer.generation = row, generation
        owner = owner_of(self._registry.segment, row)
        if not peer.pid or (owner.pid == peer.pid and owner.visibly_lives()):  # 0: of another pid namespace
            self._coordinator.control.watch(peer)
        return Reply("welcome", {"pid": os.getpid(), "heartbeat": self._heartbeat_s})

    def _look(self, _peer: Peer, message: Message) -> None:
        """A process ended, as its parent knows: look at its rows now."""
        pid, segment = _integer(message, "pid"), self._registry.segment
        for row in range(segment.layout.workers):
            if pid and segment.words[segment.layout.at(WORKERS, row, "pid")] == pid:
                self._coordinator.worker_ended(row)

    def _waiting(self, _peer: Peer, message: Message) -> None:
        _integer(message, "group")
        self._coordinator.tick_soon()

    def _evidence(self, _peer: Peer, message: Message) -> None:
        index = _integer(message, "endpoint")
        if not self._coordinator.lookout.take_evidence(index):
            raise RequestError(f"endpoint {index} is not configured")

    def _served(self, peer: Peer, message: Message) -> None:
        """A worker got a connection to an endpoint that is DOWN here."""
        index, role = _integer(message, "endpoint"), _integer(message, "role")
        is_role = 0 <= role < len(Role)
        if not is_role or not self._coordinator.lookout.take_success(index, Role(role), peer.pid):
            raise RequestError(f"endpoint {index} is not configured, or role {role} does not exist")

    def _info(self, _peer: Peer, _message: Message) -> Reply:
        return Reply(
            "info",
            {
                "pid": os.getpid(),
                "pool": self._registry.names.pool,
                "config_file": self._registry.config.source,
                "linger": self._linger_s,
                "workers": sum(peer.row is not None for peer in self._coordinator.control.peers),
                "adoptions": self._registry.segment.header("coordinator_adoptions"),
                "endpoints": self._coordinator.lookout.describe(),
            },
        )

    def _reload(self, _peer: Peer, _message: Message) -> Reply:
        try:
            return Reply("reloaded", {"changes": self._coordinator.reload()})
        except (ConfigError, ValueError, OSError) as error:
            raise RequestError(str(error)) from None

    def _passwords(self, peer: Peer, message: Message) -> Reply:
        """A process with the same configuration hands its passwords over: one may be newer than what is known."""
        known = self._origin.passwords
        if known is None:
            raise RequestError(
                f"pool {self._registry.names.pool!r}: its configuration says where passwords are read, none is taken "
                "from here"
            )
        given: Any = message.get("passwords")
        wrong = list(map(str, password_findings(given, self._registry.config.endpoints)))
        if wrong:
            raise RequestError("; ".join(wrong))
        for name in self._coordinator.lookout.names():
            if name in given and known.take(name, given[name]):
                log.info("endpoint %s: pid %d gave another password", name, peer.pid)
                self._coordinator.lookout.take_password(name)
        return Reply("taken", {})

    def _admin(self, peer: Peer, message: Message) -> Reply:
        """Note what an operator wants of an endpoint; the next tick, which is now, sends home what rests there."""
        name, wish = _text(message, "endpoint"), _text(message, "admin")
        wishes = {admin.name.lower(): admin for admin in Admin}
        if wish not in wishes:
            raise RequestError(f"admin is {wish[:40]!r}, expected one of {', '.join(wishes)}")
        try:
            status = self._registry.endpoints.set_operator_wish(name, wishes[wish])
        except UnknownEndpointError as error:
            raise RequestError(str(error)) from None
        alone = self._registry.endpoints.groups_left_alone_by(name)
        log.warning("endpoint %s: %s, as pid %d (uid %d) asked for", name, wish, peer.pid, peer.uid)
        if alone:
            log.warning("endpoint %s: without it no endpoint is eligible for group %s", name, ", ".join(alone))
        self._coordinator.tick_soon()
        return Reply(
            "admin",
            {
                "endpoint": name,
                "admin": status.admin.name.lower(),
                "operator": status.admin_operator.name.lower(),
                "configuration": status.admin_config.name.lower(),
                "groups_left_alone": alone,
            },
        )

    def _retire(self, peer: Peer, _message: Message) -> Reply:
        try:
            self._coordinator.retire(peer.pid)
        except (ConfigError, ValueError, OSError) as error:
            raise RequestError(f"nothing changed, as the successor could not be made: {error}") from None
        return Reply("retired", {"token": f"{self._registry.segment.token:016x}"})

    def _repair(self, peer: Peer, message: Message) -> Reply:
        apply = message.get("apply") is True
        if apply:
            log.warning("pool %s: repair asked for by pid %d", self._registry.names.pool, peer.pid)
        try:
            return Reply("repairs", {"repairs": self._registry.repair(apply=apply)})
        except RepairError as error:
            raise RequestError(str(error)) from None

    def _stop(self, peer: Peer, _message: Message) -> Reply:
        log.info("pool %s: stop asked for by pid %d, ending", self._registry.names.pool, peer.pid)
        self._coordinator.stop()
        return Reply("stopping", {"pid": os.getpid()})


def _integer(message: Message, key: str) -> int:
    value: Any = message.get(key)
    if type(value) is not int:
        raise RequestError(f"{message['type']}: {key} is {str(value)[:40]!r}, expected a whole number")
    return value


def _text(message: Message, key: str) -> str:
    value: Any = message.get(key)
    if type(value) is not str:
        raise RequestError(f"{message['type']}: {key} is {str(value)[:40]!r}, expected a text")
    return value

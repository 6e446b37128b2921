"""What a worker reads of the endpoint table and the slot words."""

from __future__ import annotations

from shmpool.endpoints import count_held
from shmpool.words import ORPHAN
from tests.support.desk import config_of, desk


def test_connections_of_a_group_at_an_endpoint(pool_name: str) -> None:
    """Counted are the pairs held for certain, by anybody, of this group at this endpoint."""
    with desk(config_of(pool_name, {"a": 2, "b": 2}, {"pg1": 2, "pg2": 3})) as made:
        segment = made.registry.segment

        def counts() -> list[list[int]]:
            return [[count_held(segment, made.groups[g], made.endpoints[e]) for e in (0, 1)] for g in (0, 1)]

        assert counts() == [[0, 0], [0, 0]]
        tokens = [made.claim(0), made.claim(0), made.claim(1)]
        assert counts() == [[2, 0], [0, 1]]
        made.set_word(tokens[0], made.word(tokens[0]) | ORPHAN)
        assert counts() == [[2, 0], [0, 1]]
        made.table.release(tokens[1])
        assert counts() == [[1, 0], [0, 1]]

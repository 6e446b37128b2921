"""Stand-ins in place of servers."""

from tests.support.pgdbpool import servers as servers

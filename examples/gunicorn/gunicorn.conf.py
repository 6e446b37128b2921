"""Four workers that share one budget of connections."""

from shmpool.hooks.gunicorn import *  # noqa: F403  starts the coordinator, gives connections back

workers = 4

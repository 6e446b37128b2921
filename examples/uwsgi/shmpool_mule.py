"""The coordinator, as a mule of uWSGI."""

from shmpool_coordinator.mule import main

main()

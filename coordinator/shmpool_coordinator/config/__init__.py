"""The configuration file: TOML, validated, frozen.

A file is checked as a whole: `ConfigError` tells all that is wrong with it, a line for each finding.
"""

from shmpool_coordinator.config.checks import warnings_of
from shmpool_coordinator.config.description import describe
from shmpool_coordinator.config.findings import ConfigError, Finding
from shmpool_coordinator.config.reading import find, load, parse
from shmpool_coordinator.config.tables import CONNECT_DEFAULTS, Config, Endpoint, Group, Probe
from shmpool_coordinator.config.values import DurationOrZero, MaxLag, duration_text

__all__ = [
    "CONNECT_DEFAULTS",
    "Config",
    "ConfigError",
    "DurationOrZero",
    "Endpoint",
    "Finding",
    "Group",
    "MaxLag",
    "Probe",
    "describe",
    "duration_text",
    "find",
    "load",
    "parse",
    "warnings_of",
]

"""Find, read and check a configuration file: TOML, as a whole, all findings at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from shmpool_coordinator.config.checks import cross_findings
from shmpool_coordinator.config.findings import ConfigError, Finding, finding_of
from shmpool_coordinator.config.tables import Config

CONFIG_VARIABLE: Final = "SHMPOOL_CONFIG"


def find(path: str | None) -> Path:
    """Return the absolute path of the configuration file: the argument, else SHMPOOL_CONFIG.

    Raises:
        ConfigError: neither names a file.
    """
    name = path or os.environ.get(CONFIG_VARIABLE, "")
    if not name:
        raise ConfigError(
            "configuration",
            (f"found no file name, expected one as argument or in {CONFIG_VARIABLE}",),
        )
    return Path(name).absolute()


def load(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or is not a valid configuration.
    """
    source = str(path.absolute())
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(source, (f"cannot be read: {reason}",)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(source, (f"is not UTF-8 (at line {line})",)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, (f"is not valid TOML: {error}",)) from None
    return parse(raw, source)


def parse(raw: Mapping[str, Any], source: str) -> Config:
    """Check a configuration that was read from `source`.

    Raises:
        ConfigError: it is not valid; all findings at once.
    """
    config: Config | None = None
    findings: list[Finding] = []
    try:
        config = Config.model_validate(raw).with_source(source)
    except ValidationError as error:
        findings += (finding_of(details) for details in error.errors(include_url=False))
    told = {finding.path for finding in findings}
    findings += (f for f in cross_findings(raw) if f.path not in told)
    if findings or config is None:
        raise ConfigError(source, tuple(map(str, findings))) from None
    return config

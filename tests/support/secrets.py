"""Looking for a secret where none may be."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from typing import Any


def texts_of(error: BaseException) -> Iterator[str]:
    """Yield all that a log or an error tracker could show of an exception: messages, causes, frames' variables."""
    chain: list[BaseException | None] = [error]
    for one in chain:
        if one is not None:
            yield from (str(one), repr(one), repr(one.args), repr(getattr(one, "__notes__", "")))
            yield from (_opened(value) for frame, _ in traceback.walk_tb(one.__traceback__) for value in _values(frame))
            chain += [other for other in (one.__cause__, one.__context__) if other not in chain]


def is_shown(error: BaseException, secret: str) -> bool:
    """Whether anything about an exception shows a secret."""
    return any(secret in text for text in texts_of(error))


def _values(frame: Any) -> Iterator[Any]:
    """Yield the variables of a frame, those of the test itself excepted: it knows the secret."""
    if "/tests/" not in frame.f_code.co_filename:
        yield from frame.f_locals.values()


def _opened(value: Any) -> str:
    """Return what is shown of a variable: mappings and lists are drawn item by item."""
    if isinstance(value, Mapping):
        return repr({str(key): _opened(item) for key, item in value.items()})
    return repr(value)

"""Where Amazon keeps a bucket."""

from __future__ import annotations

import urllib.error
import urllib.request
from functools import lru_cache
from typing import Final
from urllib.parse import quote

_AMAZON: Final = "https://s3.amazonaws.com"
_SECONDS: Final = 5.0


def region_of(bucket: str, endpoint: str = _AMAZON) -> str | None:
    """The region of a bucket, which Amazon tells anybody, whoever may read it; None where it cannot be asked.

    One request for each bucket and process.
    """
    try:
        return _asked(bucket, endpoint)
    except (OSError, ValueError, KeyError):
        return None


@lru_cache
def _asked(bucket: str, endpoint: str) -> str:
    request = urllib.request.Request(f"{endpoint}/{quote(bucket, safe='')}", method="HEAD")
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as refusal:
        # forbidden or moved: the header is there all the same
        headers = refusal.headers
    return str(headers["x-amz-bucket-region"] or "") or _unknown()


def _unknown() -> str:
    # not remembered, as an answer would be
    raise KeyError("x-amz-bucket-region")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None

"""An S3-compatible server with one bucket, in memory: `python -m tests.lmcache.s3_server PORT`.

moto's, behind a few lines that put the bucket into the path: LMCache names a bucket in the host
name only, and a test can't add host names to a machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

BUCKET = "kvtc"
HOST = "127.0.0.1"


class OneBucket:
    """Every path is inside the bucket."""

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        for name in ("PATH_INFO", "RAW_URI", "REQUEST_URI"):
            if name in environ:
                environ[name] = f"/{BUCKET}{environ[name]}"
        return self._s3(environ, start)


if __name__ == "__main__":
    run_simple(HOST, int(sys.argv[1]), OneBucket(), threaded=True)

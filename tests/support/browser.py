"""A real browser without a window: Chromium, told what to do by WebDriver, the W3C's protocol of JSON over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from processes import PATIENCE

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="a browser takes Debian's chromium and chromium-driver"
)

_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900"),
)
# no proxy of this machine's is between us and ourselves
_open = build_opener(ProxyHandler({})).open


class Browser:
    """One window.

    Parameters
    ----------
    driver : str
        The URL of a ChromeDriver.
    profile : Path
        A directory for everything that the browser writes down.
    """

    def __init__(self, driver: str, profile: Path) -> None:
        options = {"binary": _CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._session = driver + "/session"
        self._session += "/" + self._do("", {"capabilities": wanted})["sessionId"]

    def _do(self, command: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._session + command, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            with error:
                raise AssertionError(f"the browser says of {command}: {error.read().decode()}") from None

    def visit(self, url: str) -> None:
        self._do("/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script in the page returns."""
        return self._do("/execute/sync", {"script": script, "args": []})

    def until(self, script: str, condition: Callable[[Any], Any] = bool) -> Any:
        """What a script returns, as soon as it is what is waited for."""
        deadline = time.monotonic() + PATIENCE
        while not condition(found := self.run(script)):
            assert time.monotonic() < deadline, f"the page never shows it: {found}"
            time.sleep(0.1)
        return found

    def resize(self, width: int, height: int) -> None:
        self._do("/window/rect", {"width": width, "height": height})

    def complaints(self) -> list[str]:
        """What the page has written to the console as an error."""
        return [entry["message"] for entry in self._do("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> bytes:
        image = base64.b64decode(self._do("/screenshot"))
        path.write_bytes(image)
        return image

    def close(self) -> None:
        self._do("", method="DELETE")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that nobody has used before."""
    assert _DRIVER is not None
    # it asks nobody on the network how to reach this machine
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with subprocess.Popen([_DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            # it says "... was started successfully on port 12345."
            port = next(line.split()[-1].rstrip(".\n") for line in process.stdout if "successfully on port" in line)
            window = Browser(f"http://127.0.0.1:{port}", folder / "profile")
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()

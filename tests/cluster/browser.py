"""Drives a headless Chromium over its debugging protocol: what a page logs, how wide it is, how it looks."""

import asyncio
import base64
import itertools
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
_START_S = 60


@dataclass
class Page:
    """What a browser made of a page."""

    messages: list[str] = field(default_factory=list)
    """Console messages, refused requests and uncaught errors."""
    requests: list[str] = field(default_factory=list)
    """URLs that were asked for."""
    scroll_width: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    """What the asked-for expressions gave."""
    picture: bytes = b""
    """PNG of the whole page."""


def look_at(chromium: str, path: Path, width: int, scheme: str, ask: dict[str, str]) -> Page:
    """Open a file in a window of this many CSS pixels, with `prefers-color-scheme` of `light` or `dark`.

    `ask` maps names to JavaScript expressions whose values are returned.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            return asyncio.run(asyncio.wait_for(_look(process, path, width, scheme, ask), _START_S))
        finally:
            process.terminate()
            process.wait(timeout=20)


async def _look(process: "subprocess.Popen[str]", path: Path, width: int, scheme: str, ask: dict[str, str]) -> Page:
    assert process.stderr is not None
    port = ""
    for line in process.stderr:
        if "DevTools listening on" in line:
            port = line.rsplit(":", 1)[1].split("/")[0]
            break
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            target = next(entry for entry in await reply.json(content_type=None) if entry["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
            return await _Driver(socket).visit(path, width, scheme, ask)


class _Driver:
    def __init__(self, socket: "aiohttp.ClientWebSocketResponse") -> None:
        self._socket, self._numbers, self.page = socket, itertools.count(1), Page()
        self._loaded = False

    async def visit(self, path: Path, width: int, scheme: str, ask: dict[str, str]) -> Page:
        """Open the page and look."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        phone = width < 600
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        await self._call("Emulation.setEmulatedMedia", features=media)
        await self._call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._take(await self._socket.receive_json())
        self.page.scroll_width = await self._value("document.documentElement.scrollWidth")
        for name, expression in ask.items():
            self.page.values[name] = await self._value(expression)
        shot = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
        self.page.picture = base64.b64decode(shot["data"])
        return self.page

    async def _value(self, expression: str) -> Any:
        found = await self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    async def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled":
                self.page.messages.append(str(params["args"]))
            case "Runtime.exceptionThrown":
                self.page.messages.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.page.messages.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.page.requests.append(params["request"]["url"])

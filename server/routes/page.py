"""The page: static files of ``web/dist`` at every address that is not the API's."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

__all__ = ["PageFiles", "routes"]

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
# Names of built assets carry a hash of their content.
_FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_CHECK = {"Cache-Control": "no-cache"}
_NO_PAGE = """The page is not built.

Millrace is running and its API answers; only the page is missing. To build it, install Node.js 20
or newer, run

    make page

in the project's folder, and start the server again. Meanwhile `millrace chat` talks to the model in
a terminal.
"""


class PageFiles:
    """The files of a directory, found once: what is not in this list is never opened."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}

    async def scan(self) -> None:
        """List the directory; it may be missing."""
        self._files = await asyncio.to_thread(self._list)

    def _list(self) -> dict[str, Path]:
        root = self._directory.resolve()
        files = (path for path in root.rglob("*") if path.is_file())
        # A link out of the directory is no part of the page.
        return {
            path.relative_to(root).as_posix(): path
            for path in files
            if path.resolve().is_relative_to(root)
        }

    async def get(self, http: web.Request) -> web.StreamResponse:
        """Return a file, or for an address of the page's own router its index."""
        name = http.match_info.get("path", "") or "index.html"
        path = self._files.get(name)
        if path is not None:
            age = _FOREVER if name.startswith("assets/") else _CHECK
            return web.FileResponse(path, headers={**_HEADERS, **age})
        index = self._files.get("index.html")
        if index is None and name == "index.html":
            return web.Response(text=_NO_PAGE, headers=_CHECK)
        is_file = "." in name.rpartition("/")[2]
        if index is None or is_file or "text/html" not in http.headers.get("Accept", ""):
            raise web.HTTPNotFound
        return web.FileResponse(index, headers={**_HEADERS, **_CHECK})


def routes(files: PageFiles) -> list[web.RouteDef]:
    """Return this module's routes; they must come last."""
    return [web.get("/{path:(?!v1/).*}", files.get)]

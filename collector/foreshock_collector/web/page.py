"""The HTML pages that scripts fill from the API, the scripts themselves, and runbooks.

The HTML holds nothing of a run but its name, escaped; everything else reaches the page as JSON and is shown as text.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from foreshock_collector.resources import resource
from foreshock_collector.state.fleet import Runs
from foreshock_collector.web.api import RUN

_STATIC = Path(__file__).parent / "static"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        # plotly.js puts the style sheet of its maps into the page as it loads: this one and no other.
        "style-src-elem 'self' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='",
        # It places its drawings by style attributes, and paints a heat map as an image of its own making.
        "style-src-attr 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PLOTLY = "package_data/plotly.min.js"
_PLOTLY_VERSION = importlib.metadata.version("plotly")
_INDEX_TEXT = """Foreshock collector

/                             the page, for a browser
/metrics                      for Prometheus
/api/v1/runs                  all runs, as JSON: ?ended=&ended_within=
/api/v1/runs/{run}            one run: ranks, events, incidents
/api/v1/runs/{run}/steps      its steps, as columns: ?attempt=&after=&limit=
/api/v1/runs/{run}/series     its steps downsampled for a chart, with the baseline: ?attempt=&first=&last=&points=
/api/v1/runs/{run}/heat/ranks, /heat/layers
/api/v1/runs/{run}/incidents/{id}
/api/v1/live                  an event for every change, as server-sent events: ?run=
/runbooks                     what to do about an alert
/-/healthy  /-/ready
"""


class Page:
    """Serves the pages and their files. Files are read once, at the start, and no path from outside opens another."""

    def __init__(self, *, runs: Runs) -> None:
        self._runs = runs
        self._files = {path.name: path.read_bytes() for path in _STATIC.iterdir() if path.suffix in _CONTENT_TYPES}
        self._runbooks = {path.stem: path.read_text("utf-8") for path in sorted(resource("runbooks").glob("*.md"))}
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        self._plotly: bytes | None = None

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of pages, their files, and runbooks."""
        return [
            web.get("/", self._fleet),
            web.get(f"/run/{RUN}", self._run),
            web.get("/runbooks", self._list),
            web.get("/runbooks/{alert}", self._runbook),
            web.get("/static/plotly.js", self._plotly_js),
            web.get("/static/{name}", self._file),
            web.get("/favicon.ico", self._icon),
        ]

    async def _fleet(self, request: web.Request) -> web.Response:
        if not _wants_html(request):
            return web.Response(text=_INDEX_TEXT)
        return _page("fleet.html", title="Runs")

    async def _run(self, request: web.Request) -> web.Response:
        name = request.match_info["run"]
        status = 404 if self._runs.experiment_of(name) is None else 200
        return _page("run.html", status=status, title=name[:200], plotly_version=_PLOTLY_VERSION)

    async def _list(self, request: web.Request) -> web.Response:
        if not _wants_html(request):
            return web.Response(text="".join(f"/runbooks/{name}\n" for name in self._runbooks))
        return _page("runbooks.html", title="Runbooks", names=list(self._runbooks))

    async def _runbook(self, request: web.Request) -> web.Response:
        # Looked up by name: a path from outside opens no file.
        name = request.match_info["alert"]
        text = self._runbooks.get(name.removesuffix(".md"))
        if text is None:
            message = f"No runbook {name[:80]!r}; /runbooks lists all of them."
            if not _wants_html(request):
                raise web.HTTPNotFound(text=message + "\n")
            return _page("runbook.html", status=404, title="No such runbook", text=Markup("<p>{}</p>").format(message))
        if name.endswith(".md") or not _wants_html(request):
            return web.Response(text=text, content_type="text/markdown", headers={"Vary": "Accept"})
        # Our own text, and the renderer escapes any HTML in it.
        return _page("runbook.html", title=name, text=Markup(self._markdown.render(text)))  # noqa: S704

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound(text="no such file\n")
        return _with_etag(request, self._files[name], _CONTENT_TYPES[Path(name).suffix])

    async def _icon(self, request: web.Request) -> web.Response:
        return _with_etag(request, self._files["icon.svg"], _CONTENT_TYPES[".svg"])

    async def _plotly_js(self, request: web.Request) -> web.Response:
        if self._plotly is None:
            # Once, in a thread: over a slow tunnel, 1.5 MB load three times as fast as 4.8 MB.
            self._plotly = await asyncio.to_thread(lambda: gzip.compress(plotly_script().read_bytes(), 6))
        # The URL has the version, so browsers may keep the file, and its compiled form.
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            body = self._plotly
        else:
            body = gzip.decompress(self._plotly)
        return web.Response(body=body, content_type="text/javascript", charset="utf-8", headers=headers)


def plotly_script() -> Path:
    """Return the plotly.js of the installed package `plotly`, without importing that package."""
    spec = importlib.util.find_spec("plotly")
    places = spec.submodule_search_locations if spec is not None else None
    if not places or not (script := Path(places[0]) / _PLOTLY).is_file():
        raise web.HTTPNotFound(text="the package plotly is missing: pip install plotly\n")
    return script


def _page(template: str, *, status: int = 200, **values: object) -> web.Response:
    text = TEMPLATES.get_template(template).render(values)
    headers = {"Content-Security-Policy": _POLICY, "Vary": "Accept"}
    return web.Response(status=status, text=text, content_type="text/html", headers=headers)


def _wants_html(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "")


def _with_etag(request: web.Request, body: bytes, kind: str) -> web.Response:
    """Send a file only if it has changed. Browsers ask each time: after an upgrade nobody runs old scripts."""
    tag = hashlib.sha256(body).hexdigest()[:16]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

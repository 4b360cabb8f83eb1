"""The web page: its files, their routes, and the policy under which they run in a browser."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {
    "/" if file.name == "page.html" else f"/page/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in TYPES
}
# No inline script or style, nothing from elsewhere, and no string can become markup or code, by whatever mistake.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def page_routes() -> list[Route]:
    """A route for each file of the page; `/` is page.html."""
    return [Route(path, _send) for path in FILES]


async def _send(request: Request) -> Response:
    """GET of one file."""
    file = FILES[request.url.path]
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(file.read_bytes(), headers=headers, media_type=TYPES[file.suffix])

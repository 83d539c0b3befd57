"""The page at /: its three files and the policy under which a browser runs them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from qvlm_runtime.serve import asgi
from qvlm_runtime.serve.asgi import Send

# Nothing inline, nothing from elsewhere; an image is shown from the file the visitor dropped.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# path -> (file beside this one, content type)
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


@cache
def _content(name: str) -> bytes:
    return files("qvlm_runtime.serve").joinpath(name).read_bytes()


async def respond(send: Send, shown: tuple[str, str]) -> None:
    """Send one of FILES."""
    name, kind = shown
    await asgi.respond(send, 200, kind, _content(name), [("content-security-policy", POLICY)])

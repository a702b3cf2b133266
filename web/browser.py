"""What a browser is given: the page at `/` and its files, under a policy that keeps strangers out.

They hold no data, so they need no token: the script asks for it, and for everything else, by the
routes that any caller has.
"""

from collections.abc import Callable
from pathlib import Path

import bottle

from jobs import model
from web.server import Application

_DIRECTORY = Path(__file__).with_name("page")

#: Nothing from elsewhere, nothing inline: text from outside cannot become a script.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(application: Application, *, base_url: str, needs_token: bool) -> None:
    """Add the page and its files to an application."""
    html = bottle.template(
        _read("index.tpl"), base_url=base_url, needs_token=needs_token, states=list(model.State)
    )
    for path, text, media_type in (
        ("/", html, "text/html"),
        ("/page.css", _read("page.css"), "text/css"),
        ("/page.js", _read("page.js"), "text/javascript"),
        ("/icon.svg", _read("icon.svg"), "image/svg+xml"),
    ):
        application.serve("GET", path, _answering(text, media_type), open_to_all=True)


def _answering(text: str, media_type: str) -> Callable[[], str]:
    def answer() -> str:
        bottle.response.headers.update(_HEADERS)
        bottle.response.content_type = f"{media_type}; charset=UTF-8"
        return text

    return answer


def _read(name: str) -> str:
    return (_DIRECTORY / name).read_text(encoding="utf-8")

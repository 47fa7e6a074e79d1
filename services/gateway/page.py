"""GET /: the cluster as a page, live, with a chat beside it. GET /cluster: what it shows, for whoever draws it anew.

The page is one file with its style and script in it. Its content security policy names those two by their hashes and
lets the page talk to this server alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.cluster import ClusterView

FILE = Path(__file__).with_name("page.html")


def page_routes(view: ClusterView) -> list[Route]:
    html = FILE.read_bytes()
    headers = {
        "content-security-policy": policy(html),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(_: Request) -> Response:
        return Response(html, headers=headers, media_type="text/html")

    async def cluster(_: Request) -> Response:
        return Response(view.snapshot(), headers={"cache-control": "no-store"}, media_type="application/json")

    return [Route("/", page), Route("/cluster", cluster)]


def policy(html: bytes) -> str:
    script, style = (_hashes(html, tag) for tag in (b"script", b"style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(html: bytes, tag: bytes) -> str:
    """Of the elements with this tag; they have no attributes."""
    bodies = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)

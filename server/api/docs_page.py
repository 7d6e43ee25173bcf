"""GET /docs: Swagger UI from an installed package, so that it works without a network and runs nobody else's code.

The page is of the origin that manages adapters: a script from elsewhere could do all that its reader may.
"""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

ASSETS = files("fastapi_offline") / "static"
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # Swagger UI writes style attributes
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>manylora</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
});
"""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> Response:
    """Return the page."""
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get("/docs/start.js")
async def start() -> Response:
    """Return what starts Swagger UI."""
    return Response(START, media_type="text/javascript", headers=HEADERS)


@router.get("/docs/swagger-ui-bundle.js")
def script() -> Response:
    """Return Swagger UI."""
    return _asset("swagger-ui-bundle.js", "text/javascript")


@router.get("/docs/swagger-ui.css")
def style() -> Response:
    """Return its style sheet."""
    return _asset("swagger-ui.css", "text/css")


def _asset(name: str, kind: str) -> Response:
    return Response((ASSETS / name).read_bytes(), media_type=kind, headers=HEADERS)

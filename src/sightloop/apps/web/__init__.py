"""The page: static files that the server sends as they are. No build step, and no request to another server."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
"""Folder of `index.html`, `style.css`, the modules and the vendored libraries."""

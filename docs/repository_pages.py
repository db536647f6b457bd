"""A hook of mkdocs: READMEs of benchmarks and reports of studies become pages of the site, and links to them work.

In the repository pages link to files beside `docs/` by relative paths, `../benchmarks/devices/README.md`. In the site
these files lie in a folder of their own, `benchmarks/devices/`; the hook puts them there and changes the links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PATTERNS = ("benchmarks/*/*.md", "benchmarks/*/*.svg", "studies/*/report.html")
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Changes links that leave their own tree, `docs/`, `benchmarks/` or `studies/`."""
    place = Path(page.file.abs_src_path).parent
    site = Path(page.file.src_uri).parent

    def changed(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(place / match[2]))
        if not target.is_relative_to(ROOT):
            return match[0]
        within = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT)
        return f"{match[1]}{os.path.relpath(within, site)}{match[3]}"

    return _LINK.sub(changed, markdown)

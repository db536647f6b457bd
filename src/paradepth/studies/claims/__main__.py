"""Write `docs/claims.md`: `python -m paradepth.studies.claims [REPOSITORY]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from paradepth.atomic import write_text
from paradepth.studies.claims import page


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    root = Path(words[0] if words else ".")
    if len(words) > 1 or not (root / "studies").is_dir() or not (root / "docs").is_dir():
        print(f"refused: {root} is not the repository, which has docs/ and studies/", file=sys.stderr)
        return 2
    write_text(root / "docs" / "claims.md", page(root))
    print(root / "docs" / "claims.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

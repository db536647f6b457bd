"""Builds a corpus of English prose from Debian packages: dictionaries with quotations, WordNet's glosses and examples,
a book-length FAQ, quotations.

    python benchmarks/masked_lm/corpus.py OUT          writes OUT/corpus.txt and OUT/corpus.json (what it took, sizes)

Packages are fetched with `apt-get download` and unpacked with `dpkg-deb -x`, so it runs on Debian and its derivatives,
needs no privileges and installs nothing. Text is cut into passages at ends of paragraphs and the passages are shuffled
in a fixed order, so that the training, validation and test parts, which are cut off the end, are of the same kinds.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PASSAGE = 1500  # characters, at least


def dictd(folder: Path) -> Iterator[str]:
    """Paragraphs of dictionaries in dictd's format: meanings and quotations, without headwords' markup."""
    for path in sorted(folder.rglob("*.dict.dz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        text = re.sub(r"\[(1913 Webster|PJC|Obs\.?|R\.|WordNet[^\]]*|Webster[^\]]*|Century[^\]]*)[^\]]*\]", "", text)
        text = re.sub(r"[{}]", "", text)
        for paragraph in re.split(r"\n\s*\n", text):
            joined = " ".join(paragraph.split())
            joined = re.sub(r"^\S+ \\[^\\]*\\.*?(\]|\.)\s", "", joined)  # Affect \Af*fect"\, v. t. [imp. …]
            joined = re.sub(r"^(?:[a-z]{1,3}\. )*(?:\[(?:[^\[\]]|\[[^\]]*\])*\]\s*)*", "", joined)  # t. [L. …]
            joined = re.sub(r"^(\d+\.|\([a-z]\))\s", "", joined)
            joined = re.sub(r"\s*--\s?[A-Z][\w. &'()]*\.?$", "", joined)  # --Milton.
            yield joined


def wordnet(folder: Path) -> Iterator[str]:
    """A paragraph for each set of synonyms: the words, their meaning, examples of use."""
    for path in sorted(folder.rglob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(" ") or "|" not in line:
                continue
            fields, gloss = line.split("|", 1)
            parts = fields.split()
            words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in parts[4 : 4 + 2 * int(parts[3], 16) : 2]]
            yield f"{', '.join(words)}: {' '.join(gloss.replace(chr(34), '').split())}"


def fortune(folder: Path) -> Iterator[str]:
    """Quotations, divided by lines with a percent sign."""
    for path in sorted(folder.rglob("fortunes/*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8"):
            for quotation in re.split(r"\n%+\n", path.read_text(encoding="utf-8", errors="replace")):
                yield " ".join(quotation.split())


class _Paragraphs(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.open: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "pre", "head")
        if tag in ("p", "li", "h1", "h2", "h3", "h4", "div", "td", "dd", "dt", "blockquote"):
            self.end()

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "pre", "head") and self.hidden > 0
        if tag in ("p", "li", "h1", "h2", "h3", "h4", "div", "td", "dd", "dt", "blockquote"):
            self.end()

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.open.append(data)

    def end(self) -> None:
        self.done.append(" ".join("".join(self.open).split()))
        self.open = []


def pages(folder: Path) -> Iterator[str]:
    """Paragraphs of HTML pages."""
    for path in sorted(folder.rglob("*.html")):
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        parser.end()
        yield from parser.done


def plain(folder: Path) -> Iterator[str]:
    """Paragraphs of compressed plain text."""
    for path in sorted(folder.rglob("*.txt.gz")):
        for paragraph in re.split(r"\n\s*\n", gzip.decompress(path.read_bytes()).decode("utf-8", "replace")):
            yield " ".join(paragraph.split())


SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {
    "dict-gcide": dictd,
    "wordnet-base": wordnet,
    "anarchism": pages,
    "fortunes": fortune,
    "dict-devil": dictd,
    "dict-foldoc": dictd,
    "jargon-text": plain,
}


def prose(paragraph: str) -> bool:
    """Whether a paragraph is running English: several words, mostly of letters."""
    letters = sum(c.isalpha() or c in " ,.;:'!?" for c in paragraph)
    return paragraph.count(" ") >= 3 and letters > 0.9 * len(paragraph) and "\ufffd" not in paragraph


def passages(paragraphs: Iterator[str]) -> Iterator[str]:
    """Neighbouring paragraphs together, each passage at least `PASSAGE` characters long."""
    open_: list[str] = []
    for paragraph in filter(prose, paragraphs):
        open_.append(paragraph)
        if sum(map(len, open_)) >= PASSAGE:
            yield "\n".join(open_)
            open_ = []
    if open_:
        yield "\n".join(open_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    taken, found = {}, []
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", *SOURCES], cwd=work, check=True, stdout=subprocess.DEVNULL)
        for package, read in SOURCES.items():
            (archive,) = Path(work).glob(f"{package}_*.deb")
            folder = Path(work, package)
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
            mine = list(passages(read(folder)))
            taken[archive.name] = {"passages": len(mine), "bytes": sum(len(p.encode()) for p in mine)}
            found += [f"{p}\n\n" for p in mine]
    found = sorted(set(found), key=lambda p: hashlib.sha256(p.encode()).digest())  # a shuffle that is always the same
    corpus = "".join(found).encode()
    (out / "corpus.txt").write_bytes(corpus)
    summary = {"bytes": len(corpus), "sha256": hashlib.sha256(corpus).hexdigest(), "packages": taken}
    (out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()

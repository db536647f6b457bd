"""The project's promises about itself: versions agree, and the core needs no training extra."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import paradepth

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("paradepth") == paradepth.__version__
    assert f"\nversion: {paradepth.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{paradepth.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("extra", ["", "train", "export", "dev"])
def test_every_direct_dependency_has_a_tested_version(extra: str) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in wanted]  # pyright: ignore[reportOptionalSubscript]
    assert [name for name in names if name not in pinned] == []


def test_models_work_without_the_training_extra() -> None:
    absent = "conllu datasets jinja2 kornia matplotlib PIL pyarrow rich sacrebleu sklearn tensorboard tokenizers"
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({(absent + ' torchdata torchmetrics tyro').split()!r}))\n"
        "import paradepth, tempfile, torch\n"
        "model = paradepth.create_model('paraformer_nano', image_size=8, patch_size=4).eval()\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    again = paradepth.from_pretrained(model.truncate(2).save_pretrained(folder))\n"
        "images = torch.rand(2, 3, 8, 8)\n"
        "assert torch.equal(again(images), model(images, branches=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "paradepth", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, paradepth.__version__)
    refused = subprocess.run(
        [sys.executable, "-m", "paradepth", "nonsense"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2

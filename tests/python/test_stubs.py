"""python/sluice/_core.pyi says what the extension module has."""

import subprocess
import sys
from pathlib import Path

import pytest

import sluice

CHECKED_IN = Path(__file__).parents[2] / "python" / "sluice" / "_core.pyi"


def test_stubs_are_those_of_the_module(tmp_path):
    nanobind = pytest.importorskip("nanobind")
    if not nanobind.__version__.startswith("3.1."):
        pytest.skip(f"nanobind {nanobind.__version__} words stubs its own way; they are those of 3.1")
    made = tmp_path / "_core.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "sluice._core", "-o", made],
        check=True,
    )
    assert made.read_text() == CHECKED_IN.read_text(), (
        f"{CHECKED_IN} is out of date: {sys.executable} -m nanobind.stubgen -m sluice._core -o {CHECKED_IN}"
    )


def test_everything_public_has_a_docstring():
    undocumented = [
        name for name in sluice.__all__ if not (getattr(sluice, name).__doc__ or "").strip()
    ]
    assert not undocumented

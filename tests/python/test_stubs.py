"""python/sluice/_core.pyi says what the extension module has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sluice
from sluice.compat import deep_ep, w4a8

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


def test_no_signature_shows_a_type_of_cpp():
    """Such an argument cannot be given: its header of nanobind's is not included."""
    assert not re.findall(r"\b(?:std|sluice|nanobind)::\S+", CHECKED_IN.read_text())


def members(kind):
    """Public methods and properties that a class itself defines, static ones too."""
    for name, value in vars(kind).items():
        value = getattr(value, "__func__", value)
        if not name.startswith("_") and (callable(value) or hasattr(type(value), "__get__")):
            yield name, value


def test_everything_public_has_a_docstring():
    """Functions, classes, and what classes have; where C++ takes arrays, with shapes."""
    modules = [sluice, deep_ep, w4a8]
    named = [(f"{m.__name__}.{name}", getattr(m, name)) for m in modules for name in m.__all__
             if name != "topk_idx_t"]
    named += [(f"{name}.{member}", value) for name, kind in named if isinstance(kind, type)
              for member, value in members(kind)]
    undocumented = [name for name, value in named if not (getattr(value, "__doc__", "") or "").strip()]
    assert len(named) > 100 and not undocumented
    with_arrays = ["moe_forward", "dispatch", "combine", "experts_masked", "experts_grouped", "quantize",
                   "requantize"]
    for name in with_arrays:
        text = getattr(sluice, name).__doc__
        assert re.search(r"\[[\w.]+, ", text) and re.search("bfloat16|uint8|e4m3|shape of", text), name

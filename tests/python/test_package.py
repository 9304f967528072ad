"""The package as such: what importing it needs, what the build put into it, what a wheel holds."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sluice

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "python" / "sluice"


def in_a_process(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_driver_and_no_torch():
    """Everything but torch_ops, in a process of its own: what is mapped into it afterwards."""
    mapped = in_a_process(
        "import sys, sluice, sluice.compat.deep_ep, sluice.compat.w4a8\n"
        "assert 'torch' not in sys.modules\n"
        "print(open('/proc/self/maps').read())")
    assert "_core" in mapped
    for library in ("libcuda.so", "libcudart", "libtorch", "libc10", "libpython_torch"):
        assert library not in mapped, library


def test_without_a_gpu_only_its_backend_is_refused():
    text = in_a_process(
        "import sluice\n"
        "try:\n"
        "    sluice.Backend('cuda')\n"
        "except sluice.Error as error:\n"
        "    assert error.code == 'unsupported', error.code\n"
        "    print(error)\n"
        "assert sluice.Backend('cpu').device == 'cpu'\n",
        CUDA_VISIBLE_DEVICES="")
    assert "cuda:0" in text, "a GPU was found where none is visible"
    built = os.environ.get("SLUICE_BUILT_WITH_CUDA")
    if built is not None:  # Says the build, tests/python/CMakeLists.txt.
        assert ("this build has no CUDA backend" in text) == (built == "0"), text


def test_version():
    assert sluice.__version__ == (ROOT / "VERSION").read_text().strip()


def test_an_installed_package_holds_what_it_should():
    """Every file of python/sluice and one extension module, and nothing beside them."""
    try:
        distribution = importlib.metadata.distribution("sluice")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: this is the package of a build tree")
    if not Path(sluice.__file__).samefile(distribution.locate_file("sluice/__init__.py")):
        pytest.skip("another one is installed: this is the package of a build tree")
    files = {str(f) for f in distribution.files if "__pycache__" not in f.parts and f.suffix != ".pyc"}
    metadata = {f for f in files if f.startswith("sluice-") and ".dist-info/" in f}
    modules = {f for f in files if f.startswith("sluice/_core.") and f.endswith(".so")}
    wanted = {f"sluice/{f.relative_to(SOURCES)}" for f in SOURCES.rglob("*")
              if f.is_file() and "__pycache__" not in f.parts}
    assert len(modules) == 1 and metadata
    assert files - metadata - modules == wanted
    assert {"sluice/py.typed", "sluice/_core.pyi", "sluice/compat/deep_ep/__init__.py"} <= wanted
    needed = [r for r in distribution.requires or [] if "extra ==" not in r]
    assert len(needed) == 1 and needed[0].startswith("numpy")


def test_the_distribution_of_the_name_deep_ep():
    """python/deep_ep_shim as installed: one module, which is Sluice's."""
    try:
        distribution = importlib.metadata.distribution("sluice-deep-ep")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("python/deep_ep_shim is not installed")
    assert distribution.version == sluice.__version__ and distribution.requires == ["sluice"]
    modules = {str(f) for f in distribution.files if f.suffix == ".py"}
    assert modules == {"deep_ep/__init__.py"}
    in_a_process("import deep_ep, sluice.compat.deep_ep as ours\n"
                 "assert deep_ep.Buffer is ours.Buffer and deep_ep.Config is ours.Config\n"
                 "assert 'int64' in str(deep_ep.topk_idx_t)\n"
                 "assert deep_ep.__file__.endswith('site-packages/deep_ep/__init__.py'), deep_ep.__file__\n")

"""The package as such: what importing it needs, what the build put into it, what a wheel holds."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sluice

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "python" / "sluice"


def process(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


def in_a_process(code, **environment):
    done = process(code, **environment)
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


def test_the_module_exports_its_init_function_alone():
    """Any other symbol could replace one of a library that is loaded later, torch's for example."""
    nm = shutil.which("nm") or pytest.skip("nm of binutils is not installed")
    listed = subprocess.run([nm, "-D", "--defined-only", sluice._core.__file__], capture_output=True,
                            text=True, check=True)
    assert [line.split()[1:] for line in listed.stdout.splitlines()] == [["T", "PyInit__core"]]


def test_a_self_contained_module_needs_the_c_library_alone():
    """Of scripts/build_wheel.sh; where SLUICE_SELF_CONTAINED says that it is what is installed."""
    if os.environ.get("SLUICE_SELF_CONTAINED", "0") == "0":
        pytest.skip("SLUICE_SELF_CONTAINED is not set: this module may need the system's libraries")
    objdump = shutil.which("objdump") or pytest.skip("objdump of binutils is not installed")
    listed = subprocess.run([objdump, "-p", sluice._core.__file__], capture_output=True, text=True,
                            check=True)
    needed = {line.split()[1] for line in listed.stdout.splitlines() if "NEEDED" in line}
    of_glibc = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1",
                "ld-linux-x86-64.so.2"}
    assert needed <= of_glibc, needed - of_glibc
    versions = {tuple(map(int, version.split("."))) for version in
                re.findall(r"GLIBC_([0-9.]+)", listed.stdout)}
    assert versions and max(versions) <= (2, 35), max(versions)


@pytest.mark.parametrize("order", ["sluice, torch", "torch, sluice"])
def test_either_order_of_imports(order):
    """With an exception through each library, and its streams, which are what once broke."""
    pytest.importorskip("torch", reason="torch is not installed")
    out = in_a_process(
        f"import {order}\n"
        "for fail in (lambda: sluice.Recipe('none'), lambda: torch.zeros(2) @ torch.zeros(3)):\n"
        "    try:\n"
        "        fail()\n"
        "        raise SystemExit('accepted')\n"
        "    except (sluice.Error, RuntimeError) as error:\n"
        "        assert str(error)\n"
        "print(torch.arange(6.0).reshape(2, 3), sluice.Backend('cpu'))\n")
    assert "3., 4., 5." in out


# Everything that a layer is made of, alive when the interpreter ends.
MADE = """
import sluice, sluice.compat.deep_ep, sluice.compat.w4a8
sluice._core._report_leaks({report})
checkpoint = sluice.make_checkpoint({folder!r}, sluice.ModelGeometry.preset("tiny"))
x, *routing = sluice.make_workload(checkpoint.geometry, 4)
backend = sluice.Backend("cpu", num_threads=1)
engine = sluice.Engine(checkpoint, sluice.Transport.inproc(1)[0], backend, layer=3, max_tokens_per_rank=4)
y = sluice.moe_forward(engine, x, sluice.Routing(*routing), mode="low-latency")
"""
ENDINGS = {
    "in globals": "",
    "in a cycle": "class Holder: pass\nholder = Holder()\nholder.engine, holder.me = engine, holder\ndel holder",
    "in another module": "import json\njson.kept = engine",
    "in a cache": "import functools\nfunctools.lru_cache(lambda key: engine)(1)",
    "at exit": "import atexit\natexit.register(print, engine, end='')",
    "in an error": "try:\n    sluice.moe_forward(engine, x[:, :5], None, mode='low-latency')\n"
                   "except Exception as error:\n    kept = error",
}
HELD_BY_A_THREAD = """
import threading
threading.Thread(target=lambda held: threading.Event().wait(), args=(engine,), daemon=True).start()
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_leaked_at_exit(ending, tmp_path):
    done = process(MADE.format(report=True, folder=str(tmp_path / "model")) + ENDINGS[ending])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("report", [False, True])
def test_a_thread_that_never_ends_is_not_reported(report, tmp_path):
    """It does hold its objects: the report that is off otherwise says so."""
    done = process(MADE.format(report=report, folder=str(tmp_path / "model")) + HELD_BY_A_THREAD)
    assert done.returncode == 0 and ("nanobind: leaked" in done.stderr) == report, done.stderr
    assert report or done.stderr == ""


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

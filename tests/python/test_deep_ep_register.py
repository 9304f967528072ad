"""sluice.compat.deep_ep.register(): the name deep_ep, taken in a process and never from somebody else.

Each case is a process of its own, since a module once imported stays.
"""

import subprocess
import sys

import pytest

HEAD = """
import importlib, importlib.util, sys
import sluice
from sluice.compat import deep_ep as ours
"""


def run(code, folder=None):
    """Of a process that finds modules in `folder` first."""
    code = (f"import sys\nsys.path.insert(0, {str(folder)!r})\n" if folder else "") + HEAD + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_module():
    run("""
assert ours.register() is ours.register()
assert importlib.util.find_spec("deep_ep").name == "deep_ep"  # What engines ask.
import deep_ep
from deep_ep import Buffer, Config, EventOverlap
assert deep_ep is sys.modules["deep_ep"] and deep_ep.__spec__.name == deep_ep.__name__ == "deep_ep"
assert Buffer is ours.Buffer and Config is ours.Config and EventOverlap is ours.EventOverlap
assert "int64" in str(deep_ep.topk_idx_t)
assert deep_ep.__version__ == ours.__version__ and deep_ep.__version__.endswith(sluice.__version__)
for name in ("ElasticBuffer", "buffer", "__path__"):
    assert not hasattr(deep_ep, name), name
try:
    import deep_ep.utils
except ModuleNotFoundError as error:
    assert "not a package" in str(error)
else:
    raise AssertionError("deep_ep.utils")
deep_ep.Buffer = None  # A patch of this name is no patch of Sluice's.
assert ours.Buffer is Buffer
""")


@pytest.mark.parametrize("is_imported", [False, True], ids=["installed", "imported"])
def test_another_deep_ep(tmp_path, is_imported):
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("class Buffer: pass\n")
    run("""
if IMPORTED:
    import deep_ep
    theirs = deep_ep.Buffer
    try:
        ours.register()
    except sluice.Error as error:
        assert error.code == "unsupported" and deep_ep.__file__ in str(error), error
    else:
        raise AssertionError("no error")
    import deep_ep
    assert deep_ep.Buffer is theirs
else:  # Installed only: ours, as long as this process lives.
    ours.register()
    import deep_ep
    assert deep_ep.Buffer is ours.Buffer
""".replace("IMPORTED", str(is_imported)), tmp_path)


def test_beside_the_distribution_of_the_name():
    from pathlib import Path

    run("""
import deep_ep
assert ours.register() is deep_ep and deep_ep.Buffer is ours.Buffer
assert deep_ep.__version__ == ours.__version__
""", Path(__file__).parents[2] / "python" / "deep_ep_shim")

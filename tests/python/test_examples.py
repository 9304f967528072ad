"""The examples run, and every block of code in the documentation does, in order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "python" / "examples"


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["numpy_layer", "deep_ep_layer"])
def test_numpy_examples(name):
    out = run(EXAMPLES / f"{name}.py")
    assert "DIFFER" not in out and ("agree" in out or "same bytes" in out)


def has_gpu():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_example(device):
    if not has_gpu() and device == "cuda":
        pytest.skip("torch sees no CUDA device")
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
              EXAMPLES / "torch_layer.py", "--device", device)
    assert out.count("|y| =") == 2 and "DIFFER" not in out


def test_torch_comparison():
    device, preset = ("cuda", "r1-slice") if has_gpu() else ("cpu", "tiny")
    out = run(EXAMPLES / "torch_compare.py", "--device", device, "--preset", preset, "--tokens", "1",
              "--repeats", "5")
    assert "eager us" in out


@pytest.mark.parametrize("page", ["python.md", "deep_ep.md"])
def test_documentation(page, tmp_path, monkeypatch):
    """Blocks marked ```python share one namespace; ```python torch run where torch is."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    namespace, num_run = {}, 0
    for match in re.finditer(r"^```python( torch)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1]:
            try:
                import torch  # noqa: F401
            except ImportError:
                continue
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[2], str(ROOT / "docs" / page), "exec"), namespace)
        num_run += 1
    assert num_run > 0

"""The examples run, and every block of code in the documentation does, in order."""

import os
import re
import shlex
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


def have_or_skip(needs):
    """needs: words of torch, cuda (torch with a GPU) and transformers (and the command line, to convert)."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if "cuda" in needs and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if "transformers" in needs:
        pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        if not os.environ.get("SLUICE_COMMAND"):
            pytest.skip("SLUICE_COMMAND does not name a built command line")


def command_of(line):
    """What a line of a page runs, with this interpreter."""
    program, *arguments = shlex.split(line)
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[program]
    return [*launcher, *(ROOT / a if a.startswith("python/") else a for a in arguments)]


def pattern_of(output):
    """The words of a page with any number for a number; none of them, any output."""
    words = [re.sub(r"\d+(\\\.\d+)?", r"\\d+(\\.\\d+)?", re.escape(word)) for word in output.split()]
    return r"\s+".join(words) or ".*"


PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "examples").glob("*.md"))}
CONSOLE = re.compile(r"^```console((?: torch| cuda| transformers)*)\n\$ (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
RUNS = [(name, *match.groups()) for name, page in PAGES.items() for match in CONSOLE.finditer(page)]


@pytest.mark.parametrize("name, needs, command, output", RUNS,
                         ids=[f"{name}-{(needs or ' cpu').strip()}" for name, needs, _, _ in RUNS])
def test_example_prints_what_its_page_shows(name, needs, command, output):
    if needs:
        have_or_skip(needs.split())
    assert f"python/examples/{name}.py" in command
    printed = run(*command_of(command))
    assert "DIFFER" not in printed
    assert re.fullmatch(pattern_of(output), printed.strip(), re.DOTALL), printed


def test_every_example_has_a_page_with_its_code():
    """And what a page quotes stands in the example."""
    assert set(PAGES) == {path.stem for path in EXAMPLES.glob("*.py")} == {name for name, *_ in RUNS}
    for name, page in PAGES.items():
        example = (EXAMPLES / f"{name}.py").read_text()
        quoted = re.findall(r"^```python of the example\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        assert quoted and all(code in example for code in quoted), name


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

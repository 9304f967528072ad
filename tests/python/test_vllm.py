"""sluice.integrations.vllm under vLLM's own code: rank_of_vllm.py says what that is. One process runs every case, on
the GPU where there is one."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import engine_stubs
import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11.
torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
if engine_stubs.path_of("vllm") is None:
    pytest.skip("no vLLM in build/engines: scripts/setup.sh fetches its Python files", allow_module_level=True)

GROUP = "vllm.general_plugins"
CASES = ["w4afp8", "w4afp8-static", "packed-32", "packed-128", "tensor-parallel", "expert-map", "all-gather",
         "low-latency-2", "low-latency-2-static", "low-latency-4", "high-throughput-4", "deepseek-v4",
         "deepseek-v4-low-latency", "kimi-k3", "kimi-k3-high-throughput", "mxfp4-packed", "mxfp4-padded", "refused",
         "moved"]


def declared():
    return tomllib.loads((engine_stubs.ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the program printed. vLLM finds the plug-in by its entry point: installed, or as pip would write it."""
    folder = tmp_path_factory.mktemp("vllm")
    paths = [str(Path(__file__).parent), *sys.path]
    if not entry_points(group=GROUP, name="sluice"):
        info = folder / "site" / "sluice-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(f"{k} = {v}\n" for k, v in declared().items()))
        paths.append(str(folder / "site"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
    environment.setdefault("SLUICE_ENGINE_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    environment.pop("VLLM_PLUGINS", None)
    program = Path(__file__).with_name("rank_of_vllm.py")
    done = subprocess.run([sys.executable, str(program), str(folder)], env=environment, text=True, timeout=280,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_a_layer_from_its_file_to_its_output(output, case):
    lines = output.splitlines()
    assert any(line.startswith(f"ok {case} ") for line in lines), output


def test_the_log_says_that_sluice_is_in_use(output):
    said = "Sluice .* computes the routed experts: {} as W4A8 .*recipe {}, {} with {}"
    for parts in [("W4AFP8", "direct-bf16", "StandardExperts", "MoEPrepareAndFinalizeNoDPEPModular"),
                  ("W4AFP8", "direct", "BatchedExperts", "DeepEPLLPrepareAndFinalize"),
                  ("W4AFP8", "requant-static", "BatchedExperts", "DeepEPLLPrepareAndFinalize"),
                  ("W4AFP8", "direct", "StandardExperts", "DeepEPHTPrepareAndFinalize"),
                  ("DeepSeek-V4 MXFP4", "direct", "BatchedExperts", "DeepEPLLPrepareAndFinalize"),
                  ("MXFP4", "direct-bf16", "StandardExperts", "MoEPrepareAndFinalizeNoDPEPModular"),
                  ("compressed-tensors INT4", "direct-bf16", "StandardExperts", "MoEPrepareAndFinalizeNoDPEPModular")]:
        assert re.search(said.format(*parts), output), (parts, output)

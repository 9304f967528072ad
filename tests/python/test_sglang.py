"""sluice.integrations.sglang under SGLang's own code: sglang_layer.py runs it, in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import engine_stubs
import pytest

import sluice

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
if engine_stubs.path_of("sglang") is None:
    pytest.skip("SGLang's Python files were not fetched (scripts/setup.sh)", allow_module_level=True)

import mxfp4_files  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# A rank's share of the other one is padded where its experts are cut: 192 of 384 to 256, 96 to 128.
MXFP4_SIZES = {"deepseek_v4": (256, 512), "kimi_k3": (256, 384)}
SIZES = {"num_experts": 8, "num_topk": 3, "hidden": 256, "intermediate": 512, "routed_scaling_factor": 2.5}


def make_checkpoints(folder):
    """As published: W4AFP8's input scales are bfloat16, calibrated or all 1.0; Kimi-K2's scheme has no
    activations."""
    sluice.make_checkpoint(folder / "w4afp8", sluice.ModelGeometry(**SIZES))
    for name, change in ("w4afp8", lambda s: s), ("w4afp8-ones", torch.ones_like):
        if name != "w4afp8":
            shutil.copytree(folder / "w4afp8", folder / name)
        for file in (folder / name).glob("*.safetensors"):
            tensors = load_file(file)
            scales = {n: change(t).bfloat16() for n, t in tensors.items() if n.endswith("input_scale")}
            save_file(tensors | scales, file)
    shutil.copytree(folder / "w4afp8", folder / "w4afp8-some")  # An expert without scales keeps SGLang's 1.0.
    for file in (folder / "w4afp8-some").glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if not (".experts.5." in n and "input_scale" in n)}, file)
    sluice.make_checkpoint(folder / "ct-32", sluice.ModelGeometry(**SIZES, group_size=32),
                           format="compressed-tensors", scale_dtype="bf16")
    shutil.copytree(folder / "ct-32", folder / "ct-32-w4a16")
    config = json.loads((folder / "ct-32-w4a16" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (folder / "ct-32-w4a16" / "config.json").write_text(json.dumps(config))
    for model, (hidden, intermediate) in MXFP4_SIZES.items():
        mxfp4_files.write(folder / model, model, hidden, intermediate)
    of_scales = lambda n: n.endswith(".scale")  # noqa: E731
    for name, change in {
        "f32": lambda n, t: t.float() if of_scales(n) else t,
        "scales": lambda n, t: t.float() * 1.5 if of_scales(n) else t,
        "floats": lambda n, t: t if of_scales(n) else t.float().to(torch.float8_e4m3fn),
        "missing": lambda n, t: None if n.endswith("experts.6.w2.scale") else t,
        "codes": lambda n, t: None if n.endswith("experts.6.w2.weight") else t,
    }.items():
        mxfp4_files.write(folder / f"deepseek_v4-{name}", "deepseek_v4", *MXFP4_SIZES["deepseek_v4"],
                          change=lambda tensors, change=change: {
                              n: new for n, t in tensors.items() if (new := change(n, t)) is not None})


PROGRAM = Path(__file__).with_name("sglang_layer.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (1, 2) if DEVICE == "cuda" else (1, 2, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of one run: results (check -> None or what went wrong), logs of the first ranks, the log of the launch."""
    folder = tmp_path_factory.mktemp("sglang")
    make_checkpoints(folder)
    settings = "SLUICE_RECIPE", "SLUICE_SGLANG", "SLUICE_MXFP4"
    environment = {n: v for n, v in os.environ.items() if not n.startswith(settings)}
    done = subprocess.run([sys.executable, PROGRAM, folder, DEVICE, *map(str, RANKS)], capture_output=True, text=True,
                          timeout=280, env=environment | {"PYTHONDONTWRITEBYTECODE": ""})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_runs_through_sglangs_own_classes(run, ranks):
    results = {name: what for name, what in run["results"].items() if name.startswith(f"{ranks} ranks")}
    wrong = [f"{name}: {what}" for name, what in results.items() if what]
    assert not wrong, "\n".join(wrong).encode().decode("unicode_escape")
    assert len(results) >= {1: 30, 2: 35, 4: 15}[ranks], sorted(results)


def test_the_log_says_what_runs(run):
    """With version and recipe; once for each kind of layer, not for each layer."""
    version = re.escape(sluice.__version__)
    lines = "\n".join(run["log"] + run["logs"]["1 ranks, deepep, auto"])
    line = rf"Sluice {version} computes W4AFP8, .* and MXFP4 experts .* SLUICE_RECIPE=auto, SLUICE_MXFP4=1"
    assert re.search(line, lines)
    of_two = "\n".join(run["logs"]["2 ranks, deepep, auto"])
    line = (rf"Sluice {version}: model\.layers\.3\.mlp\.experts: W4AFP8 experts, 4 of 8, hidden 256, "
            r"intermediate 512, groups of 128, swiglu, static scales of the checkpoint, .*deepep, s1 0.0178")
    assert re.search(line, of_two)
    assert of_two.count("compressed-tensors INT4 experts, 4 of 8, hidden 256, intermediate 512, groups of 32") == 1
    line = (rf"Sluice {version}: model\.layers\.3\.mlp\.experts: MXFP4 experts, 4 of 8, hidden 256, intermediate {{}}, "
            r"groups of 32, {}, dynamic scales for each 128 values, .*deepep")
    assert re.search(line.format(512, r"swiglu:limit=2\.5"), of_two)
    assert re.search(line.format(384, r"situ:beta=1\.5,linear_beta=1\.25"), of_two)
    cut = "\n".join(run["logs"]["2 ranks, all-reduce, experts cut"])
    assert "8 of 8, hidden 256, intermediate 256" in cut


def test_the_entry_point_is_declared():
    text = (engine_stubs.ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]\nsluice = "sluice.integrations.sglang:register"' in text


def test_switched_off_it_imports_nothing_of_sglang():
    program = "import sys; from sluice.integrations.sglang import register; register(); print('sglang' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env=os.environ | {"SLUICE_SGLANG": "0"})
    assert done.stdout.strip() == "False" and "switched off: SLUICE_SGLANG=0" in done.stderr


if __name__ == "__main__":
    make_checkpoints(Path(sys.argv[1]))

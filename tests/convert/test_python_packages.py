#!/usr/bin/env python3
"""Checkpoints through the Python packages that define their formats.

    test_python_packages.py SLUICE safetensors|compressed-tensors

Exit status 77: the package is not there, and why that is.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile

SLUICE, PACKAGE = sys.argv[1:3]
HIDDEN, INTERMEDIATE, EXPERTS, LAYER = 256, 128, 2, 3
STEMS = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN),
         "down_proj": (HIDDEN, INTERMEDIATE)}


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(77)


def sluice(*arguments):
    result = subprocess.run([SLUICE, *arguments], capture_output=True, text=True, timeout=100)
    if result.returncode != 0:
        sys.exit(f"FAILED: sluice {' '.join(arguments)}: {result.stdout}{result.stderr}")
    return result.stdout


def check(name, condition):
    if not condition:
        sys.exit(f"FAILED: {name}")
    print(f"ok: {name}")


def prefix(expert, stem):
    return f"model.layers.{LAYER}.mlp.experts.{expert}.{stem}."


def make(folder, name, layout, *arguments):
    path = os.path.join(folder, name)
    sluice("make-checkpoint", "--preset", "tiny", "--experts", str(EXPERTS), "--format", layout, "--out", path,
           *arguments)
    return path


def convert(folder, source, name, layout, *arguments):
    path = os.path.join(folder, name)
    out = sluice("convert", "--from", source, "--to", path, "--format", layout, *arguments)
    check(f"convert verifies {name}", "bit for bit" in out.split("verified")[-1])
    return path


def tensors_of(path, load_file):
    """Of every file in `path`, as the package's load_file() gives them."""
    tensors = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            tensors.update(load_file(os.path.join(path, name)))
    return tensors


# quantization_config as compressed-tensors 0.20.1 itself dumps it, for the schemes W4AFP8 (of its own
# presets) and symmetric INT4 without activations (Kimi-K2's, with groups of 32).
PACKAGE_CONFIG = {
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group",
                    "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None,
                              "strategy": "token", "dynamic": True},
        "output_activations": None, "format": None}},
    "quant_method": "compressed-tensors", "kv_cache_scheme": None, "format": "pack-quantized",
    "quantization_status": "compressed", "global_compression_ratio": None, "ignore": ["lm_head"],
    "moe_sparsity_config": None}


def write_config(path, quantization):
    config = {"model_type": "made_by_python", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
              "n_routed_experts": EXPERTS, "num_experts_per_tok": 1, "quantization_config": quantization}
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)


# SHA-256 of weight_packed, weight_scale and weight_shape of known_matrix(), as compressed-tensors
# 0.20.0 writes them, by group size. with_compressed_tensors() holds the package against these,
# with_safetensors() the plain NumPy code that stands for it where there is no PyTorch.
PACKAGE_DIGESTS = {128: "eb1441eb59840e7e3789d007cbf0e00ccb1e9b2c1f6dfd7ae12e7078db94d475",
                   32: "5a07cb82dc6d78e85e79e65d3741fbf8dc35bc190dab6893fd849209ee3eb7e4"}
KNOWN_SHAPE = (64, 256)


def known_matrix(group):
    """Codes -8..7, scales that are powers of two: no rounding anywhere."""
    n, k = KNOWN_SHAPE
    codes = [[(37 * i + 101 * j + i * j % 17) % 16 - 8 for j in range(k)] for i in range(n)]
    scales = [[2.0 ** -(5 + (i + g) % 3) for g in range(k // group)] for i in range(n)]
    return codes, scales


def digest(packed, scale, shape):
    return hashlib.sha256(packed.tobytes() + scale.tobytes() + shape.tobytes()).hexdigest()


def with_safetensors():
    try:
        import numpy as np
        from safetensors.numpy import load_file, save_file
    except ImportError as error:
        skip(f"{error}; scripts/setup.sh installs it")

    def signed(nibbles):
        return ((nibbles.astype(np.int8) ^ 8) - 8).astype(np.int8)

    def along_k(data):
        data = data.view(np.uint8)
        return signed(np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1))

    def along_n(data):
        return signed(np.stack([data & 15, data >> 4], axis=1).reshape(-1, data.shape[1]))

    def from_words(data):
        words = data.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))
        return ((words & 15).astype(np.int8) - 8).reshape(data.shape[0], -1)

    readers = {"w4afp8": ("weight", "weight_scale_inv", along_k),
               "compressed-tensors": ("weight_packed", "weight_scale", from_words),
               "angelslim": ("qweight", "weight_scale.int4", along_k),
               "modelopt-w4a8-awq": ("weight", "weight_scale", along_n)}

    def experts(path, layout):
        """codes [N, K] and scales [N, groups] of every matrix."""
        weight, scale, unpack = readers[layout]
        tensors = tensors_of(path, load_file)
        return {(e, stem): (unpack(tensors[prefix(e, stem) + weight]), tensors[prefix(e, stem) + scale])
                for e in range(EXPERTS) for stem in STEMS}

    def to_words(codes):
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for i in range(8):
            words |= (codes[:, i::8].astype(np.int32) + 8).astype(np.uint32) << np.uint32(4 * i)
        return words.view(np.int32)

    for group, expected in PACKAGE_DIGESTS.items():
        codes, scales = known_matrix(group)
        found = digest(to_words(np.array(codes, np.int8)), np.array(scales, np.float32),
                       np.array(KNOWN_SHAPE, np.int64))
        check(f"packed as compressed-tensors packs, groups of {group}", found == expected)

    def same(a, b):
        return all(np.array_equal(a[key][0], b[key][0]) and a[key][1].tobytes() == b[key][1].tobytes()
                   for key in a)

    with tempfile.TemporaryDirectory() as folder:
        reference = experts(make(folder, "w4afp8", "w4afp8"), "w4afp8")
        check("shapes", all(reference[0, stem][0].shape == shape for stem, shape in STEMS.items()))
        for layout in readers:
            path = os.path.join(folder, layout) if layout == "w4afp8" else make(folder, layout, layout)
            check(f"make-checkpoint {layout}", same(reference, experts(path, layout)))
            made = convert(folder, path, f"{layout}-ct", "compressed-tensors")
            check(f"convert {layout}", same(reference, experts(made, "compressed-tensors")))
        shape = tensors_of(os.path.join(folder, "w4afp8-ct"), load_file)[prefix(0, "down_proj") + "weight_shape"]
        check("weight_shape", shape.dtype == np.int64 and shape.tolist() == [HIDDEN, INTERMEDIATE])

        # And a checkpoint that this package wrote.
        random = np.random.default_rng(1)
        path = os.path.join(folder, "python")
        os.mkdir(path)
        tensors, expected = {}, {}
        for e in range(EXPERTS):
            for stem, (n, k) in STEMS.items():
                codes = np.clip(np.rint(random.normal(0, 2.5, (n, k))), -8, 7).astype(np.int8)
                scales = random.uniform(1e-4, 1e-2, (n, k // 128)).astype(np.float32)
                expected[e, stem] = (codes, scales)
                tensors[prefix(e, stem) + "weight_packed"] = to_words(codes)
                tensors[prefix(e, stem) + "weight_scale"] = scales
                tensors[prefix(e, stem) + "weight_shape"] = np.array([n, k], np.int64)
        save_file(tensors, os.path.join(path, "model.safetensors"))
        write_config(path, PACKAGE_CONFIG)
        out = sluice("inspect", path)
        check("inspect names it", "compressed-tensors" in out and "stored as the format says" in out
              and "groups of 128, dynamic e4m3 activations" in out)
        w4afp8 = convert(folder, path, "python-w4", "w4afp8")
        check("python to w4afp8", same(expected, experts(w4afp8, "w4afp8")))

        # A user's own dump, replayed.
        dump, report = os.path.join(folder, "dump.safetensors"), os.path.join(folder, "accuracy.json")
        tokens = {"x": random.normal(0, 1, (9, HIDDEN)).astype(np.float32),
                  "topk_idx": np.array([[t % EXPERTS] for t in range(9)], np.int64),
                  "topk_weights": np.ones((9, 1), np.float32)}
        tokens["topk_idx"][4, 0] = -1
        save_file(tokens, dump)
        out = sluice("accuracy", "--checkpoint", w4afp8, "--replay", dump, "--ranks", "2", "--budget", "50%",
                     "--json", report)
        with open(report, encoding="utf-8") as file:
            data = json.load(file)
        suite = data["suites"][0]
        check("accuracy --replay", len(data["suites"]) == 1 and suite["name"] == "replay" and suite["num_tokens"] == 9
              and suite["num_rows"] == 8 and data["passed"] and "replay: 9 tokens, 8 rows" in out)
        # GEMM1's input of `direct`, by plain NumPy on the same tokens: amax / 448 of each 128, to 3 bits.
        x = (tokens["x"].view(np.uint32) + 0x7fff + (tokens["x"].view(np.uint32) >> 16 & 1)) >> 16 << 16
        x = x.astype(np.uint32).view(np.float32).astype(np.float64).reshape(9, -1, 128)
        scale = np.abs(x).max(-1, keepdims=True) / 448
        step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(x / scale), 2.0 ** -9))) - 3, -9)
        error = np.linalg.norm(np.rint(x / scale / step) * step * scale - x) / np.linalg.norm(x)
        direct = next(r for r in suite["recipes"] if r["name"] == "direct")
        check(f"direct's activation error is NumPy's {error:.6f}",
              abs(direct["activation1"]["relative_l2"] / error - 1) < 1e-3)


def with_compressed_tensors():
    try:
        import torch
        from compressed_tensors.compressors import PackedQuantizationCompressor as compressor
        from compressed_tensors.quantization import (QuantizationArgs, QuantizationConfig, QuantizationScheme,
                                                     preset_name_to_scheme)
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        skip(f"{error}; compressed-tensors needs PyTorch, which scripts/setup.sh does not install")

    def scheme(group):
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
            num_bits=4, type="int", symmetric=True, strategy="group", group_size=group))

    for group, expected in PACKAGE_DIGESTS.items():
        codes, scales = known_matrix(group)
        scale = torch.tensor(scales)
        weight = torch.tensor(codes, dtype=torch.float32) * scale.repeat_interleave(group, dim=-1)
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme(group))
        found = digest(*(state[part].contiguous().numpy()
                         for part in ("weight_packed", "weight_scale", "weight_shape")))
        check(f"the package packs as recorded, groups of {group}: {found}", found == expected)

    def decompressed(tensors, expert, stem, group):
        head = prefix(expert, stem)
        state = {name[len(head):]: t for name, t in tensors.items() if name.startswith(head)}
        return compressor.decompress(state, scheme(group))["weight"]

    def w4afp8_weight(tensors, expert, stem):
        data = tensors[prefix(expert, stem) + "weight"].view(torch.uint8)
        codes = torch.stack([data & 15, data >> 4], dim=-1).reshape(data.shape[0], -1).to(torch.int32)
        codes = torch.where(codes > 7, codes - 16, codes).to(torch.float32)
        return codes * tensors[prefix(expert, stem) + "weight_scale_inv"].repeat_interleave(128, dim=-1)

    with tempfile.TemporaryDirectory() as folder:
        # What Sluice writes, the package accepts and reads.
        w4afp8 = make(folder, "w4afp8", "w4afp8")
        reference = tensors_of(w4afp8, load_file)
        for name, path in (("make-checkpoint", make(folder, "made", "compressed-tensors")),
                           ("convert", convert(folder, w4afp8, "converted", "compressed-tensors"))):
            with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
                config = QuantizationConfig.model_validate(json.load(file)["quantization_config"])
            check(f"{name}: config", config.config_groups["group_0"].weights.group_size == 128)
            tensors = tensors_of(path, load_file)
            check(f"{name}: weights", all(
                torch.equal(decompressed(tensors, e, stem, 128), w4afp8_weight(reference, e, stem))
                for e in range(EXPERTS) for stem in STEMS))

        # What the package writes, Sluice reads.
        for group in (128, 32):
            torch.manual_seed(group)
            path = os.path.join(folder, f"package-{group}")
            os.mkdir(path)
            tensors, expected = {}, {}
            for e in range(EXPERTS):
                for stem, (n, k) in STEMS.items():
                    weight = 0.02 * torch.randn(n, k)
                    scale = weight.view(n, -1, group).abs().amax(-1) / 7.5
                    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme(group))
                    expected[e, stem] = compressor.decompress(dict(state), scheme(group))["weight"]
                    for part, tensor in state.items():
                        tensors[prefix(e, stem) + part] = tensor.contiguous()
            save_file(tensors, os.path.join(path, "model.safetensors"))
            activations = preset_name_to_scheme("W4AFP8", ["Linear"]).input_activations if group == 128 else None
            own = scheme(group).model_copy(update={"input_activations": activations})
            quantization = QuantizationConfig(config_groups={"group_0": own}, format="pack-quantized",
                                              quantization_status="compressed", ignore=["lm_head"])
            write_config(path, quantization.model_dump(mode="json"))
            expected_text = f"groups of {group}, {'dynamic e4m3' if activations else 'no scheme for'} activations"
            check(f"inspect, groups of {group}", expected_text in sluice("inspect", path))
            layout = "w4afp8" if group == 128 else "compressed-tensors"
            made = tensors_of(convert(folder, path, f"back-{group}", layout), load_file)
            check(f"package to {layout}, groups of {group}", all(
                torch.equal(w4afp8_weight(made, e, stem) if group == 128 else decompressed(made, e, stem, group), w)
                for (e, stem), w in expected.items()))


{"safetensors": with_safetensors, "compressed-tensors": with_compressed_tensors}[PACKAGE]()

"""Small checkpoints in published layouts, written from docs/checkpoint-formats.md with numpy and json alone."""

import json
import struct

import numpy as np

EXPERTS, HIDDEN, INTERMEDIATE, LAYER = 3, 256, 384, 2
MATRICES = {"gate": ("gate_proj", INTERMEDIATE, HIDDEN), "up": ("up_proj", INTERMEDIATE, HIDDEN),
            "down": ("down_proj", HIDDEN, INTERMEDIATE)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FORMATS = ("w4afp8", "compressed-tensors", "compressed-tensors-128", "mxfp4-pack-quantized", "deepseek-fp4",
           "gpt-oss", "modelopt", "angelslim")
CONFIG = {"model_type": "deepseek_v3", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
          "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_act": "silu", "num_hidden_layers": 3,
          "first_k_dense_replace": 2, "routed_scaling_factor": 1.0}


def pairs(codes):
    """Two codes to a byte, even k in the low nibble."""
    return (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8)


def words(codes):
    """Eight codes, each raised by 8, to an int32."""
    raised = (codes + 8).astype(np.uint32).reshape(len(codes), -1, 8)
    return np.bitwise_or.reduce(raised << np.arange(0, 32, 4, dtype=np.uint32), axis=2).view(np.int32)


class Checkpoint:
    """`config`, `tensors` (name: (dtype, array)) and `weights` (matrix: float32 of each expert)."""

    def __init__(self, kind, seed=0):
        self.rng, self.tensors, self.config = np.random.default_rng(seed), {}, dict(CONFIG)
        self.weights = {name: [] for name in MATRICES}
        self.bias = {name: [] for name in MATRICES}
        self.limit, self.alpha = 0, 1  # Of the activation.
        getattr(self, "make_" + kind.replace("-", "_"))()

    def add(self, name, dtype, array):
        self.tensors[f"model.layers.{LAYER}.mlp.experts.{name}"] = dtype, np.ascontiguousarray(array)

    def matrices(self, group, bits=True):
        """Each matrix of each expert as (prefix, role, codes, scales), and its weights kept."""
        for e in range(EXPERTS):
            for role, (stem, n, k) in MATRICES.items():
                if bits:
                    codes = np.clip(np.rint(self.rng.normal(0, 2.5, (n, k))), -8, 7).astype(np.int64)
                    # Exact in bf16 and in f16.
                    scales = (self.rng.integers(128, 256, (n, k // group)) / 4096).astype(np.float32)
                    values = codes.astype(np.float32)
                else:
                    codes = self.rng.integers(0, 16, (n, k))
                    exponents = self.rng.integers(115, 122, (n, k // group)).astype(np.uint8)
                    scales, values = exponents, E2M1[codes]
                wide = scales if bits else np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
                self.weights[role].append(values * np.repeat(wide, group, axis=1))
                yield f"{e}.{stem}.", role, codes, scales

    def make_w4afp8(self):
        for prefix, _, codes, scales in self.matrices(128):
            self.add(prefix + "weight", "I8", pairs(codes))
            self.add(prefix + "weight_scale_inv", "F32", scales)
        self.config["quantization_config"] = {"quant_method": "w4afp8"}

    def make_compressed_tensors(self, group=32):
        for prefix, _, codes, scales in self.matrices(group):
            self.add(prefix + "weight_packed", "I32", words(codes))
            self.add(prefix + "weight_scale", "BF16", (scales.view(np.uint32) >> 16).astype(np.uint16))
            self.add(prefix + "weight_shape", "I64", np.array(codes.shape, np.int64))
        self.compressed("pack-quantized", {"num_bits": 4, "type": "int", "group_size": group})

    def make_compressed_tensors_128(self):
        self.make_compressed_tensors(128)

    def compressed(self, format, weights):
        weights |= {"symmetric": True, "strategy": "group", "actorder": None, "dynamic": False}
        self.config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": format, "ignore": ["re:.*self_attn.*"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}

    def make_mxfp4_pack_quantized(self):
        for prefix, role, codes, scales in self.matrices(32, bits=False):
            self.add(prefix + "weight_packed", "U8", pairs(codes))
            self.add(prefix + "weight_scale", "U8", scales)
            self.bias[role].append(self.rng.normal(size=len(codes)).astype(np.float32))
            self.add(prefix + "bias", "F32", self.bias[role][-1])
        self.compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32})

    def make_deepseek_fp4(self):
        for prefix, _, codes, scales in self.matrices(32, bits=False):
            self.add(prefix + "weight", "I8", pairs(codes))
            self.add(prefix + "scale", "F8_E8M0", scales)
        self.limit = 2.0
        self.config |= {"expert_dtype": "fp4", "model_type": "deepseek_v4", "swiglu_limit": 2.0,
                        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

    def make_gpt_oss(self):
        blocks, scales, bias = {}, {}, {}
        for stem, n, k in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
            blocks[stem] = np.zeros((EXPERTS, n, k // 32, 16), np.uint8)
            scales[stem] = np.zeros((EXPERTS, n, k // 32), np.uint8)
            bias[stem] = np.zeros((EXPERTS, n), np.float32)
        for prefix, role, codes, exponents in self.matrices(32, bits=False):
            stem = "down_proj" if role == "down" else "gate_up_proj"
            rows = slice(None) if role == "down" else slice(int(role == "up"), None, 2)
            e = int(prefix.split(".")[0])
            self.bias[role].append(self.rng.normal(size=len(codes)).astype(np.float32))
            blocks[stem][e, rows] = pairs(codes).reshape(len(codes), -1, 16)
            scales[stem][e, rows], bias[stem][e, rows] = exponents, self.bias[role][-1]
        for stem in blocks:
            self.add(stem + "_blocks", "U8", blocks[stem])
            self.add(stem + "_scales", "U8", scales[stem])
            self.add(stem + "_bias", "F32", bias[stem])
        self.limit, self.alpha = 2.0, 1.702
        self.config |= {"model_type": "gpt_oss", "swiglu_limit": 2.0, "quantization_config": {"quant_method": "mxfp4"}}

    def make_modelopt(self):
        for prefix, role, codes, scales in self.matrices(128):
            self.add(prefix + "weight", "U8", pairs(codes.T).T)  # Even n in the low nibble.
            self.add(prefix + "weight_scale", "F32", scales)
            self.add(prefix + "weight_scale_2", "F32", np.float32(scales.max() * 7 / 448))
            self.add(prefix + "pre_quant_scale", "F32", np.full(codes.shape[1], 2, np.float32))
            self.weights[role][-1] = self.weights[role][-1] * 2
        self.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 128}

    def make_angelslim(self):
        for prefix, _, codes, scales in self.matrices(128):
            self.add(prefix + "qweight", "I8", pairs(codes))
            self.add(prefix + "weight_scale.int4", "F32", scales)
            self.add(prefix + "weight_scale", "F32", np.float32(scales.max() * 7 / 448))
        self.config["quantization_config"] = {"quant_method": "w4a8_awq"}

    def write(self, directory):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        header, blobs, at = {}, [], 0
        for name, (dtype, array) in self.tensors.items():
            blobs.append(array.tobytes())
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blobs[-1])]}
            at += len(blobs[-1])
        text = json.dumps(header).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
        return directory

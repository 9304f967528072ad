"""Files with the MXFP4 experts of one layer, by the names of the models that have them, and what they stand for.

Written here with torch alone; nothing of the package's is used for the file or for the reference.
"""

import json

import engine_reference
import torch
from torch.nn.functional import pad

EXPERTS, TOPK, LAYER = 8, 3, 3
FACTOR = 2.5  # routed_scaling_factor
# Model -> the experts' names, the endings of codes and scales, their types, and the activation, whose numbers are small
# enough to matter.
MODELS = {
    "deepseek_v4": ("layers.{layer}.ffn.experts.{expert}.{matrix}", ".weight", ".scale", torch.int8,
                    torch.float8_e8m0fnu, "swiglu", {"limit": 2.5}),
    "kimi_k3": ("language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}", ".weight_packed",
                ".weight_scale", torch.uint8, torch.uint8, "situ", {"beta": 1.5, "linear_beta": 1.25}),
}
QUANTIZATION = {
    "deepseek_v4": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
                    "weight_block_size": [128, 128]},
    "kimi_k3": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"],
                "config_groups": {"group_0": {
                    "targets": ["Linear"], "format": "mxfp4-pack-quantized", "input_activations": None,
                    "output_activations": None, "weights": {
                        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
                        "dynamic": False}}}},
}
_MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}


def name_of(model, expert, matrix, layer=LAYER):
    return MODELS[model][0].format(layer=layer, expert=expert, matrix=matrix)


def write(folder, model, hidden, intermediate, change=lambda tensors: tensors):
    """folder/config.json and folder/model.safetensors. Codes are any bytes, and scales 2^-7 to 2^-4."""
    from safetensors.torch import save_file

    _, codes_name, scales_name, codes_type, scales_type, activation, numbers = MODELS[model]
    draw, tensors = torch.Generator().manual_seed(11), {}
    for expert in range(EXPERTS):
        for matrix, (n, k) in {"w1": (intermediate, hidden), "w3": (intermediate, hidden),
                               "w2": (hidden, intermediate)}.items():
            name = name_of(model, expert, matrix)
            codes = torch.randint(0, 256, (n, k // 2), generator=draw, dtype=torch.uint8)
            scales = torch.randint(120, 124, (n, k // 32), generator=draw, dtype=torch.uint8)
            tensors |= {name + codes_name: codes.view(codes_type), name + scales_name: scales.view(scales_type)}
    folder.mkdir(parents=True)
    save_file(change(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": model, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOPK, "hidden_size": hidden,
        "moe_intermediate_size": intermediate, "routed_scaling_factor": FACTOR, "activation": activation,
        "numbers": numbers, "quantization_config": QUANTIZATION[model]}))


def _values(codes, scales):
    """float64 of e2m1 codes, two to a byte with even k low, and e8m0 scales of 32."""
    of_code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = codes.view(torch.uint8).long()
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    values = torch.where(nibbles < 8, 1.0, -1.0) * of_code[nibbles & 7]
    return values * torch.exp2(scales.view(torch.uint8).double() - 127).repeat_interleave(32, -1)


class Layer(engine_reference.Layer):
    """engine_reference.Layer of such a file. Widths that are no multiples of 128 are padded with zeros, as the experts
    have them padded: of the intermediate size each of the slices that it is cut into."""

    def __init__(self, folder):
        from safetensors.torch import load_file

        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        model = config["model_type"]
        codes_name, scales_name = MODELS[model][1:3]
        self._own = {}
        for matrix, attribute in _MATRICES.items():
            names = [name_of(model, expert, matrix) for expert in range(EXPERTS)]
            self._own[attribute] = torch.stack(
                [_values(tensors[name + codes_name], tensors[name + scales_name]) for name in names])
        self.activation = config["activation"], config["numbers"]

    def check(self, y, x, ids, weights, *, slices=1, **recipe):
        _, inner, hidden = self._own["gate"].shape
        more, wider = -hidden % 128, -(inner // slices) % 128
        for name in "gate", "up":
            cut = self._own[name].unflatten(1, (slices, inner // slices))
            setattr(self, name, pad(cut, (0, more, 0, wider)).flatten(1, 2))
        self.down = pad(pad(self._own["down"].unflatten(2, (slices, inner // slices)), (0, wider)).flatten(2, 3),
                        (0, 0, 0, more))
        return super().check(pad(y, (0, more)), pad(x, (0, more)), ids, weights, slices=slices, **recipe)

"""Random INT4 weights of a DeepSeek-V3 model, each expert fixed by its numbers: a W4AFP8 checkpoint of them, and
transformers' own experts with the same values."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

GROUP = 128
# A scale is 8 to 15 of these: code * scale has at most 7 bits, so it is a bfloat16 exactly. Weights come to a standard
# deviation of 0.026.
SCALE = 2.0**-11
MATRICES = ("gate", "up", "down")


def matrix(config, layer, expert, which, device):
    """(codes [n, k / 2] uint8: two's complement, even k low; scales [n, k / 128] float32)."""
    n, k = config.moe_intermediate_size, config.hidden_size
    if which == "down":
        n, k = k, n
    draw = torch.Generator(device=device)
    draw.manual_seed((layer * config.n_routed_experts + expert) * len(MATRICES) + MATRICES.index(which))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=draw)
    eighths = torch.randint(8, 16, (n, k // GROUP), device=device, generator=draw)
    return codes, eighths * SCALE


def dequantized(config, layer, expert, which, device):
    """[n, k] bfloat16, exactly."""
    codes, scales = matrix(config, layer, expert, which, device)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8)
    values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    return (values * scales.repeat_interleave(GROUP, 1)).bfloat16()


def _write_shard(path, tensors, data):
    """tensors: name -> (dtype, shape, bytes), in the order of data: tensors of any device. Returns all bytes."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in data:
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()))
    return at


def _experts(config, layer):
    """As _write_shard() takes tensors."""
    tensors, inner, hidden = {}, config.moe_intermediate_size, config.hidden_size
    for expert in range(config.n_routed_experts):
        for which in MATRICES:
            n, k = (hidden, inner) if which == "down" else (inner, hidden)
            name = f"model.layers.{layer}.mlp.experts.{expert}.{which}_proj.weight"
            tensors[name] = "I8", [n, k // 2], n * k // 2
            tensors[f"{name}_scale_inv"] = "F32", [n, k // GROUP], n * k // GROUP * 4
    return tensors


def _write_experts(path, config, layer, device):
    pairs = (matrix(config, layer, expert, which, device)
             for expert in range(config.n_routed_experts) for which in MATRICES)
    return _write_shard(path, _experts(config, layer), (tensor for pair in pairs for tensor in pair))


def _write_others(path, tensors, config, device):
    """Everything but the routed experts: matrices as a model is initialized, norms of ones, biases of zeros."""
    def data():
        draw = torch.Generator(device=device).manual_seed(1)
        for name, (_, shape, _) in tensors.items():
            if name.endswith("norm.weight"):
                yield torch.ones(shape, dtype=torch.bfloat16)
            elif name.endswith("bias"):
                yield torch.zeros(shape, dtype=torch.bfloat16)
            else:
                values = torch.empty(shape, dtype=torch.bfloat16, device=device)
                yield values.normal_(0, config.initializer_range, generator=draw)

    return _write_shard(path, tensors, data())


def write_checkpoint(folder, config, device):
    """A directory that from_pretrained() loads, a shard for each MoE layer. Returns the bytes of its tensors."""
    folder = Path(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    others = {name: ("BF16", list(t.shape), t.numel() * 2) for name, t in model.state_dict().items()
              if ".mlp.experts." not in name}
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    shards = {"others.safetensors": others} | {f"layer-{n}.safetensors": _experts(config, n) for n in layers}
    with ThreadPoolExecutor() as threads:
        written = [threads.submit(_write_others, folder / "others.safetensors", others, config, device)]
        written += [threads.submit(_write_experts, folder / f"layer-{n}.safetensors", config, n, device)
                    for n in layers]
        num_bytes = sum(each.result() for each in written)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}))
    config.architectures = [type(model).__name__]
    quantization = {"quant_method": "w4afp8", "group_size": GROUP, "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "quantization_config": quantization}, default=str))
    return num_bytes


# --- transformers' experts in the same model ------------------------------------------------------


def experts_of(model):
    """The experts' modules, by name, whoever computes them."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mlp.experts")}


def _release(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@torch.no_grad()
def put_bf16_experts(model):
    """In the place of Sluice's, whose memory is free before."""
    names, config = list(experts_of(model)), model.config
    for name in names:
        model.set_submodule(name, torch.nn.Identity())
    _release(model.device)
    for name in names:
        # Never in float32, for which two layers of R1 would have to be free.
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(model.device):
            experts = DeepseekV3Experts(config)
        torch.set_default_dtype(torch.float32)
        half = config.moe_intermediate_size
        for expert in range(config.n_routed_experts):
            for which, target in (("gate", experts.gate_up_proj[expert, :half]),
                                  ("up", experts.gate_up_proj[expert, half:]), ("down", experts.down_proj[expert])):
                target.copy_(dequantized(config, int(name.split(".")[2]), expert, which, model.device))
        model.set_submodule(name, experts)


@torch.no_grad()
def put_fp8_experts(model):
    """transformers' FP8 in blocks of 128 x 128, rounded from the bf16 experts that are there."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    kind = use_experts_implementation(experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    for name in list(experts_of(model)):
        with torch.device(model.device):
            fp8 = kind(config=model.config, block_size=(128, 128))
        for which in ("gate_up_proj", "down_proj"):
            targets = getattr(fp8, which).data, getattr(fp8, f"{which}_scale_inv").data
            for source, codes, scales in zip(getattr(model.get_submodule(name), which), *targets):
                blocks = source.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
                scale = blocks.abs().amax((1, 3)) / 448
                scales.copy_(scale)
                codes.copy_((blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).to(codes.dtype))
        model.set_submodule(name, fp8)

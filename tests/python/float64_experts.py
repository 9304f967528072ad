"""A W4A8 MoE layer in float64, from a W4AFP8 checkpoint's file and not through Sluice."""

import torch


def e4m3(values, static=None, vllms=False):
    """Rounded to e4m3 with the static scale, or with one for each 128 values: as docs/design.md has it, or as vLLM's
    operator. Returns float64. A code apart would be a per cent of the output."""
    groups = values.float().reshape(len(values), -1, 128)
    if static:
        scale, codes = torch.tensor(static), groups * (1 / torch.tensor(static))
    else:
        largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
        scale = largest / 448 if vllms else largest * torch.tensor(1 / 448)
        # Not 448 / largest: torch makes that a reciprocal and a product, rounded twice.
        codes = groups / scale if vllms else groups * (torch.full_like(largest, 448) / largest)
    return (codes.clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()).reshape(values.shape)


def matrices(folder, prefix, expert):
    """The expert's gate, up and down in float64, from the W4AFP8 file, not through Sluice."""
    from safetensors import safe_open

    (path,) = folder.glob("model-*.safetensors")
    with safe_open(path, "pt") as file:
        for name in "gate", "up", "down":
            codes = file.get_tensor(f"{prefix}.{expert}.{name}_proj.weight").view(torch.uint8)
            scale = file.get_tensor(f"{prefix}.{expert}.{name}_proj.weight_scale_inv")
            nibbles = torch.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).double()
            signed = torch.where(nibbles > 7, nibbles - 16, nibbles).reshape(len(codes), -1, 128)
            yield (signed * scale.double()[..., None]).reshape(len(codes), -1)


def check_output(folder, prefix, y, x, ids, weights, *, static=None, quantizer=None):
    """Every element of y [tokens, hidden] against float64 with the recipe's roundings of activations.

    folder, prefix: a W4AFP8 checkpoint, and its experts' name. ids, weights [tokens, topk]: the routing. static:
    (s1, s2), or None for scales of 128 values. quantizer: what rounds x to e4m3 before an exchange, "vLLM" or "DeepEP";
    None if the rows arrive in bf16.

    What is left: h on the other side of a tie of e4m3 (a share of the sum of absolute products), bf16 of each expert's
    row and of their sum (2^-8 each)."""
    s1, s2 = static or (None, None)
    rows = e4m3(x, vllms=quantizer == "vLLM") if quantizer else x
    rows = e4m3(rows, s1) if s1 or not quantizer else rows
    expected, products, size = (torch.zeros(y.shape, dtype=torch.float64) for _ in range(3))
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up, down = matrices(folder, prefix, expert)
        h = e4m3(torch.nn.functional.silu(rows[token] @ gate.T) * (rows[token] @ up.T), s2)
        weight = weights[token, slot].double()[:, None]
        row = h @ down.T
        expected.index_add_(0, token, weight * row)
        size.index_add_(0, token, weight * row.abs())
        products.index_add_(0, token, weight * (h.abs() @ down.abs().T))
    error = (y.double() - expected).abs()
    bound = 2**-7 * size + 2**-8 * products
    worst = (error / bound).max().item()
    l2 = (error.norm() / expected.norm()).item()
    print(f"worst element at {worst:.2f} of its bound, relative L2 {l2:.2e}", flush=True)
    assert expected.norm() > 0 and worst <= 1 and l2 < 4e-3, (worst, l2)

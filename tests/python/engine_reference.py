"""An MoE layer in float64, with the roundings of a recipe, and how far from it each element may be."""

import torch

HALF_BF16 = 1.01 * 2.0**-8  # What a rounding to bfloat16 is off by at most, relative.
F32 = 2.0**-22  # A few operations in float32, relative.
# Sums of some hundred products, relative to the sum of their sizes. On a GPU bits are dropped that 13 fraction bits
# do not hold (docs/design.md): with few groups of 128, which average less, about this much.
SUMS = {"cpu": 2.0**-20, "cuda": 2.0**-12}
SHARE = {"cpu": 0.9, "cuda": 0.6}  # What check() returns at least, for such bounds.


def e4m3(v, error):
    """float64 rounded to e4m3, ties to even; and how far off the code may be if v may be off by `error`."""
    v = v.clamp(-448, 448)
    exponent = torch.frexp(v.abs().clamp(min=2.0**-6)).exponent - 1
    spacing = torch.ldexp(torch.ones_like(v), exponent - 3)
    code = torch.round(v / spacing)
    to_middle = ((v / spacing - code).abs() - 0.5).abs() * spacing
    return code * spacing, torch.where(to_middle <= error, error + spacing, 0.0)


def input_of_gemm1(x, fp8_wire, s1):
    """[..., k] float32 as include/sluice/quant.h defines it, operation by operation: to the bit. fp8_wire "vllm": what
    travels was quantized by vLLM's operator, which divides by the scale."""
    read = x
    if fp8_wire or s1 is None:
        groups = x.unflatten(-1, (-1, 128))
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
        scale, codes = amax * (torch.tensor(1.0) / 448), groups * (torch.tensor(448.0) / amax)
        if fp8_wire == "vllm":
            scale = amax / 448
            codes = groups / scale
        read = (codes.to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    if s1 is not None:
        s1 = torch.tensor(s1, dtype=torch.float32)
        read = (read * (1 / s1)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s1
    return read


def quantized(v, error, scale=None):
    """[..., k] as a GEMM reads it and the slack of each value, when v may be off by `error`: with a scale for each
    128, or with one given."""
    if scale is None:
        groups, errors = v.unflatten(-1, (-1, 128)), error.unflatten(-1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        of_scale = errors.amax(-1, keepdim=True) / (448 * scale)  # Relative: of the largest, and so of all.
        code, slack = e4m3(groups / scale, errors / scale + of_scale * groups.abs() / scale)
        return (code * scale).flatten(-2), (slack * scale + of_scale * (code * scale).abs()).flatten(-2)
    code, slack = e4m3(v / scale, error / scale)
    return code * scale, slack * scale


def activated(gate, up, kind, numbers):
    """Of SwiGLU, also with a limit, and of SiTU-GLU: what the gate gives and what up gives, whose product is h."""
    if kind == "situ":
        beta, linear_beta = numbers["beta"], numbers["linear_beta"]
        return beta * torch.tanh(gate / beta) * torch.sigmoid(gate), linear_beta * torch.tanh(up / linear_beta)
    limit = numbers.get("limit", float("inf"))
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate), up


def activated_near(gate, up, off_gate, off_up, kind, numbers):
    """activated(), and how far off either may be where its input is. It is furthest off at an end, but around a
    minimum of the gate's, whose second derivative is below 2."""
    values = activated(gate, up, kind, numbers)
    ends = [activated(gate + sign * off_gate, up + sign * off_up, kind, numbers) for sign in (-1, 1)]
    off_gate, off_up = (torch.maximum(*((end[i] - values[i]).abs() for end in ends)) + more
                        for i, more in enumerate((off_gate**2, 0)))
    return *values, off_gate, off_up


class Layer:
    """Experts as dequantized matrices in float64: gate, up [E, I, H] and down [E, H, I]."""

    activation: tuple[str, dict] = ("swiglu", {})

    def __init__(self, checkpoint, layer):
        num = checkpoint.geometry.num_experts
        weights = checkpoint.load_experts(layer, 0, num)
        self.gate, self.up, self.down = (
            torch.stack([_dequantized(*weights.matrix(e, name)) for e in range(num)])
            for name in ("gate", "up", "down"))

    def rows(self, x, ids, *, fp8_wire=False, scales=None, slices=1, device="cpu"):
        """Each entry's output [T, K, H], the slack of each element, and the size of what it is a sum of: the
        intermediate size is cut into `slices`. x: float64 of bfloat16. ids: -1 for none. device: where the output
        was computed."""
        s1, s2 = scales or (None, None)
        read = input_of_gemm1(x.float(), fp8_wire, s1).double()
        shape = *ids.shape, x.shape[1]
        y, slack, size = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        for e in ids.unique().tolist():
            if e >= 0:
                there = ids == e
                y[there], slack[there], size[there] = self._expert(
                    e, read[there.nonzero()[:, 0]], s2, slices, SUMS[device])
        return y, slack, size

    def _expert(self, e, read, s2, slices, sums):
        """One expert's rows [n, H]."""
        gate, up = (read @ w[e].T for w in (self.gate, self.up))
        off_gate, off_up = (sums * (read.abs() @ w[e].abs().T) for w in (self.gate, self.up))
        of_gate, of_up, off_gate, off_up = activated_near(gate, up, off_gate, off_up, *self.activation)
        h = of_gate * of_up
        off = off_gate * of_up.abs() + of_gate.abs() * off_up + off_gate * off_up + 4 * F32 * h.abs()
        h, near = quantized(h, off, s2)
        parts = torch.stack([a @ w.T for a, w in zip(h.chunk(slices, 1), self.down[e].chunk(slices, 1))])
        return parts.sum(0), (near + sums * h.abs()) @ self.down[e].abs().T, parts.abs().sum(0)

    def check(self, y, x, ids, weights, *, roundings, **recipe):
        """Raises AssertionError naming the worst element of y [T, H] of bfloat16; returns the share of elements
        that the sums of other experts would not have passed for, to show that the bound can fail.

        roundings: how many times parts of the sum are rounded to bfloat16 before the last time."""
        recipe["device"] = y.device.type
        x, weights, y = x.double().cpu(), weights.double().cpu()[..., None], y.double().cpu()
        ids = ids.long().cpu()
        rows, slack, parts = self.rows(x, ids, **recipe)
        wanted = (weights * rows).sum(1)
        of_parts = (weights * (slack + (roundings * HALF_BF16 + 1e-6) * parts)).sum(1)
        bound = of_parts + HALF_BF16 * wanted.abs() + 1e-30
        assert y.shape == wanted.shape and torch.isfinite(y).all(), f"shape {y.shape}, expected {wanted.shape}"
        ratio = (y - wanted).abs() / bound
        if not (ids >= 0).any():
            return 1.0
        worst = divmod(int(ratio.argmax()), y.shape[1])
        assert ratio.max() <= 1, (f"token {worst[0]}, element {worst[1]}: {y[worst]:.6g}, float64 {wanted[worst]:.6g}, "
                                  f"{ratio.max():.3g} of its bound; {int((ratio > 1).sum())} of {ratio.numel()} off")
        others = torch.where(ids < 0, ids, (ids + 1) % len(self.gate))
        wrong = (weights * self.rows(x, others, **recipe)[0]).sum(1)
        return float(((wrong - wanted).abs() > bound)[(ids >= 0).any(1)].double().mean())


def _dequantized(codes, scales):
    codes = torch.from_numpy(codes.copy()).view(torch.uint8).int()
    q = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    q = torch.where(q > 7, q - 16, q).double()
    if scales.dtype.itemsize == 2:  # bfloat16, as its bits.
        scales = torch.from_numpy(scales.copy()).view(torch.bfloat16)
    else:
        scales = torch.from_numpy(scales.copy())
    return q * scales.double().repeat_interleave(q.shape[1] // scales.shape[1], 1)

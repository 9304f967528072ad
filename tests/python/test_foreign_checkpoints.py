"""What was written elsewhere loads to the bit, and what is changed in it loads so or is refused, and nothing else."""

import copy
import random

import numpy as np
import pytest
from foreign_checkpoints import E2M1, EXPERTS, FORMATS, HIDDEN, LAYER, MATRICES, Checkpoint

import sluice


def weights_of(experts, expert, role):
    codes, scales = (np.asarray(a) for a in experts.matrix(expert, role)[:2])
    codes = codes.view(np.uint8)
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    if scales.dtype == np.uint8:
        values, scales = E2M1[codes], np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    else:
        values = ((codes.astype(np.int32) ^ 8) - 8).astype(np.float32)
        if scales.dtype == np.uint16:
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
    return values * np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)


def weights_are_right(made, experts):
    return all(np.array_equal(weights_of(experts, e, role), made.weights[role][e])
               for e in range(EXPERTS) for role in MATRICES)


def output_of(experts, backend):
    """Of fixed tokens: biases and the activation count here."""
    x = (np.random.default_rng(1).normal(size=(4, HIDDEN)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    local = sluice.LocalExperts(experts, backend, max_entries=4 * EXPERTS)
    idx = np.tile(np.arange(EXPERTS, dtype=np.int32), (4, 1))
    return np.asarray(local.forward(x, sluice.Routing(idx, np.ones((4, EXPERTS), np.float32))))


@pytest.fixture(scope="module")
def backend():
    return sluice.Backend("cpu", num_threads=1)


@pytest.fixture(scope="module", params=FORMATS)
def made(request, backend, tmp_path_factory):
    made = Checkpoint(request.param)
    experts = sluice.Checkpoint(made.write(tmp_path_factory.mktemp("made"))).load_experts(LAYER, 0, EXPERTS)
    made.output = output_of(experts, backend)
    assert weights_are_right(made, experts)
    return made


def test_outputs_are_those_of_the_weights(made):
    """With biases, in float64 and without rounding of activations: what rounding costs is 5.5 % at most."""
    x = (np.random.default_rng(1).normal(size=(4, HIDDEN)).astype(np.float32).view(np.uint32) >> 16 << 16)
    x, total = x.view(np.float32).astype(np.float64), 0
    for e in range(EXPERTS):
        w = {role: made.weights[role][e].astype(np.float64) for role in MATRICES}
        b = {role: made.bias[role][e] if made.bias[role] else 0 for role in MATRICES}
        gate, up = x @ w["gate"].T + b["gate"], x @ w["up"].T + b["up"]
        if made.limit:
            gate, up = np.minimum(gate, made.limit), np.clip(up, -made.limit, made.limit)
        hidden = gate / (1 + np.exp(-made.alpha * gate)) * (up + (made.alpha != 1))
        total = total + hidden @ w["down"].T + b["down"]
    output = (made.output.astype(np.uint32) << 16).view(np.float32)
    assert np.linalg.norm(output - total) < 0.055 * np.linalg.norm(total)


# Of one width. BF16 and F16 are left out: whose bits they are no file says.
OTHER_DTYPES = {"I8": ("U8", "F8_E4M3"), "U8": ("I8", "F8_E8M0", "F8_E4M3"), "F8_E8M0": ("U8", "I8"),
                "F32": ("I32",), "I32": ("F32",), "I64": ("F64",), "BF16": ("I16",)}
PARTS = ("bias", "weight_zero_point", "weight_g_idx", "norm.weight", "weight_scale_2", "pre_quant_scale", "scale")


def change(tensors, rng):
    """Changes one tensor, and says how."""
    name = rng.choice(list(tensors))
    dtype, array = tensors[name]
    kind = rng.choice(["drop", "rename", "transpose", "flatten", "dtype", "add"])
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        old, new = rng.choice([("experts.", "experts.0"), ("layers.", "layers.1"), ("_proj", "_projs"), ("mlp", "moe"),
                               ("weight", "weights"), ("scale", "scales"), ("gate", "up"), ("up", "down")])
        if old not in name or name.replace(old, new, 1) in tensors:
            return None
        tensors[name.replace(old, new, 1)] = tensors.pop(name)
        kind += f" {old} {new}"
    elif kind == "transpose" and array.ndim > 1:
        tensors[name] = dtype, np.ascontiguousarray(np.swapaxes(array, -1, -2))
    elif kind == "flatten" and array.ndim > 1:
        tensors[name] = dtype, array.reshape(-1)
    elif kind == "dtype":
        tensors[name] = rng.choice(OTHER_DTYPES[dtype]), array
    elif kind == "add":
        name = f"{name.rpartition('.')[0]}.{rng.choice(PARTS)}"
        if name in tensors:
            return None
        tensors[name] = "F32", np.ones(rng.choice([1, 2, 256]), np.float32)
    else:
        return None
    return f"{kind} {name}"


def test_what_is_changed_loads_the_same_or_is_refused(made, backend, tmp_path):
    """Never other numbers, another exception, or a refusal as corrupt of what is sound by itself."""
    rng, refused = random.Random(1), 0
    for _ in range(40):
        changed = copy.copy(made)
        changed.tensors = dict(made.tensors)
        what = change(changed.tensors, rng)
        if what is None:
            continue
        try:
            checkpoint = sluice.Checkpoint(changed.write(tmp_path / "model"))
            experts = checkpoint.load_experts(LAYER, 0, EXPERTS)
            assert weights_are_right(made, experts), what
            assert np.array_equal(output_of(experts, backend), made.output), what
        except sluice.Error as error:
            assert error.code == "unsupported" and "corrupt" not in str(error), what
            refused += 1
    assert refused > 10

"""Two kinds of arrays behind one face, so that a test runs for both."""

import numpy as np
import pytest

import sluice


def has_gpu():
    try:
        return sluice.Backend("cuda") is not None
    except sluice.Error:
        return False


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not has_gpu(), reason="needs a GPU"))]


class Numpy:
    def array(self, a):
        return a

    def bf16(self, bits):
        return bits

    def bits(self, a):
        return a.view(np.uint16) if a.dtype.itemsize == 2 else a.view(np.uint8)

    def bytes(self, a):
        return np.ascontiguousarray(a).view(np.uint8)

    plain = staticmethod(np.asarray)


class Torch:
    def __init__(self, device="cpu"):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        self.device = device

    def array(self, a):
        return self.torch.from_numpy(np.ascontiguousarray(a)).to(self.device)

    def bf16(self, bits):
        return self.array(bits.view(np.int16)).view(self.torch.bfloat16)

    def bits(self, a):
        t, a = self.torch, a.cpu()
        return a.view(t.int16).numpy().view(np.uint16) if a.element_size() == 2 else a.view(t.uint8).numpy()

    def bytes(self, a):
        return a.cpu().contiguous().view(self.torch.uint8).numpy()

    def plain(self, a):
        return a.cpu().numpy()


def as_float(bits):
    """float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_bf16(values):
    """bf16 bits, ties to even; no NaN here."""
    u = values.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


SPACES = ["numpy", "torch", "cuda"]


def space_of(kind):
    """One of SPACES: arrays of either kind on the CPU, and tensors on a GPU."""
    if kind == "cuda" and not has_gpu():
        pytest.skip("no CUDA device")
    return Numpy() if kind == "numpy" else Torch("cpu" if kind == "torch" else "cuda")

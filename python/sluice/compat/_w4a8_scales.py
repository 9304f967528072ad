"""Scales of e8m0 as the bytes that everybody exchanges."""

from typing import Any


def e8m0_bytes(scale: Any) -> Any:
    """uint8 of a tensor of torch with scales of MXFP4: of uint8 or float8_e8m0fnu its bytes, of a float type the codes
    whose values it has. None if a value is no power of two that e8m0 has."""
    import torch

    if scale.dtype == torch.uint8:
        return scale
    if scale.dtype != torch.float8_e8m0fnu:
        if not scale.is_floating_point():
            return None
        codes = scale.float().to(torch.float8_e8m0fnu)
        if not torch.equal(codes.float(), scale.float()):
            return None
        scale = codes
    return scale.view(torch.uint8)

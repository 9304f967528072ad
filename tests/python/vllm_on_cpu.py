"""vLLM's own Python code on a machine without its kernels, for rank_of_vllm.py.

SLUICE_ENGINE_DEVICE=cuda: the layer is on a GPU. Where vLLM is installed whole, so are its platform and operators; its
Python files alone have what is said below. Ranks share the GPU, which NCCL refuses, so collectives stay gloo's, over
the host's memory.

What is not vLLM's here, and so not tested:
- modules of third parties that nobody installs (MISSING), and three packages of vLLM's that would import them
  (REPLACED): its KV transfer, structured output and flash attention, none of which a MoE layer calls;
- the platform: capability 9.0, is_cuda_alike(), tensors on DEVICE;
- its compiled operators: five that say which kernels there are (none), and per-group e4m3 quantization in torch;
- collectives: gloo, where CudaCommunicator has NCCL. All2all managers are vLLM's, chosen as there.
"""

import logging
import os
import sys

import engine_stubs
import torch
import torch.distributed as dist

MISSING = ["PIL", "aiohttp", "cachetools", "cbor2", "cloudpickle", "cpuinfo", "einops", "openai", "openai_harmony",
           "prometheus_client", "pybase64", "requests", "urllib3", "uvloop", "zmq"]
REPLACED = ["vllm.distributed.kv_transfer", "vllm.v1.attention.ops.rocm_aiter_mla_sparse", "vllm.v1.structured_output",
            "vllm.vllm_flash_attn"]

DEVICE = os.environ.get("SLUICE_ENGINE_DEVICE", "cpu")

_library = torch.library.Library("_C", "FRAGMENT")


def _quantize(x, codes, scales, group, eps, low, high, ue8m0, *_):
    """vLLM's per_token_group_fp8_quant: scale = amax / 448, code = x / scale."""
    assert not ue8m0 and high == 448
    groups = x.float().reshape(*x.shape[:-1], -1, group)
    scale = groups.abs().amax(-1).clamp(min=eps) / high
    codes.copy_((groups / scale[..., None]).clamp(low, high).reshape(x.shape).to(codes.dtype))
    scales.copy_(scale)


def _operators():
    for name in ("cutlass_group_gemm_supported", "cutlass_scaled_mm_supports_block_fp8",
                 "cutlass_scaled_mm_supports_fp4", "cutlass_scaled_mm_supports_fp8"):
        _library.define(f"{name}(int capability) -> bool")
        _library.impl(name, lambda _: False, "CompositeExplicitAutograd")
    _library.define("per_token_group_fp8_quant(Tensor x, Tensor(a!) codes, Tensor(b!) scales, int group, float eps, "
                    "float low, float high, bool ue8m0, bool column_major, bool tma_aligned) -> ()")
    _library.impl("per_token_group_fp8_quant", _quantize, "CompositeExplicitAutograd")


def _platform():
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class CudaWithoutKernels(Platform):
        _enum = PlatformEnum.CUDA
        device_name, device_type, dispatch_key, dist_backend = DEVICE, DEVICE, DEVICE.upper(), "gloo"
        supported_quantization: list = []

        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_communicator_cls(cls):
            return "vllm_on_cpu.Communicator"

        @classmethod
        def check_and_update_config(cls, vllm_config):
            pass

    vllm.platforms._current_platform = CudaWithoutKernels()


def _platform_of_gpu():
    from vllm.platforms import current_platform

    kind = type(current_platform)
    assert current_platform.is_cuda(), kind
    kind.get_device_communicator_cls = classmethod(lambda _: "vllm_on_cpu.Communicator")


def use():
    """From here on `import vllm` gives vLLM's own code. Returns the stubs."""
    os.environ.update(VLLM_LOGGING_LEVEL="INFO", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
                      PYTORCH_NVML_BASED_CUDA_CHECK="1")  # Otherwise asking for a GPU keeps forked ranks from using it.
    stubs = engine_stubs.use("vllm", missing=MISSING, replaced=REPLACED)
    # vLLM says things below its own logger, which an engine configures when it starts.
    logger = logging.getLogger("vllm")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    if DEVICE == "cuda" and any((engine_stubs.path_of("vllm") / "vllm").glob("_C*.so")):
        _platform_of_gpu()
    else:
        _operators()
        _platform()
    return stubs


def __getattr__(name):
    if name == "Communicator":  # Its base can be imported only now.
        globals()[name] = _communicator()
        return globals()[name]
    raise AttributeError(name)


def _communicator():
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    class Communicator(DeviceCommunicatorBase):
        gathered: list = []  # Types of what was gathered last, for the test.

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.use_all2all:
                from vllm.distributed.device_communicators import all2all

                kind = {"allgather_reducescatter": all2all.AgRsAll2AllManager,
                        "deepep_high_throughput": all2all.DeepEPHTAll2AllManager,
                        "deepep_low_latency": all2all.DeepEPLLAll2AllManager}[self.all2all_backend]
                self.all2all_manager = kind(self.cpu_group)

        def _gather(self, tensor, sizes):
            room = torch.zeros(max(sizes), *tensor.shape[1:], dtype=tensor.dtype)
            room[: len(tensor)] = tensor.cpu()
            parts = [torch.empty_like(room) for _ in sizes]
            dist.all_gather([p.view(torch.uint8) for p in parts], room.view(torch.uint8), group=self.device_group)
            return torch.cat([part[:size] for part, size in zip(parts, sizes)]).to(tensor.device)

        def all_gatherv(self, input_, dim=0, sizes=None):
            if not isinstance(input_, list):
                return self._gather(input_, sizes or [len(input_)] * self.world_size)
            Communicator.gathered = [tensor.dtype for tensor in input_]
            return [self._gather(tensor, sizes or [len(tensor)] * self.world_size) for tensor in input_]

        def reduce_scatterv(self, input_, dim=0, sizes=None):
            sizes = sizes or [len(input_) // self.world_size] * self.world_size
            total = input_.float().cpu()
            dist.all_reduce(total, group=self.device_group)
            first = sum(sizes[: self.rank_in_group])
            return total[first : first + sizes[self.rank_in_group]].to(input_)

        def dispatch(self, *args, **kwargs):
            return self.all2all_manager.dispatch(*args, **kwargs)

        def combine(self, *args, **kwargs):
            return self.all2all_manager.combine(*args, **kwargs)

    return Communicator

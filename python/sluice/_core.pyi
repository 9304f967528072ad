"""The C++ library behind the package sluice; import that instead."""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import overload

import sluice._array


def version() -> str:
    """Version of the library, for example '0.1.0'."""

def recipe_names() -> list[str]:
    """Names of all recipes that have one."""

class Recipe:
    """
    What is rounded where, for one layer and mode. A value; equal ones compare and hash equal.
    """

    def __init__(self, name: str, mode: str = 'low-latency', *, s1: float | None = None, s2: float | None = None) -> None:
        """
        name: see recipe_names(). mode: 'low-latency' or 'normal'.
        s1, s2: static scales of the inputs of GEMM1 and GEMM2; needed by the static recipes.

        Raises Error: invalid_argument, unsupported.
        """

    @staticmethod
    def from_fields(*, wire: str, gemm1: str, gemm2: str, mode: str = 'low-latency', s1: float | None = None, s2: float | None = None) -> Recipe:
        """
        The recipe with these fields, whether or not it has a name.

        wire: as the property of that name. gemm1, gemm2: 'none', 'group', 'group-pow2', 'static',
        'static-pow2' or 'token'. mode, s1, s2: as for Recipe().

        Raises Error: invalid_argument; unsupported naming the fields that nothing computes.
        """

    @property
    def name(self) -> str:
        """One of recipe_names(), or the fields where no name stands for them."""

    @property
    def mode(self) -> str:
        """'low-latency' or 'normal'."""

    @property
    def wire(self) -> str:
        """Format of rows between ranks; Exchange takes it."""

    @property
    def gemm1(self) -> str:
        """
        The receiver's cast before GEMM1; 'none' if GEMM1 reads the received bytes.
        """

    @property
    def gemm2(self) -> str:
        """The cast of h before GEMM2."""

    @property
    def s1(self) -> float:
        """Static scale of the wire or of GEMM1's input, or 0."""

    @property
    def s2(self) -> float:
        """Static scale of GEMM2's input, or 0."""

    def __eq__(self, arg: Recipe, /) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

class Placement:
    """
    Which slot holds which expert. A value; equal ones compare and hash equal.

    A rank has slots_per_rank slots: rank r those from r * slots_per_rank on.
    """

    def __init__(self, num_experts: int, num_ranks: int, slot_experts: Sequence[int]) -> None:
        """
        slot_experts: [num_slots], the expert of each slot, -1 for an empty one. Other engines call it
        the physical to logical map.

        Raises Error: invalid_argument.
        """

    @staticmethod
    def identity(num_experts: int, num_ranks: int) -> Placement:
        """
        Expert e in slot e.

        Raises Error: invalid_argument unless num_ranks divides num_experts.
        """

    @staticmethod
    def even(num_experts: int, num_ranks: int, num_slots: int) -> Placement:
        """
        Each expert once, in order, as many on each rank give or take one.

        Raises Error: invalid_argument.
        """

    @property
    def num_experts(self) -> int:
        """Logical experts."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_slots(self) -> int:
        """Of all ranks."""

    @property
    def slots_per_rank(self) -> int: ...

    @property
    def slot_experts(self) -> list[int]:
        """[num_slots], the expert of each slot, -1 for an empty one."""

    def slots_of(self, expert: int) -> list[int]:
        """The slots that hold the expert, ascending."""

    def __eq__(self, arg: Placement, /) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

def balance(counts: Sequence[int], ranks: int, slots: int, *, hosts: int = 1, groups: int = 0, previous: Placement | None = None) -> Placement:
    """
    A placement that makes the fullest rank's expected rows small.

    counts: [num_experts], rows of each expert. slots: of all ranks, a multiple of ranks.
    hosts: with more than one, all replicas of an expert are on one host. groups: groups of
    consecutive experts that stay on one host; 0: every expert by itself. previous: where the
    experts are now; as many as possible stay.

    Raises Error: invalid_argument naming the field.
    """

def expected_rows(counts: Sequence[int], placement: Placement) -> list[float]:
    """
    [num_ranks], the rows that each rank is to expect.

    Raises Error: invalid_argument.
    """

def max_over_mean(values: Sequence[float]) -> float:
    """
    The largest over the mean: 1 if all are alike; 0 if none has anything.

    Raises Error: invalid_argument for a value that is not finite or is below 0.
    """

def count_moves(before: Placement, after: Placement) -> int:
    """
    How many experts a rebalance sends from rank to rank.

    Raises Error: invalid_argument.
    """

def placement_toward(before: Placement, after: Placement, max_received: int) -> Placement:
    """
    A placement on the way from one to another, for moving experts a few at a time: no rank
    receives more than max_received experts from others at once. Called again with its result,
    it gives `after` in the end.

    Raises Error: invalid_argument.
    """

def read_placements(path: str | os.PathLike) -> dict[int, Placement]:
    """
    {layer: Placement} of a file that `sluice balance` wrote.

    Raises Error: io, corrupt_file naming the key, unsupported for a later version.
    """

def write_placements(path: str | os.PathLike, placements: Mapping[int, Placement]) -> None:
    """{layer: Placement} as a file. Raises Error: invalid_argument, io."""

def read_expert_rows(path: str | os.PathLike) -> dict[int, list[list[int]]]:
    """
    {layer: [num_steps][num_experts]} of a file that `sluice run --expert-rows` wrote.

    Raises Error: io, corrupt_file naming the key, unsupported for a later version.
    """

def write_expert_rows(path: str | os.PathLike, rows: Mapping[int, Sequence[Sequence[int]]]) -> None:
    """
    {layer: [num_steps][num_experts]} as a file for `sluice balance --counts`.

    Raises Error: invalid_argument, io.
    """

class Backend:
    """
    One device that quantizes rows and runs expert GEMMs; one for each rank.
    Serves one thread at a time; a second one gets an Error.
    """

    def __init__(self, device: str = 'cpu', *, num_threads: int = 0, local_rank: int = 0, num_local_ranks: int = 1) -> None:
        """
        device: 'cpu', 'cuda' or 'cuda:1'.
        num_threads: CPU only; 0 takes this rank's even share of the cores.
        local_rank, num_local_ranks: which share, where ranks are threads of one process; on
        CUDA, how many ranks share the device.

        Raises Error: unsupported where there is no such device; invalid_argument.
        """

    @property
    def device(self) -> str:
        """'cpu' or 'cuda:0'."""

    @property
    def description(self) -> str:
        """For reports: 'cpu, 2 threads, AVX2'."""

    @property
    def stream(self) -> int:
        """Handle of a queue of this backend's own; 0 on the CPU."""

    def measure_read_bandwidth(self) -> float:
        """Bytes per second this device reads, measured now (about 0.2 s)."""

    def synchronize(self, stream: int | None = 0) -> None:
        """Waits for everything queued on `stream`. Nothing to do on the CPU."""

    def __repr__(self) -> str: ...

class Transport:
    """
    Moves bytes between the ranks of one expert-parallel group; one object
    for each rank, used by one thread at a time.
    """

    @staticmethod
    def inproc(num_ranks: int) -> list[Transport]:
        """
        Ranks as threads of this process: a list with the transport of each rank.
        """

    @staticmethod
    def from_group(group: object, *, device: int | None = None, timeout_ms: int | None = None) -> Transport:
        """
        Ranks as the processes of a group: a torch ProcessGroup, an mpi4py communicator, or
        any object with rank, size and all_gather(object) -> list. The group is used at the
        start alone, to agree on a meeting place. Over ipc if all are on one host (host_id()),
        over nccl if not. device: the CUDA device of this rank, for nccl; default: its index
        on its host. Collective.

        Raises Error: unsupported on several hosts without NCCL or a GPU, peer_timeout naming ranks.
        """

    @staticmethod
    def from_environment(*, device: int | None = None, timeout_ms: int | None = None) -> Transport:
        """
        Ranks as the processes that a launcher started: torchrun, mpirun, srun, or
        SLUICE_RANK, SLUICE_WORLD_SIZE and SLUICE_JOB. Over ipc on one host; over nccl
        on several, which also takes SLUICE_SECRET, and SLUICE_MEETING or MASTER_ADDR
        and MASTER_PORT. Collective.

        Raises Error: invalid_argument naming the variable, unsupported, peer_timeout.
        """

    @staticmethod
    def ipc(job: str, *, secret: str, rank: int, num_ranks: int, timeout_ms: int | None = None) -> Transport:
        """
        Ranks as processes of one user on one host, CUDA memory included. Collective.

        job: names the meeting place. secret: what the processes prove to know,
        at least 16 bytes.

        Raises Error: peer_timeout naming the ranks that did not come, transport if they disagree.
        """

    @staticmethod
    def mpi(num_ranks: int = 0, *, timeout_ms: int | None = None) -> Transport | None:
        """
        Ranks as the first `num_ranks` processes of an MPI job, 0 for all; None on the
        others. CPU memory only. Collective; end_mpi() is every process's last call.

        Raises Error: unsupported in a build without MPI, peer_timeout naming processes.
        """

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def num_ranks(self) -> int:
        """Size of the group."""

    @property
    def name(self) -> str:
        """'inproc', 'ipc', 'mpi' or 'nccl'."""

    @property
    def hosts(self) -> list[int]:
        """
        Each rank's host, numbered from 0, where the transport finds that out (nccl); else one
        host.
        """

    def all_gather(self, mine: bytes, *, timeout_ms: int | None = None) -> list[bytes]:
        """
        Every rank's bytes, as many on each, ordered by rank. For set-up. Collective.

        Raises Error: peer_timeout naming ranks, transport.
        """

    def __repr__(self) -> str: ...

def host_id() -> str:
    """
    Names this host: NCCL_HOSTID if it is set, or host name and boot. Ranks with the same name are on one host.
    """

def end_mpi(*, timeout_ms: int | None = None) -> bool:
    """
    The last call of every process of an MPI job, with no transport left. False: some process
    did not say goodbye in time; then just exit.
    """

class ModelGeometry:
    """Sizes of one MoE layer and what the router does with it."""

    def __init__(self, *, num_experts: int, num_topk: int, hidden: int, intermediate: int, group_size: int = 128, routed_scaling_factor: float = 1.0, name: str = 'model') -> None: ...

    @staticmethod
    def preset(name: str) -> ModelGeometry:
        """Raises Error listing the names there are."""

    @staticmethod
    def preset_names() -> list[str]:
        """Names that preset() takes."""

    @property
    def name(self) -> str:
        """Preset, or model_type of config.json."""

    @property
    def num_experts(self) -> int:
        """Routed experts, over all ranks."""

    @property
    def num_topk(self) -> int:
        """Experts of a token."""

    @property
    def hidden(self) -> int:
        """Multiple of 128."""

    @property
    def intermediate(self) -> int:
        """Multiple of 128."""

    @property
    def token_width(self) -> int:
        """
        Channels of a token in the model: hidden, where that is a multiple of 128. The
        rest of hidden is padded inside, with zeros.
        """

    @property
    def inner_width(self) -> int:
        """The same of intermediate."""

    @property
    def has_bias(self) -> bool:
        """Whether every matrix has a bias, which the CPU backend alone adds."""

    @property
    def group_size(self) -> int:
        """Weights that share a scale: 128 or 32."""

    @property
    def routed_scaling_factor(self) -> float:
        """Of config.json."""

    @property
    def weight_format(self) -> str:
        """How the experts' weights are coded: 'int4' or 'mxfp4'."""

    @property
    def activation(self) -> str:
        """
        Function of gate and up, as text: 'swiglu', 'swiglu:limit=10'.
        Of a checkpoint, that of its first layer with experts: Checkpoint.activation() has
        each layer's.
        """

    def __repr__(self) -> str: ...

class ExpertWeights:
    """
    Experts of one layer as a checkpoint has them: codes of 4 bits (signed int4,
    or e2m1), two to a byte with even k low, and a scale for each group along k.
    """

    @staticmethod
    def from_arrays(gate: tuple[sluice._array.Array, sluice._array.Array], up: tuple[sluice._array.Array, sluice._array.Array], down: tuple[sluice._array.Array, sluice._array.Array], *, group_size: int = 128, s1: float | None = None, s2: float | None = None, weight_format: str = 'int4', activation: str = 'swiglu', first_expert: int = 0) -> ExpertWeights:
        """
        Each matrix is a pair (codes, scales) in host memory, kept alive and not copied:
        codes [num_experts, n, k / 2] uint8 or int8, scales [num_experts, n, k / group_size]
        float32 or bfloat16. gate and up have n = intermediate and k = hidden, down the reverse.
        weight_format: 'int4'; or 'mxfp4', whose codes are e2m1, whose scales are
        e8m0 as uint8 and whose group_size is 32. activation: 'swiglu', 'swiglu:limit=L',
        'swiglu-oai:alpha=A,limit=L' or 'situ:beta=B,linear_beta=LB'.
        first_expert: number of the first one in its layer; LayerGroup.add_layer() wants this rank's.

        Raises Error: invalid_argument naming the matrix; unsupported naming the format or the
        activation that there is not.
        """

    @property
    def layer(self) -> int:
        """Layer of the checkpoint."""

    @property
    def first_expert(self) -> int:
        """Number of the first expert held."""

    @property
    def geometry(self) -> ModelGeometry:
        """Of the whole layer."""

    @property
    def static_scales(self) -> object:
        """(s1, s2) of the whole layer, or None."""

    @property
    def nbytes(self) -> int:
        """Codes and scales."""

    def __len__(self) -> int: ...

    def matrix(self, expert: int, name: str) -> tuple:
        """
        (codes [n, k / 2] uint8, scales [n, k / group_size] float32 or bfloat16 as uint16) of
        'gate', 'up' or 'down', read-only and without a copy. Experts count from 0 here.
        """

    def __repr__(self) -> str: ...

class Checkpoint:
    """Routed experts of a published INT4 checkpoint."""

    def __init__(self, directory: str | os.PathLike) -> None:
        """
        Reads config and headers, no weights.

        Raises Error: io, corrupt_file naming file, tensor, value and limit, unsupported.
        """

    @property
    def path(self) -> pathlib.Path:
        """The directory."""

    @property
    def format(self) -> str:
        """Published layout, for example 'w4afp8'."""

    @property
    def geometry(self) -> ModelGeometry:
        """Sizes of its MoE layers."""

    @property
    def moe_layers(self) -> list[int]:
        """Layers with routed experts, ascending."""

    @property
    def identity(self) -> int:
        """Digest of config and headers, not of weights."""

    def activation(self, layer: int) -> str:
        """
        Function of gate and up of a layer, as text.

        Raises Error: invalid_argument for a layer without experts.
        """

    def static_scales(self, layer: int) -> object:
        """(s1, s2) over all experts of the layer, or None."""

    def check(self, layer: int) -> None:
        """Checks headers and input scales of a whole layer, and no weights."""

    def warnings(self, layer: int | None = None) -> list[str]:
        """
        What loads but deserves a look, as text: of a layer, or of the checkpoint as a whole
        (keys of config.json that are not known, layers that are missing).
        """

    def load_experts(self, layer: int, first_expert: int, num_experts: int) -> ExpertWeights:
        """
        ExpertWeights, mapped from the files.

        Raises Error: invalid_argument for layer or range, corrupt_file, unsupported.
        """

    def __repr__(self) -> str: ...

def make_checkpoint(directory: str | os.PathLike, geometry: ModelGeometry, *, format: str = 'w4afp8', seed: int = 1, first_layer: int = 3, num_layers: int = 1, scale_dtype: str = 'f32', with_input_scales: bool = True) -> Checkpoint:
    """
    Writes a synthetic checkpoint, fixed by its seed, and opens it.

    Raises Error: invalid_argument, io; refuses a directory that already holds a checkpoint.
    """

class Routing:
    """
    The router's choice for each token; keeps its arrays alive. Leave them
    unchanged until combine has run.
    """

    def __init__(self, topk_idx: sluice._array.Array, topk_weights: sluice._array.Array) -> None:
        """
        topk_idx: [num_tokens, num_topk] int32 or int64; -1 leaves an entry empty.
        topk_weights: [num_tokens, num_topk] float32, used as given.

        Raises Error: invalid_argument.
        """

    @property
    def topk_idx(self) -> object:
        """As given."""

    @property
    def topk_weights(self) -> object:
        """As given."""

class ExpertBatch:
    """
    Rows by local expert, as dispatch delivers them or of the caller's own.

    Masked layout: x [num_experts, max_m, hidden]; expert e has x[e, :num_rows[e]].
    Contiguous layout: x [max_rows, hidden]; expert e has num_rows[e] rows from row_begin[e].
    Rows of a Dispatched are views of the exchange's memory: another dispatch may overwrite
    them once combine has run.
    """

    def __init__(self, x: sluice._array.Array, num_rows: sluice._array.Array, *, x_scale: sluice._array.Array | None = None, row_begin: sluice._array.Array | None = None, expected_m: int = 0) -> None:
        """
        x: [num_experts, max_m, hidden] or [max_rows, hidden]; bfloat16 (or uint16), or e4m3 (as
        uint8).
        num_rows: [num_experts] int32.
        x_scale: shape of x with hidden / 128 or, per token, 1; float32, of e4m3.
        row_begin: [num_experts] int64; None where rows follow each other.
        expected_m: mean rows of an expert; a hint.

        The arrays are checked where they are used.
        """

    @property
    def x(self) -> object: ...

    @property
    def x_scale(self) -> object:
        """None for bf16 and static wires."""

    @property
    def num_rows(self) -> object: ...

    @property
    def row_begin(self) -> object: ...

    @property
    def expected_m(self) -> int: ...

    @property
    def masked(self) -> bool: ...

class Dispatched:
    """
    Rows received, and their way home. combine() consumes it; dropping it returns its memory
    to the exchange. Keeps the exchange and the routing alive.
    """

    @property
    def batch(self) -> ExpertBatch:
        """ExpertBatch; after combine an Error."""

    @property
    def expert_y(self) -> object:
        """
        Memory of the exchange that combine() sends from without a copy, for the experts' out=;
        None on the CPU, where a copy costs nothing more.
        """

    @property
    def consumed(self) -> bool:
        """Whether combine has run."""

    def receive(self, *, stream: int | None = None) -> None:
        """Second half of a dispatch, after Exchange.dispatch_send()."""

    def combine_send(self, expert_y: sluice._array.Array, *, stream: int | None = None) -> None:
        """First half of combine()."""

    def combine_receive(self, *, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
        """Second half of combine()."""

class Exchange:
    """
    Dispatch and combine for one expert-parallel group. Every rank makes the
    same calls in the same order. Keeps transport and backend alive.
    """

    def __init__(self, transport: Transport, backend: Backend, *, num_experts: int, num_topk: int, hidden: int, max_tokens_per_rank: int, mode: str = 'low-latency', wire: str = 'e4m3 + f32 scale per 128', max_m: int = 0, routed_scaling_factor: float = 1.0, num_in_flight: int = 2, timeout_ms: int | None = None, hosts: Sequence[int] = [], sum_parts: int = 0) -> None:
        """
        Collective.

        num_experts: over all ranks. mode: 'low-latency' (masked) or 'normal' (contiguous).
        wire: Recipe.wire.
        max_m: low-latency, rows reserved for each expert; 0 for the worst case.
        routed_scaling_factor: applied once, by combine. num_in_flight: Dispatched alive at once.
        timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.
        hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over several
        hosts a token crosses the network once for each. sum_parts: parts of the experts that are
        added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.

        Raises Error: invalid_argument naming the field, transport if ranks differ,
        peer_timeout, out_of_memory, unsupported.
        """

    @property
    def max_rows(self) -> int:
        """Rows that batch.x holds."""

    @property
    def max_m(self) -> int:
        """Rows of each local expert; 0 in normal mode."""

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""

    @staticmethod
    def workspace_bytes(*, num_experts: int, num_topk: int, hidden: int, max_tokens_per_rank: int, num_ranks: int, mode: str = 'low-latency', wire: str = 'e4m3 + f32 scale per 128', max_m: int = 0, num_in_flight: int = 2, device: str = 'cpu') -> int:
        """Bytes that an Exchange of these numbers takes on each rank."""

    def counters(self) -> dict:
        """dict of monotonic counters; lists are by rank."""

    def check(self) -> None:
        """Raises what earlier asynchronous calls found on the device."""

    def dispatch_send(self, x: sluice._array.Array, routing: Routing, *, static_scale: float = 0.0, stream: int | None = None) -> Dispatched:
        """First half of dispatch(); Dispatched.receive() is the second."""

def dispatch(exchange: Exchange, x: sluice._array.Array, routing: Routing, *, static_scale: float = 0.0, stream: int | None = None) -> Dispatched:
    """
    Quantizes x to the wire format and sends each token to its experts' ranks. Collective.

    x: [num_tokens, hidden] bfloat16 (or uint16), num_tokens <= max_tokens_per_rank.
    static_scale: s1 of the layer (Recipe.s1), for the static wire; 0 for the others. Every rank
    gives the same.
    stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else the
    default stream; the CPU backend returns when done. Arrays of the batch are of x's kind.

    Raises Error: invalid_argument before anything is sent, peer_timeout naming ranks.
    """

def combine(dispatched: Dispatched, expert_y: sluice._array.Array, *, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
    """
    Sends every row home and sums, weighted: y [num_tokens, hidden] bfloat16. Collective;
    consumes `dispatched`.

    expert_y: shape of batch.x, bfloat16 (or uint16). out: y's memory; None makes a new array
    (numpy uint16 on the CPU).

    Raises Error: invalid_argument, peer_timeout.
    """

class Experts:
    """
    A rank's experts repacked for a backend; made by repack(). Keeps the
    backend alive, not the weights.
    """

    def __len__(self) -> int: ...

    @property
    def max_rows(self) -> int:
        """Largest batch, padding included."""

    def reserve(self, max_rows: int) -> None:
        """
        Makes room for batches of more rows; the weights stay as they are. Graphs that were
        captured before stay valid, since the smaller buffers are kept. Allocates: not during a
        capture.

        Raises Error: out_of_memory.
        """

    @property
    def geometry(self) -> ModelGeometry:
        """Of the layer."""

    @property
    def weight_bytes(self) -> int:
        """Of the repacked weights."""

def repack(weights: ExpertWeights, backend: Backend, *, max_rows: int) -> Experts:
    """
    Experts: the weights in the backend's own order, and memory for batches of max_rows rows.

    Raises Error: invalid_argument, out_of_memory.
    """

def experts_masked(experts: Experts, batch: ExpertBatch, recipe: Recipe, *, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
    """
    Every expert on its rows, masked layout; the router's weights are left to combine.

    batch.x: [num_experts, max_m, hidden] bfloat16 or e4m3, as the recipe has them.
    batch: ExpertBatch in the recipe's wire format. out: shape of batch.x, bfloat16 (or uint16);
    None makes a new array. Rows that are not valid stay as they are.

    Raises Error: invalid_argument.
    """

def experts_grouped(experts: Experts, batch: ExpertBatch, recipe: Recipe, *, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
    """
    Every expert on its rows, contiguous layout; the router's weights are left to combine.

    batch.x: [max_rows, hidden] bfloat16 or e4m3, as the recipe has them.
    batch: ExpertBatch in the recipe's wire format. out: shape of batch.x, bfloat16 (or uint16);
    None makes a new array. Rows that are not valid stay as they are.

    Raises Error: invalid_argument.
    """

def quantize(backend: Backend, x: sluice._array.Array, *, static_scale: float | None = None, pow2: bool = False, per_token: bool = False, num_rows: sluice._array.Array | None = None, row_begin: sluice._array.Array | None = None, out: tuple[sluice._array.Array, sluice._array.Array | None] | None = None, stream: int | None = None) -> tuple:
    """
    Rounds rows to e4m3: (codes, scale), scale None for a static one.

    x: [num_rows, width] or [num_experts, max_m, width] bfloat16 (or uint16).
    static_scale: one scale for all; None: one for each 128 values, amax / 448, with pow2 the
    smallest power of two that is no less.
    per_token: one scale for each row instead.
    num_rows [num_experts] int32, row_begin [num_experts] int64: which rows are valid, as in
    ExpertBatch; None: all.
    codes: shape of x, e4m3 as uint8. scale: shape of x with width / 128 or, per token, 1;
    float32.
    out: the pair's memory; rows that are not valid stay as they are.

    Raises Error: invalid_argument.
    """

def requantize(backend: Backend, codes: sluice._array.Array, scale: sluice._array.Array, static_scale: float, *, num_rows: sluice._array.Array | None = None, row_begin: sluice._array.Array | None = None, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
    """
    Moves group-scaled e4m3 rows to a static scale, a second rounding: codes as uint8.

    codes: [.., width] e4m3 (or uint8) and scale: [.., width / 128] float32, as quantize() gives
    them. static_scale: positive.
    num_rows, row_begin, out: as for quantize(); out is one array and not `codes`.

    Raises Error: invalid_argument.
    """

def repack_stacked(w13: sluice._array.Array, w13_scale: sluice._array.Array, w2: sluice._array.Array, w2_scale: sluice._array.Array, backend: Backend, *, activation: str = 'swiglu', weight_layout: str = 'int4', scale_layout: str = 'by-shape', memory: sluice._array.Array | None = None, max_rows: int = 1, widths: tuple[int, int] | None = None, stream: int | None = None) -> Experts:
    """
    Experts of stacked tensors, which lie on the backend's device in any strides and are read
    there. sluice.compat.w4a8.W4A8Experts has their shapes, the layouts and what memory may be.
    widths: the model's own hidden and intermediate size, where the tensors are padded.
    stream: handle, None: torch's current one for tensors of torch. Waits for it.

    Raises Error: invalid_argument naming the tensor, or the expert and the scale that is not
    finite; out_of_memory.
    """

def packed_sizes(*, num_experts: int, hidden: int, intermediate: int, group_size: int = 128, scales_are_bf16: bool = True, device: str = 'cpu', weight_format: str = 'int4') -> tuple:
    """
    (bytes of one expert's gate and up, bytes of its down, alignment) of packed weights: first
    gate and up of every expert, then down of every expert.

    Raises Error: invalid_argument naming the field.
    """

class InFlight:
    """
    A call of a Layer whose tokens have been sent. Keeps layer and routing
    alive; dropped without finish(), it gives its buffers back.
    """

    def finish(self, *, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
        """
        Receives, runs the experts and combines: y [num_tokens, hidden], the bits of
        Layer.forward(). Collective; once. The routing's arrays are unchanged until then.

        out, stream: as for moe_forward().

        Raises Error: invalid_argument, peer_timeout naming ranks.
        """

class Layer:
    """
    One MoE layer; made by LayerGroup.add_layer(). Keeps the group's buffers,
    transport and backend alive.
    """

    def count_rows(self, on: bool = True) -> None:
        """
        When on, calls add up the rows that each of this rank's experts receives. Nothing waits
        for it, and a graph captured meanwhile counts in every replay.

        Raises Error: out_of_memory.
        """

    def counted_rows(self, *, of_all: bool = False, stream: int | None = None) -> list[int]:
        """
        Rows of all calls with count_rows(): [num_local_experts] of this rank; with of_all
        [num_experts] of all ranks together, which is collective and what balance() takes.

        stream: on which the last call was queued; waits for it. None: the default stream.

        Raises Error: peer_timeout naming ranks.
        """

    def reset_counted_rows(self, *, stream: int | None = None) -> None:
        """Sets the counts to zero."""

    @property
    def name(self) -> str:
        """As messages have it."""

    def forward(self, x: sluice._array.Array, routing: Routing, *, mode: str | None = None, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
        """moe_forward() of this layer."""

    def dispatch_send(self, x: sluice._array.Array, routing: Routing, *, mode: str | None = None, stream: int | None = None) -> InFlight:
        """
        First half of forward(): sends the tokens, so that those of up to num_in_flight calls
        of the group travel at once. InFlight.finish() is the second half. Collective.

        x, routing, mode, stream: as for moe_forward(). Leave the routing's arrays unchanged
        until finish() has run: it reads the weights again.

        Raises Error: invalid_argument naming the argument or num_in_flight.
        """

    def recipe(self, mode: str | None = None) -> Recipe:
        """Recipe of a mode."""

    def record_stats(self, on: bool = True) -> None:
        """
        When on, moe_forward() times its stages; it then waits for the device after each.
        """

    def stats(self) -> dict:
        """
        dict of the last moe_forward() with record_stats(): times (microseconds of each stage),
        rows_per_expert, weight_bytes_read, flops.
        """

    def record_gemm_input_digest(self, on: bool = True) -> None:
        """When on, moe_forward() digests the bytes that GEMM1 reads."""

    @property
    def gemm_input_digest(self) -> int:
        """Sum over rows; 'direct' and 'direct-bf16' give the same."""

    @property
    def placement(self) -> Placement:
        """Placement of the experts; without num_slots, expert e in slot e."""

    def rebalance(self, placement: Placement, *, max_experts_held: int = 2, keep_memory: bool = False, stream: int | None = None) -> dict:
        """
        Moves experts to where the Placement has them, between two calls. Collective; no call
        of the group may be queued or in flight on another stream. Outputs stay the same bits,
        captured graphs stay valid.

        max_experts_held: experts that a rank holds beside its own meanwhile, at least 2.
        keep_memory: keep the memory for them until a rebalance() without it, for experts that
        move a few at a time.
        stream: that of the calls before, which must have ended; as for moe_forward().

        Returns a dict: num_received, num_sent, num_copied, num_rounds, received_bytes,
        sent_bytes, extra_bytes, seconds; of this rank.

        Raises Error: invalid_argument; transport naming ranks that have another placement. After
        transport or peer_timeout half-way, which name the ranks to blame, the layer refuses
        every later call.
        """

    def rebalance_counters(self) -> dict:
        """
        dict of what all rebalance() of this layer did on this rank; counters only grow:
        num_rebalances; num_received, num_sent, num_copied (experts); num_rounds;
        received_bytes, sent_bytes; seconds.
        """

    @property
    def weight_bytes(self) -> int:
        """Of the repacked weights of this rank."""

    def check(self) -> None:
        """Raises what earlier asynchronous calls found on the device."""

def moe_forward(engine: Layer, x: sluice._array.Array, routing: Routing, *, mode: str | None = None, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
    """
    The whole layer, y = combine(experts(dispatch(x))): y [num_tokens, hidden] bfloat16.
    Collective.

    engine: an Engine, or a Layer of a LayerGroup.
    x: [num_tokens, hidden] bfloat16 (or uint16), num_tokens <= max_tokens_per_rank; 0 is fine.
    mode: 'low-latency' or 'normal'; None where the engine has one.
    out: y's memory; None makes a new array: torch's for tensors of torch, else numpy uint16.
    stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else the
    default stream; the CPU backend returns when done.

    Raises Error: invalid_argument naming the argument, peer_timeout naming ranks.
    """

def stats(engine: Layer) -> dict:
    """Engine.stats()."""

class LayerGroup:
    """
    What the layers of a model share: transport, backend, one exchange for each mode and wire
    format, and the memory between the stages. Layers keep it alive. Construction, add_layer()
    and moe_forward() are collective; one thread at a time.
    """

    def __init__(self, transport: Transport, backend: Backend, *, geometry: ModelGeometry, low_latency_tokens: int = 0, normal_tokens: int = 0, max_m: int = 0, routed_scaling_factor: float = 1.0, num_in_flight: int = 0, timeout_ms: int | None = None, num_slots: int = 0, hosts: Sequence[int] = [], sum_parts: int = 0) -> None:
        """
        geometry: num_experts, num_topk, hidden and intermediate of every layer.
        low_latency_tokens, normal_tokens: most tokens of a rank in a call of that mode; 0 for a
        mode that no layer has.
        max_m: low-latency, rows reserved for each expert; 0 for the worst case.
        routed_scaling_factor: 1 where the host model applies it.
        num_in_flight: calls of one mode and wire format at once; 0: as many as moe_forward() needs.
        timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.
        num_slots: slots for experts over all ranks, so that experts may repeat and move; 0:
        expert e stays in slot e.
        hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over several
        hosts a token crosses the network once for each. sum_parts: parts of the experts that are
        added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.

        Raises Error: invalid_argument naming the field, transport naming ranks and field if ranks
        differ, out_of_memory, peer_timeout.
        """

    def add_layer(self, checkpoint: Checkpoint | None = None, *, layer: int | None = None, weights: ExpertWeights | None = None, name: str = '', identity: int = 0, low_latency: str | None = None, normal: str | None = None, dispatch_dtype: str | None = None, progress: Callable | None = None, placement: Placement | None = None) -> Layer:
        """
        A Layer, from a checkpoint and a layer's number or from weights. Collective; no call of
        the group may be queued on any rank.

        weights: ExpertWeights of this rank's experts, with the static scales of the whole layer;
        not needed afterwards. name: for messages, also of several layers. identity: a number
        that tells these weights from others. Ranks compare both; of a checkpoint, its identity.
        low_latency, normal: recipe of a mode that the group has; None: 'direct'.
        dispatch_dtype: 'auto', 'bf16', 'fp8' or 'fp8-static'; None: SLUICE_DISPATCH_DTYPE.
        progress: for a checkpoint, as in add_layers().
        placement: a Placement, for a group with num_slots; None: Placement.even(). `weights` are
        then of the experts in this rank's slots, one after the other.

        Raises Error: invalid_argument for weights that do not fit the group, transport naming
        ranks and field if ranks differ or naming ranks that could not load their experts, and
        whatever Recipe, Checkpoint and Exchange raise.
        """

    def add_layers(self, checkpoint: Checkpoint, layers: Sequence[int], *, low_latency: str | None = None, normal: str | None = None, dispatch_dtype: str | None = None, progress: Callable | None = None, num_threads: int = 0, placements: Sequence[Placement] = []) -> list[Layer]:
        """
        A list of Layers of a checkpoint, all or none, in one load: several threads read, repack
        and copy at once. Otherwise as add_layer().

        progress: called with the fraction done, 0 .. 1, ten times a second at most; what it
        raises ends the load. So does KeyboardInterrupt.
        num_threads: 0 for this rank's share of the cores, between 4 and 16. Each holds the
        scales of a matrix and a few MB of its codes in host memory.
        placements: a Placement for each layer, for a group with num_slots; empty:
        Placement.even().
        """

    def load_stats(self) -> dict:
        """
        dict of what loading from checkpoints took on this rank so far: seconds, file_bytes,
        prepared_bytes, host_bytes (memory that was read into), num_threads.
        """

    def memory(self) -> dict:
        """
        dict of the bytes that the group and its layers hold on this rank, as plan() names them;
        moving_bytes is what rebalance() keeps.
        """

    def check(self) -> None:
        """Raises what earlier asynchronous calls found on the device."""

def slice_experts(weights: ExpertWeights, slice: int, num_slices: int) -> ExpertWeights:
    """
    ExpertWeights: slice `slice` of `num_slices` of each expert, for tensor parallelism. It is
    the expert's intermediate channels from slice * intermediate / num_slices on. The outputs
    of all slices add up to those of the experts.

    Raises Error: invalid_argument if slices are no multiples of 128 channels.
    """

class LocalExperts:
    """
    Experts of one layer on a rank's own tokens, without an exchange: for one device, or for a
    stack whose ranks add up their results. Keeps its group's buffers and backend alive.
    """

    def __init__(self, weights: ExpertWeights, backend: Backend, *, max_entries: int, recipe: str = 'direct', routed_scaling_factor: float = 1.0) -> None:
        """
        In a LocalGroup of its own.

        weights: experts [first, first + count) of a layer, as Checkpoint.load_experts() or
        ExpertWeights.from_arrays() give them; not needed afterwards.
        max_entries: most top-k entries of a call, num_tokens * num_topk.
        routed_scaling_factor: 1 where the host model applies it.

        Raises Error: invalid_argument naming the field, unsupported naming the recipe,
        out_of_memory.
        """

    def forward(self, x: sluice._array.Array, routing: Routing, *, x_scale: sluice._array.Array | None = None, out: sluice._array.Array | None = None, stream: int | None = None) -> object:
        """
        y[t] = sum over k of topk_weights[t, k] * expert topk_idx[t, k] of x[t]: bfloat16
        [num_tokens, hidden]. Entries whose expert is not here are skipped: those of other
        experts, -1, and any other number. Summed in float32 in order of k, rounded once; with
        all experts of a layer the bits of an Engine.

        x: [num_tokens, hidden] bfloat16 (or uint16), or e4m3 in the recipe's wire format;
        0 tokens are fine. Where hidden is padded (ModelGeometry.token_width), bfloat16 rows may
        have the model's own width, and y has it then.
        x_scale: [num_tokens, hidden / 128] float32, for e4m3 with group scales;
        [num_tokens, 1] for e4m3 with one scale per token.
        out: y's memory, which may be x; None makes a new array: torch's for tensors of torch,
        else numpy uint16.
        stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else
        the default stream. Asynchronous on CUDA, and capturable once a call has run; the CPU
        backend returns when done.

        Raises Error: invalid_argument naming the argument.
        """

    def forward_topk(self, x: sluice._array.Array, topk_idx: sluice._array.Array, topk_weights: sluice._array.Array, x_scale: sluice._array.Array | None = None, out: sluice._array.Array | None = None) -> object:
        """
        forward() of a Routing that is used once, on the current stream.

        topk_idx: [num_tokens, num_topk] int64 or int32. topk_weights: the same in float32.

        Raises Error: invalid_argument naming the argument.
        """

    def forward_batch(self, x: sluice._array.Array, num_rows: sluice._array.Array, x_scale: sluice._array.Array | None = None, expected_m: int = 0, out: sluice._array.Array | None = None, *, stream: int | None = None) -> object:
        """
        Every expert on its rows, masked layout, in the group's memory; the router's weights
        are left to combine.

        x: [num_experts, max_m, hidden] bfloat16 or e4m3, as the recipe's wire has them.
        num_rows: [num_experts] int32. x_scale: [num_experts, max_m, hidden / 128] float32, for
        e4m3 with group scales, [num_experts, max_m, 1] with one per token. expected_m: mean
        rows of an expert, a hint.
        out, stream: as forward(). Rows that are not valid stay as they are.

        Raises Error: invalid_argument naming the argument, or for more rows than reserve_batch()
        made room for.
        """

    def reserve_batch(self, max_rows: int) -> None:
        """
        Makes room for batches of max_rows rows, padding included, for all layers of the group.
        Graphs that were captured before stay valid. Allocates: not during a capture.

        Raises Error: invalid_argument, out_of_memory.
        """

    @property
    def max_batch_rows(self) -> int:
        """Largest batch, padding included."""

    def __len__(self) -> int:
        """Experts here."""

    @property
    def num_repeated_calls(self) -> int:
        """
        Calls of forward_topk() and forward_batch() that came again with the memory of an earlier
        one, and so were not converted and checked anew.
        """

    @property
    def name(self) -> str:
        """As messages have it."""

    @property
    def recipe(self) -> Recipe:
        """Of the layer."""

    @property
    def first_expert(self) -> int:
        """Number of the first expert here."""

    @property
    def weight_bytes(self) -> int:
        """Of the repacked weights."""

def repeat_topk(experts: list[LocalExperts], x: sluice._array.Array | None, topk_idx: sluice._array.Array | None, topk_weights: sluice._array.Array | None, x_scale: sluice._array.Array | None = None, out: sluice._array.Array | None = None) -> object:
    """
    LocalExperts.forward_topk() of the one among `experts`, which share a backend, that has
    made a call of the same shapes, strides and element types before. None if none has, or
    while another thread uses the backend: then make the call itself, which checks everything.

    Shapes as for LocalExperts.forward_topk().
    """

def repeat_batch(experts: list[LocalExperts], x: sluice._array.Array | None, num_rows: sluice._array.Array | None, x_scale: sluice._array.Array | None = None, expected_m: int = 0, out: sluice._array.Array | None = None) -> object:
    """The same of LocalExperts.forward_batch(), and its shapes."""

class LocalGroup:
    """
    What the LocalExperts of several layers share: the backend and the rows between the stages.
    They run one after the other, and keep it alive. One thread at a time.
    """

    def __init__(self, backend: Backend, *, hidden: int, intermediate: int, max_entries: int, routed_scaling_factor: float = 1.0) -> None:
        """
        hidden, intermediate: of every layer. max_entries, routed_scaling_factor: as for
        LocalExperts.

        Raises Error: invalid_argument naming the field, out_of_memory.
        """

    @overload
    def add_layer(self, weights: ExpertWeights, *, recipe: str = 'direct', name: str = '') -> LocalExperts:
        """
        LocalExperts of these weights, which are repacked and not needed afterwards. name: for
        messages.

        Raises Error: invalid_argument for weights that do not fit the group, unsupported
        naming the recipe, out_of_memory.
        """

    @overload
    def add_layer(self, experts: Experts, *, recipe: Recipe, first_expert: int = 0, name: str = '') -> LocalExperts:
        """
        The same of experts that repack() made with this backend; shares their memory. recipe:
        a Recipe. first_expert: number of the first one.
        """

    def add_layers(self, checkpoint: Checkpoint, layers: Sequence[int], *, first: int, count: int, recipe: str = 'direct', progress: Callable | None = None, num_threads: int = 0) -> list[LocalExperts]:
        """
        A list of LocalExperts: experts [first, first + count) of each of these layers, all or
        none. progress, num_threads: as in LayerGroup.add_layers().

        Raises Error: also whatever Checkpoint.load_experts() raises.
        """

    def load_stats(self) -> dict:
        """As LayerGroup.load_stats()."""

    def reserve(self, max_entries: int) -> None:
        """
        Makes room for calls of more top-k entries. Graphs that were captured before stay valid,
        since the smaller buffers are kept. Allocates: not during a capture.

        Raises Error: out_of_memory.
        """

    @property
    def max_entries(self) -> int:
        """Most top-k entries of a call."""

    def memory(self) -> dict:
        """dict of the bytes that the group and its layers hold."""

class Engine(Layer):
    """
    One MoE layer of a checkpoint, ready to run under expert parallelism: a Layer in a group of
    its own. Construction and moe_forward() are collective. Keeps transport and backend alive;
    the checkpoint is not needed afterwards.
    """

    def __init__(self, checkpoint: Checkpoint, transport: Transport, backend: Backend, *, layer: int, max_tokens_per_rank: int, low_latency: str | None = 'direct', normal: str | None = 'direct', max_m: int = 0, routed_scaling_factor: float = 1.0, dispatch_dtype: str | None = None, timeout_ms: int | None = None, num_slots: int = 0, placement: Placement | None = None, hosts: Sequence[int] = [], sum_parts: int = 0) -> None:
        """
        low_latency, normal: recipe of each mode; None for a mode that is not called.
        max_m: low-latency, rows reserved for each expert; 0 for the worst case.
        routed_scaling_factor: 1 where the host model applies it.
        dispatch_dtype: 'auto', 'bf16', 'fp8' or 'fp8-static'; None: SLUICE_DISPATCH_DTYPE.
        timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.
        num_slots: slots for experts over all ranks, so that experts may repeat and move; 0: those
        of placement, or none. placement: a Placement; None: Placement.even().
        hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over several
        hosts a token crosses the network once for each. sum_parts: parts of the experts that are
        added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.

        Raises Error: transport naming ranks and field if ranks differ, and whatever Recipe,
        Checkpoint and Exchange raise.
        """

def plan(geometry: ModelGeometry, *, num_ranks: int, max_tokens_per_rank: int, low_latency: str | None = 'direct', normal: str | None = 'direct', max_m: int = 0, scale_dtype: str = 'f32', device: str = 'cpu', num_layers: int = 1, num_slots: int = 0) -> dict:
    """
    dict of the bytes that a LayerGroup of num_layers layers takes on each rank, before anything is
    loaded: num_layers; codes_bytes, scales_bytes and prepared_bytes of all layers together;
    exchange_bytes and scratch_bytes, which they share; moving_bytes, 0 before experts move;
    total_bytes of the last four.

    num_slots: room for so many experts on all ranks together, as LayerGroup has it.

    Raises Error: invalid_argument.
    """

def make_workload(geometry: ModelGeometry, num_tokens: int, *, first_token: int = 0, routing: str = 'uniform', seed: int = 1) -> tuple:
    """
    The tokens of `sluice run`, fixed by the seed: (x [num_tokens, hidden] bf16 as uint16,
    topk_idx [num_tokens, num_topk] int32, topk_weights [num_tokens, num_topk] float32), numpy.

    first_token: position in the stream, so that ranks can take their own part.
    routing: 'uniform', 'zipf' or 'one-expert'.

    Raises Error: invalid_argument.
    """

def suite_names() -> list[str]:
    """Sets of tokens that accuracy() knows."""

def accuracy(checkpoint: Checkpoint, *, layer: int, suite: str = 'gaussian', num_tokens: int = 64, seed: int = 1, recipes: Sequence[str] = [], num_threads: int = 0) -> dict:
    """
    What each rounding of each recipe costs on a layer, against float64: dict with suite,
    num_tokens, num_rows, recipes (by name: output, total, added_percent, roundings, casts) and
    recommendation. Errors are relative L2 norms.

    suite: one of suite_names(). recipes: names; empty for all. num_threads: 0 for all cores.

    Raises Error: invalid_argument, corrupt_file.
    """

"""What tests of sluice.compat.deep_ep share: tokens of every rank, and what must come of them.

Ranks know each other's tokens here (a workload is fixed by its seed), so that what must arrive can
be written down: rows of an expert in order of source rank and token, quantized as the definition
says, and sums in order of top-k entries.
"""

import numpy as np
from spaces import as_bf16, as_float

import sluice
from sluice.compat.deep_ep import Buffer

RANKS, TOPK, EXPERTS, HIDDEN, CAPACITY = 4, 3, 8, 512, 8
LOCAL = EXPERTS // RANKS


def tokens(rank, num_tokens, hidden=HIDDEN, topk=TOPK, experts=EXPERTS):
    geometry = sluice.ModelGeometry(num_experts=experts, num_topk=topk, hidden=hidden, intermediate=128)
    x, idx, weights = sluice.make_workload(geometry, num_tokens, first_token=100 * rank)
    idx = idx.astype(np.int64)
    if num_tokens > 2:
        idx[1, 0] = -1  # An empty entry,
        idx[2] = -1  # and a token for nobody.
    return x, idx, weights


def buffers(num_ranks=RANKS):
    return [
        Buffer(t, backend=sluice.Backend(num_threads=1))
        for t in sluice.Transport.inproc(num_ranks)
    ]


def expected_rows(rank, counts, **shape):
    """For each local expert of `rank`: the rows that must come, bf16 bits."""
    experts, num_ranks = shape.get("experts", EXPERTS), len(counts)
    rows = [[] for _ in range(experts // num_ranks)]
    for source, num_tokens in enumerate(counts):
        x, idx, _ = tokens(source, num_tokens, **shape)
        for token in range(num_tokens):
            for expert in idx[token]:
                if expert >= 0 and expert // len(rows) == rank:
                    rows[expert % len(rows)].append(x[token])
    hidden = shape.get("hidden", HIDDEN)
    return [np.array(r, np.uint16).reshape(-1, hidden) for r in rows]


def expected_sum(x, idx, weights, factor=2.0):
    """Every expert e gives factor * its row * (e + 1)."""
    y = np.zeros(x.shape, np.float32)
    for token in range(len(x)):
        for k, expert in enumerate(idx[token]):
            if expert >= 0:
                row = as_float(as_bf16(as_float(x[token]) * np.float32(factor * (expert + 1))))
                y[token] += weights[token, k] * row
    return as_bf16(y)


def run_experts(rows, rank, factor=2.0, first=None, num_local=LOCAL):
    """bf16 bits in the layout of the rows."""
    experts = np.arange(num_local, dtype=np.float32) + rank * num_local + 1
    return as_bf16(as_float(rows) * np.float32(factor) * experts[:, None, None])


COUNTS = {
    "even": [CAPACITY] * RANKS,
    "ragged": [5, 0, 1, 7],
    "none": [0] * RANKS,
}


def expected_normal(rank, counts):
    """Rows, local expert numbers and weights that must come to `rank`."""
    rows, numbers, weights = [], [], []
    for source, num_tokens in enumerate(counts):
        x, idx, w = tokens(source, num_tokens)
        for token in range(num_tokens):
            mine = (idx[token] >= 0) & (idx[token] // LOCAL == rank)
            if mine.any():
                rows.append(x[token])
                numbers.append(np.where(mine, idx[token] % LOCAL, -1))
                weights.append(np.where(mine, w[token], 0))
    return (np.array(rows, np.uint16).reshape(-1, HIDDEN), np.array(numbers, np.int64).reshape(-1, TOPK),
            np.array(weights, np.float32).reshape(-1, TOPK))

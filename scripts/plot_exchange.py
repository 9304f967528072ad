#!/usr/bin/env python3
"""Draws times over tokens per rank from the tables of scripts/bench_multi_gpu.sh, as an SVG.

    plot_exchange.py PICTURE.svg EXCHANGE.json [NCCL.json]

EXCHANGE.json is what `sluice --json EXCHANGE.json bench exchange` wrote, NCCL.json what
`bench_nccl --json` wrote for the same number of GPUs and the same hidden size. Both axes are
logarithmic. Needs Python 3.10 alone.
"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 470, 60, 190, 44, 52
COLOURS = {"dispatch": "#0b6e4f", "combine": "#1f4e9c", "pair": "#222222",
           "NCCL all-to-all out": "#c77700", "NCCL all-to-all home": "#b3261e"}


def series_of(exchange, nccl):
    """{name: [(tokens per rank, us)]}"""
    cases = exchange["cases"]
    found = {name: [(c["tokens_per_rank"], c["exchange"][name + "_us"]) for c in cases]
             for name in ("dispatch", "combine", "pair")}
    if nccl:
        found["NCCL all-to-all out"] = [(c["tokens_per_rank"], c["all_to_all_out_us"]) for c in nccl]
        found["NCCL all-to-all home"] = [(c["tokens_per_rank"], c["all_to_all_home_us"]) for c in nccl]
    return found


class Axis:
    """A logarithmic axis: values from `low` to `high` lie between two pixels."""

    def __init__(self, low, high, first, last):
        self.low, self.high, self.first, self.last = math.log(low), math.log(high), first, last

    def __call__(self, value):
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def text(x, y, words, anchor="start", colour="#333", size=12):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
            f"{words}</text>")


def line(x1, y1, x2, y2, colour="#ddd"):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def draw(title, series):
    tokens = sorted({t for points in series.values() for t, _ in points})
    times = [us for points in series.values() for _, us in points]
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x = Axis(min(tokens), max(tokens), LEFT, right)
    y = Axis(2 ** math.floor(math.log2(min(times))), 2 ** math.ceil(math.log2(max(times))), bottom, TOP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
           f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', text(LEFT, 22, title, size=14)]
    for tick in range(round(y.low / math.log(2)), round(y.high / math.log(2)) + 1):
        at = y(2.0**tick)
        out += [line(LEFT, at, right, at), text(LEFT - 8, at + 4, f"{2.0**tick:g}", "end")]
    for tick in tokens:
        out += [line(x(tick), TOP, x(tick), bottom), text(x(tick), bottom + 18, str(tick), "middle")]
    out.append(text((LEFT + right) / 2, HEIGHT - 10, "tokens per rank", "middle"))
    out.append(text(LEFT - 8, TOP - 8, "us", "end"))
    label = None
    for name, points in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        colour = COLOURS[name]
        dashes = ' stroke-dasharray="6 4"' if name.startswith("NCCL") else ""
        path = " ".join(f"{x(t):.1f},{y(us):.1f}" for t, us in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        out += [f'<circle cx="{x(t):.1f}" cy="{y(us):.1f}" r="3" fill="{colour}"/>' for t, us in points]
        at = y(points[-1][1]) + 4
        label = at if label is None else max(at, label + 15)  # Names do not lie on each other.
        out.append(text(right + 8, label, f"{name}, {points[-1][1]:.0f} us", colour=colour))
    return "\n".join(out + ["</svg>", ""])


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    with open(sys.argv[2]) as file:
        exchange = json.load(file)
    nccl = None
    if len(sys.argv) == 4:
        with open(sys.argv[3]) as file:
            nccl = json.load(file)
    title = (f"{exchange['num_ranks']} ranks on {exchange['num_devices']} GPUs, hidden {exchange['hidden']}, "
             f"{exchange['mode']} mode, {exchange['transport']}: median of the slowest rank")
    with open(sys.argv[1], "w") as file:
        file.write(draw(title, series_of(exchange, nccl)))


main()

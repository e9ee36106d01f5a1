#!/usr/bin/env python3
"""bench/plot.py [RESULTS.txt]: draws the README's figure from what bench/run_gpu.sh 2 printed, and prints its table.

Reads the newest bench/results/gpu-*.txt unless told another, takes the first table of its section "=== 2 GPUs: ...",
and writes gather-2-gpus.svg beside it. Without matplotlib it says so, and prints the table alone.
"""
import glob
import os
import sys

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
SECTION = "=== 2 GPUs: bench/run_gpu.sh 2"
# column of the results, name in the figure, colour, marker
SERIES = [
    ("full_tensor", "torch, full_tensor() per parameter", "#b04a3f", "s"),
    ("flattened", "torch, one flattened all-gather", "#d99a3d", "D"),
    ("ours NCCL", "lorasync over NCCL", "#4f86b8", "o"),
    ("ours direct", "lorasync direct", "#1b4f8a", "o"),
]
HEADS = ["torch `full_tensor()`", "torch flattened", "lorasync NCCL", "lorasync direct", "floor"]  # in the table
FLOOR = ("fused", "floor: one kernel, one flat tensor", "#222222", "|")


def rows_of(path):
    """The section's first table: a list of {column: text}."""
    lines = open(path, encoding="utf-8").read().splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() == SECTION]
    if not starts:
        sys.exit(f"{path}: no section '{SECTION}'")
    table = []
    for line in lines[starts[0]:]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return [dict(zip(table[0], row)) for row in table[2:]]


def value(row, column):
    try:
        return float(row[column])
    except (KeyError, ValueError):
        return None  # "-": not measured


def shown(x):
    if x is None:
        return "-"
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def print_table(rows):
    print("| adapter | " + " | ".join(HEADS) + " |")
    print("|---|" + "--:|" * len(HEADS))
    for row in rows:
        cells = [shown(value(row, column)) for column, _, _, _ in SERIES + [FLOOR]]
        print(f"| {row['model']} | " + " | ".join(cells) + " |")


def draw(rows, path):
    try:
        import matplotlib
    except ImportError:
        print("skip the figure: no matplotlib here", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same numbers: no date, fixed ids. Text stays text, which makes it small.
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "lorasync", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8.4, 3.5), layout="constrained")
    for y, row in enumerate(rows):
        known = [value(row, column) for column, _, _, _ in SERIES if value(row, column) is not None]
        axes.plot([min(known), max(known)], [y, y], color="#d0d0d0", linewidth=1, zorder=1)
    for column, name, colour, marker in SERIES + [FLOOR]:
        points = [(value(row, column), y) for y, row in enumerate(rows) if value(row, column) is not None]
        size = 170 if marker == "|" else 40
        axes.scatter([x for x, _ in points], [y for _, y in points], s=size, color=colour, marker=marker, label=name,
                     zorder=4 if marker == "|" else 3)
    for y, row in enumerate(rows):
        for column, side in (("full_tensor", 1), ("flattened", 1), ("ours direct", -1)):
            x = value(row, column)
            if x is not None:
                axes.annotate(shown(x), (x, y), xytext=(8 * side, 0), textcoords="offset points", va="center",
                              ha="left" if side > 0 else "right", fontsize=8, color="#333333",
                              bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}, zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(0.02, 1e5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{row['model']}\n{row['tensors']} tensors, {row['MiB']} MiB" for row in rows])
    axes.set_xticks([0.1, 1, 10, 100, 1000, 10000], ["0.1 ms", "1 ms", "10 ms", "100 ms", "1 s", "10 s"], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("FP32 shards on 2 x H200 -> one BF16 image on the first; medians, log scale")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.6)
    figure.savefig(path, metadata={"Date": None})
    if os.environ.get("PLOT_PNG"):
        figure.savefig(os.environ["PLOT_PNG"], dpi=130)


def main():
    found = sorted(glob.glob(os.path.join(HERE, "gpu-*.txt")))
    path = sys.argv[1] if len(sys.argv) > 1 else found[-1] if found else sys.exit(f"no gpu-*.txt in {HERE}")
    rows = rows_of(path)
    print_table(rows)
    draw(rows, os.path.join(os.path.dirname(path), "gather-2-gpus.svg"))


if __name__ == "__main__":
    main()

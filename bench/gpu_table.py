#!/usr/bin/env python3
"""gpu_table.py OURS.jsonl TORCH.jsonl RANKS DRIVER COMMAND: prints what run_gpu.sh measured as one table (Markdown)."""

import datetime
import json
import sys


def load(path):
    rows, info = {}, {}
    for line in open(path, encoding="utf-8"):
        try:
            r = json.loads(line)
        except ValueError:
            continue  # a line cut off by a deadline
        if "info" in r:
            info.update(r)
        else:
            rows[r["id"]] = r
    return rows, info


def number(x, digits=3):
    if x is None:
        return "-"
    return f"{x:.{digits}f}" if x < 100 else f"{x:.1f}" if x < 10000 else f"{x:.0f}"


def ratio(a, b):
    return f"{a / b:.2f}" if a and b else "-"


def mib(x):
    return "-" if x is None else f"{x / 2**20:.1f}"


def version(v):
    v = int(v or 0)
    return f"{v // 10000}.{v // 100 % 100}.{v % 100}" if v >= 10000 else str(v)


def table(head, rows):
    width = [max(len(str(r[i])) for r in [head] + rows) for i in range(len(head))]
    for r in [head, ["-" * w for w in width]] + rows:
        cells = [str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(r, width))]
        print("| " + " | ".join(cells) + " |")


def staged(o, k):
    return "" if o.get(k + "_is_direct", 1) else " (staged)"


def same(o, t):
    """Bits: each program against itself, then against each other."""
    if o.get("direct_equal") is None and o.get("nccl_equal") is None:
        return "not run"
    equal = ("direct_equal", "dnccl_equal", "nccl_equal", "reshard_equal", "rdirect_equal", "rdnccl_equal")
    mine = all(o.get(k, 1) == 1 for k in (*equal, "direct_digest_ok", "nccl_digest_ok"))
    if not mine or t.get("equal") is False:
        return "NO"
    if not t.get("checksum") or not o.get("checksum"):
        return "self only"
    return "yes" if o["checksum"] == t["checksum"] and o["seed"] == t["seed"] else "NO"


def reshard_same(o):
    if o.get("reshard_equal") is None:
        return "-"
    return "yes" if all(o.get(k, 1) == 1 for k in ("reshard_equal", "rdirect_equal", "rdnccl_equal")) else "NO"


def main():
    ours, info = load(sys.argv[1])
    torch, torch_info = load(sys.argv[2])
    ranks, driver, command = sys.argv[3:6]
    both = [(i, ours.get(i, {}), torch.get(i, {})) for i in dict.fromkeys([*ours, *torch])]
    print()
    now = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M UTC}"
    cuda = f"{info.get('cuda_runtime', 0) // 1000}.{info.get('cuda_runtime', 0) % 1000 // 10}"
    print(
        f"date {now}; {ranks} ranks on {info.get('gpus', '?')} x {info.get('gpu', '?')}; driver {driver}; CUDA {cuda}; "
        f"NCCL {version(info.get('nccl'))}; torch {torch_info.get('torch', '-')} "
        f"(NCCL {torch_info.get('torch_nccl', '-')}); lorasync {info.get('lorasync', '-')}"
    )
    print(f"command: {command}")
    print(
        f"fp32 shards ({info.get('layout', '?')}) on every rank, bf16 image on rank 0; milliseconds, medians; "
        + "equal: bit by bit"
        + ("; ours NCCL: with a communicator of its own, non-blocking" if info.get("own_comm") else "")
        + (f"; ours NCCL: buckets of {info['bucket_mib']} MiB" if info.get("bucket_mib") else "")
    )
    print()
    table(
        [
            "model",
            "tensors",
            "MiB",
            "full_tensor",
            "flattened",
            "ours NCCL",
            "ours direct",
            "NCCL ranks",
            "ncclSend",
            "peer copy",
            "fused",
            "fused device",
            "stall",
            "direct/fused",
            "direct/copy",
            "nccl/ncclSend",
            "full_tensor/direct",
            "equal to torch",
        ],
        [
            [
                (o or t).get("model", i),
                (o or t).get("tensors", "-"),
                mib((o or t).get("bytes")),
                number(t.get("full_tensor_ms")),
                number(t.get("flat_ms")),
                number(o.get("nccl_ms")),
                number(o.get("direct_ms")) + staged(o, "direct"),
                number(o.get("dnccl_ms")) + staged(o, "dnccl"),
                number(o.get("ncclsend_ms")),
                number(o.get("copy_ms")),
                number(o.get("fused_ms")),
                number(o.get("fused_device_ms")),
                number(o.get("direct_stall_ms")),
                ratio(o.get("direct_ms"), o.get("fused_ms")),
                ratio(o.get("direct_ms"), o.get("copy_ms")),
                ratio(o.get("nccl_ms"), o.get("ncclsend_ms")),
                ratio(t.get("full_tensor_ms"), o.get("direct_ms")),
                same(o, t),
            ]
            for i, o, t in both
        ],
    )
    print()
    table(
        [
            "model",
            "plan ms",
            "plan MiB root",
            "plan MiB other",
            "nccl plan MiB root",
            "nccl plan MiB other",
            "image MiB",
            "flat, parts left apart ms",
            "nccl stall",
            "runs direct/full_tensor",
        ],
        [
            [
                (o or t).get("model", i),
                number(o.get("direct_plan_ms"), 1),
                mib(o.get("direct_root_bytes")),
                mib(o.get("direct_other_bytes")),
                mib(o.get("nccl_root_bytes")),
                mib(o.get("nccl_other_bytes")),
                mib(o.get("bytes")),
                number(t.get("flat_views_ms")),
                number(o.get("nccl_stall_ms")),
                f"{o.get('direct_runs', '-')}/{t.get('full_tensor_runs', '-')}",
            ]
            for i, o, t in both
        ],
    )
    print()
    table(
        [
            "reshard",
            "direct",
            "stall",
            "direct, ranks of NCCL",
            "over NCCL",
            "stall",
            "its messages alone",
            "direct/messages",
            "NCCL/messages",
            "MiB received",
            "of at least",
            "ratio",
            "MiB on a link",
            "of at least, ratio",
            "equal",
        ],
        [
            [
                o.get("model", i),
                number(o.get("rdirect_ms")) + staged(o, "rdirect"),
                number(o.get("rdirect_stall_ms")),
                number(o.get("rdnccl_ms")) + staged(o, "rdnccl"),
                number(o.get("reshard_ms")),
                number(o.get("reshard_stall_ms")),
                number(o.get("exchange_ms")),
                ratio(o.get("rdirect_ms"), o.get("exchange_ms")),
                ratio(o.get("reshard_ms"), o.get("exchange_ms")),
                mib(o.get("reshard_receive_bytes")),
                mib(o.get("reshard_bound_bytes")),
                ratio(o.get("reshard_receive_bytes"), o.get("reshard_bound_bytes")),
                mib(o.get("reshard_link_bytes")),
                number(o.get("reshard_link_ratio"), 2),
                reshard_same(o),
            ]
            for i, o, _ in both
            if o
        ],
    )
    for i, o, _ in both:
        if o.get("error"):
            print(f"ERROR {i}: {o['error']}")


if __name__ == "__main__":
    main()

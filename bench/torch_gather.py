#!/usr/bin/env python3
"""The same gathers as bench_gpu.c, with torch.distributed: what a framework does today, and what one writes by hand.

   torch_gather.py [N] [--layout fsdp|tp2|ep] [--device cuda|cpu] [--seed S] [--only MODEL] [--quick] [--tiny]
                   [--deadline SECONDS]
   prints JSON lines. The layouts are those of bench_gpu.c.

   full_tensor  for every parameter, a DTensor of fp32 shards: full_tensor().to(bfloat16), on all ranks; an expert that
                one rank has alone is broadcast from there
   flat         all local shards cast into one bf16 buffer by one _foreach_copy_, one all_gather_into_tensor, and one
                _foreach_copy_ that puts the parts together, in the order of a safetensors file; all views are made
                once, outside the timing
   flat_views   the same without putting the parts together: a parameter is then in as many parts as there are ranks

Content, order and checksum are defined in bench_gpu.c; both programs compute them, so equal checksums for one seed mean
equal bytes. Starts its own processes; needs no torchrun. --device cpu (gloo) and --tiny are for trying the program out.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

M32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit number; products wrap
BOUNDARY = 64  # elements: 256 bytes, as the caching allocator aligns

# id, name, layers, hidden, q, kv, mlp, experts, r
MODELS = [
    ("qwen3-0.6b", "Qwen3-0.6B r32", 28, 1024, 2048, 1024, 3072, 0, 32),
    ("qwen3-8b", "Qwen3-8B r32", 36, 4096, 4096, 1024, 12288, 0, 32),
    ("llama-3-70b", "Llama-3-70B r64", 80, 8192, 8192, 1024, 28672, 0, 64),
    ("qwen3-30b-a3b", "Qwen3-30B-A3B r16", 48, 2048, 4096, 512, 768, 128, 16),
    ("odd", "odd shapes", 0, 0, 0, 0, 0, 0, 0),
]


def make_set(model, tiny):
    """In the order of bench_gpu.c: [(name, shape, dimension split over the ranks, dimension split by tensor parallelism
    or None, expert or None)]."""
    _, _, layers, hidden, q, kv, mlp, experts, r = model
    out = []
    if not layers:
        for i in range(96):
            shapes = [(1, 1) if i % 8 else (1,), (64 * i + 3, 2 * i + 1), (8 * i + 1, 5 * i + 7), (1001 + 13 * i,)]
            shape = shapes[i % 4]
            out.append((f"odd.{i}.weight", shape, 1 if i % 4 == 2 else 0, None, None))
        return out
    if tiny:
        layers, experts = 2, min(experts, 4)

    def pair(layer, expert, module, rows, columns):
        at = f"base_model.model.model.layers.{layer}.{module}"
        by_input = module.endswith(("o_proj", "down_proj"))
        out.append((at + ".lora_A.weight", (r, columns), 0, 1 if by_input else None, expert))
        out.append((at + ".lora_B.weight", (rows, r), 0, None if by_input else 0, expert))

    for layer in range(layers):
        pair(layer, None, "self_attn.q_proj", q, hidden)
        pair(layer, None, "self_attn.k_proj", kv, hidden)
        pair(layer, None, "self_attn.v_proj", kv, hidden)
        pair(layer, None, "self_attn.o_proj", hidden, q)
        for expert, path in [(e, f"mlp.experts.{e}") for e in range(experts)] or [(None, "mlp")]:
            pair(layer, expert, path + ".gate_proj", mlp, hidden)
            pair(layer, expert, path + ".up_proj", mlp, hidden)
            pair(layer, expert, path + ".down_proj", hidden, mlp)
    return out


def numel(shape):
    n = 1
    for s in shape:
        n *= s
    return n


def chunk(length, rank, world):
    c = -(-length // world)
    off = min(c * rank, length)
    return off, min(c, length - off)


def align(n):
    return -(-n // BOUNDARY) * BOUNDARY


class Layout:
    """Who holds what."""

    def __init__(self, name, world, experts):
        self.name, self.world, self.experts = name, world, experts

    def owner(self, t):
        """The rank that has a whole expert, or None."""
        return t[4] * self.world // self.experts if self.name == "ep" and t[4] is not None else None

    def box(self, t, rank):
        """[(offset, length) of each dimension] of a tensor on a rank."""
        _, shape, dim, tp, _ = t
        box = [(0, n) for n in shape]
        if self.owner(t) is not None:
            return box if self.owner(t) == rank else [(0, 0)] + box[1:]
        splits = [(dim, rank, self.world)]
        if self.name == "tp2":
            half = self.world // 2
            splits = ([(tp, rank // half, 2)] if tp is not None else []) + [(dim, rank % half, half)]
        for d, r, n in splits:
            off, length = chunk(box[d][1], r, n)
            box[d] = (box[d][0] + off, length)
        return box

    def is_copy(self, t, rank):
        """Whether another rank has the same, and sends it."""
        return self.name == "tp2" and t[3] is None and rank >= self.world // 2

    def mesh(self, device):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device, (2, self.world // 2) if self.name == "tp2" else (self.world,))

    def placements(self, t):
        from torch.distributed.tensor import Replicate, Shard

        tp = [Shard(t[3]) if t[3] is not None else Replicate()] if self.name == "tp2" else []
        return tp + [Shard(t[2])]


def content(torch, first, length, seed, device):
    """fp32 values of runs of elements: run i has length[i] elements numbered from first[i]; runs lie back to back."""
    length = torch.tensor(length, dtype=torch.int64, device=device)
    first = torch.tensor(first, dtype=torch.int64, device=device)
    begin = torch.cumsum(length, 0) - length
    h = torch.repeat_interleave(first - begin, length)
    h += torch.arange(h.numel(), dtype=torch.int64, device=device)
    h.add_(seed).bitwise_and_(M32)
    h ^= h >> 16
    h.mul_(0x21F0AAAD).bitwise_and_(M32)
    h ^= h >> 15
    h.mul_(0x735A2D97).bitwise_and_(M32)
    h ^= h >> 15
    bits = (h & 0x7FFFFF) | ((((h >> 23) & 15) + 111) << 23)
    bits -= h & 0x80000000  # the sign bit, as a signed 32-bit number has it
    return bits.to(torch.int32).view(torch.float32)


def checksum(torch, image):
    words, total, step = image.view(torch.int16), 0, 1 << 25
    for at in range(0, words.numel(), step):
        w = (words[at : at + step].to(torch.int64) & 0xFFFF) + 1
        i = torch.arange(at, at + w.numel(), dtype=torch.int64, device=image.device)
        total += int((w * ((i * GOLDEN) | 1)).sum().item())
    return f"{total & ((1 << 64) - 1):016x}"


class Gather:
    """One model on one rank."""

    def __init__(self, torch, dist, mesh, model, a, rank, device):
        self.torch, self.dist, self.rank, self.device, self.a = torch, dist, rank, device, a
        self.world = a.world
        self.tensors = make_set(model, a.tiny)
        self.layout = Layout(a.layout, a.world, min(model[7], 4) if a.tiny else model[7])
        self.make_locals(mesh)
        self.make_flat()

    def make_locals(self, mesh):
        from torch.distributed.tensor import DTensor

        torch, first, length, views, base, at = self.torch, [], [], [], 0, 0
        for t in self.tensors:
            shape, box = t[1], self.layout.box(t, self.rank)
            local = tuple(n for _, n in box)
            n = numel(local)
            if n and local[1:] == shape[1:]:
                first.append(base + box[0][0] * numel(shape[1:]))
                length.append(n)
            elif n:
                for row in range(local[0]):
                    first.append(base + (box[0][0] + row) * shape[1] + box[1][0])
                    length.append(local[1])
            first.append(0)  # the gap up to the next boundary
            length.append(align(n) - n)
            views.append((at, n, local))
            at += align(n)
            base += numel(shape)
        self.elements = base
        self.params = content(torch, first, length, self.a.seed, self.device)
        self.locals = [self.params[o : o + n].view(s) for o, n, s in views]
        self.parameters = []  # (what this rank has of it, shape, and of a whole expert its rank)
        for t, local in zip(self.tensors, self.locals):
            owner = self.layout.owner(t)
            if owner is None:
                stride = (t[1][1], 1) if len(t[1]) == 2 else (1,)
                local = DTensor.from_local(
                    local, mesh, self.layout.placements(t), run_check=False, shape=torch.Size(t[1]), stride=stride
                )
            self.parameters.append((local, t[1], owner))

    def make_flat(self):
        """Buffers and views. Every rank's part is as long as the longest; the image is in the order of names."""
        torch, bf16, layout = self.torch, self.torch.bfloat16, self.layout
        parts = [
            [(i, t, layout.box(t, r)) for i, t in enumerate(self.tensors) if not layout.is_copy(t, r)]
            for r in range(self.world)
        ]
        self.part = max(sum(numel([n for _, n in box]) for _, _, box in p) for p in parts)
        self.send = torch.zeros(self.part, dtype=bf16, device=self.device)
        self.receive = torch.zeros(self.part * self.world, dtype=bf16, device=self.device)
        self.image = torch.zeros(self.elements, dtype=bf16, device=self.device)
        at, self.final = 0, {}
        for t in sorted(self.tensors, key=lambda t: t[0]):
            self.final[t[0]] = self.image[at : at + numel(t[1])].view(t[1])
            at += numel(t[1])
        self.send_views, self.send_from, self.from_views, self.to_views = [], [], [], []
        for r in range(self.world):
            at = 0
            for i, t, box in parts[r]:
                local = tuple(n for _, n in box)
                n = numel(local)
                if n == 0:
                    continue
                if r == self.rank:
                    self.send_views.append(self.send[at : at + n].view(local))
                    self.send_from.append(self.locals[i])
                self.from_views.append(self.receive[r * self.part + at : r * self.part + at + n].view(local))
                to = self.final[t[0]]
                for d, (off, length) in enumerate(box):
                    to = to.narrow(d, off, length)
                self.to_views.append(to)
                at += n

    def sync(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def full_tensor(self, local, shape, owner):
        if owner is None:
            return local.full_tensor().to(self.torch.bfloat16)
        whole = local if owner == self.rank else self.torch.empty(shape, dtype=self.torch.float32, device=self.device)
        self.dist.broadcast(whole, owner)
        return whole.to(self.torch.bfloat16)

    def full_tensors(self, num=None):
        return [self.full_tensor(*p) for p in self.parameters[:num]]

    def flat(self, place=True):
        torch = self.torch
        if self.send_views:
            torch._foreach_copy_(self.send_views, self.send_from)
        self.dist.all_gather_into_tensor(self.receive.view(torch.uint8), self.send.view(torch.uint8))
        if place:
            torch._foreach_copy_(self.to_views, self.from_views)

    def measure(self, run, most, seconds):
        """Median milliseconds on rank 0, number of runs (the same on all ranks), and what the last one returned."""
        times, began, out = [], time.perf_counter(), None
        more = self.torch.ones(1, dtype=self.torch.int32, device=self.device)
        while more.item():
            out = None  # its memory is there for this run
            self.sync()
            self.dist.barrier()
            self.sync()
            start = time.perf_counter()
            out = run()
            self.sync()
            times.append((time.perf_counter() - start) * 1e3)
            more.fill_(int(len(times) < most and time.perf_counter() - began < seconds))
            self.dist.broadcast(more, 0)
        times.sort()
        n = len(times)
        return (times[n // 2] + times[(n - 1) // 2]) / 2, n, out

    def report(self, model):
        torch, quick = self.torch, self.a.quick
        r = {
            "id": model[0],
            "model": model[1],
            "ranks": self.world,
            "seed": self.a.seed,
            "tensors": len(self.tensors),
            "bytes": self.elements * 2,
        }
        self.full_tensors(50)  # a warm-up
        r["full_tensor_ms"], r["full_tensor_runs"], outs = self.measure(
            self.full_tensors, 3 if quick else 10, 1 if quick else 3
        )
        for place, key in ((False, "flat_views"), (True, "flat")):
            self.flat(place)
            self.flat(place)
            r[key + "_ms"], r[key + "_runs"], _ = self.measure(
                lambda: self.flat(place), 5 if quick else 30, 1 if quick else 2
            )
        self.image.fill_(float("nan"))
        self.receive.fill_(float("nan"))
        self.flat()
        if self.rank == 0:
            other = torch.empty_like(self.image)
            where, at = {}, 0
            for t in sorted(self.tensors, key=lambda t: t[0]):
                where[t[0]] = other[at : at + numel(t[1])].view(t[1])
                at += numel(t[1])
            torch._foreach_copy_([where[t[0]] for t in self.tensors], outs)
            r["equal"] = bool(torch.equal(other.view(torch.int16), self.image.view(torch.int16)))
            r["checksum"] = checksum(torch, self.image)
            print(json.dumps(r), flush=True)
        self.sync()


def run_rank(a):
    import datetime
    import gc
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", a.rank) if a.device == "cuda" else torch.device("cpu")
    if a.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if a.device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{a.port}",
        rank=a.rank,
        world_size=a.world,
        timeout=datetime.timedelta(seconds=60),
        **({"device_id": device} if a.device == "cuda" else {}),
    )
    mesh = Layout(a.layout, a.world, 0).mesh(a.device)
    if a.rank == 0:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if a.device == "cuda" else ""
        print(
            json.dumps({"info": 1, "torch": torch.__version__, "torch_cuda": torch.version.cuda, "torch_nccl": nccl}),
            flush=True,
        )
    for model in MODELS:
        if model[0] != a.only if a.only else a.layout == "ep" and not model[7]:
            continue
        gc.collect()
        gc.disable()
        g = Gather(torch, dist, mesh, model, a, a.rank, device)
        g.report(model)
        del g
        gc.enable()
    dist.barrier()
    if a.device == "cuda":
        torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # what is left ends with the process


def start(a, script):
    """One process per rank; ends them all when one fails or the time is over. This process does not load torch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = [*sys.argv[1:], "--world", str(a.world), "--port", str(port), "--seed", str(a.seed)]
    ranks = [subprocess.Popen([sys.executable, script, *common, "--rank", str(r)]) for r in range(a.world)]
    end, code = time.monotonic() + a.deadline, 0
    try:
        while code == 0 and any(p.poll() is None for p in ranks):
            code = next((p.returncode for p in ranks if p.poll() not in (None, 0)), 0)
            if time.monotonic() > end:
                print("torch_gather.py: the deadline passed", file=sys.stderr)
                code = 124
            time.sleep(0.05)
        return code or next((p.returncode for p in ranks if p.returncode), 0)
    finally:
        for p in ranks:
            if p.poll() is None:
                p.kill()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("n", nargs="?", type=int, default=0)
    p.add_argument("--layout", default="fsdp", choices=["fsdp", "tp2", "ep"])
    # bench_gpu's alone, as --bucket is; run_gpu.sh gives both programs the same arguments
    p.add_argument("--own-comm", action="store_true")
    p.add_argument("--bucket", type=int, default=0)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--seed", type=lambda s: int(s, 0) & M32, default=int.from_bytes(os.urandom(4), "little"))
    p.add_argument("--only", default="")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--deadline", type=float, default=150)
    p.add_argument("--world", type=int, default=0)
    p.add_argument("--rank", type=int, default=-1)
    p.add_argument("--port", type=int, default=0)
    a = p.parse_args()
    if a.rank >= 0:
        run_rank(a)
    if not a.n and a.device == "cuda":
        a.n = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    a.world = a.n or 2
    sys.exit(start(a, os.path.abspath(__file__)) and 1)


if __name__ == "__main__":
    main()

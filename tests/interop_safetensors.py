"""Compares lorasync.h with the safetensors library, both ways and byte by byte.

usage: interop_safetensors.py [IMAGE_TOOL]     the compiled tests/image_tool.c; default: compiled here with $CC or cc

Exits with 77 (skipped) where Python's safetensors or numpy is missing.
"""

import os
import random
import subprocess
import sys
import tempfile

try:
    import numpy
    import safetensors
    from safetensors.numpy import load_file, save
except ImportError as e:
    print(f"skip interop_safetensors: {e}")
    sys.exit(77)

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16"}
NAMES.update({"int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64"})
MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def mix(x):
    x &= MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


KEYS = [mix((i + 1) * STEP) >> 32 | 1 for i in range(64)]


def digest(b):
    """lorasync_digest by its definition."""
    b += bytes(-len(b) % 4)
    words = (int.from_bytes(b[i : i + 4], "little") for i in range(0, len(b), 4))
    return sum(KEYS[i % 64] * w * (mix(i // 64 + STEP) | 1) for i, w in enumerate(words)) & MASK


def listing(tensors):
    """What image_tool prints for these tensors, as a set of lines."""
    return {
        f"{digest(t.tobytes()):016x} {NAMES[t.dtype.name]} [{','.join(map(str, t.shape))}] {name}"
        for name, t in tensors.items()
    }


def random_tensors(rng):
    out = {}
    for _ in range(rng.randrange(30)):
        name = f"layers.{rng.randrange(1000)}." + rng.choice(
            ["lora_A.weight", "lora_B.weight", 'quo"te', "back\\slash", "\u00e9\u4e2d\U0001f600", "sp ace/"]
        )
        shape = [rng.randrange(6) for _ in range(rng.randrange(5))]
        dtype = rng.choice(list(NAMES))
        values = numpy.array(
            [rng.randrange(2 if dtype == "bool" else 128) for _ in range(int(numpy.prod(shape, dtype=int)))]
        )
        out[name] = values.astype(dtype).reshape(shape)
    return out


def run(tool, *args):
    r = subprocess.run([tool, *args], capture_output=True, encoding="utf-8")
    if r.returncode:
        sys.exit(f"image_tool {' '.join(args)} failed: {r.stderr}")
    return r.stdout.splitlines()


def main():
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as tmp:
        tool = sys.argv[1] if len(sys.argv) > 1 else os.path.join(tmp, "image_tool")
        if len(sys.argv) < 2:
            cc = os.environ.get("CC", "cc").split()
            flags = ["-O2", "-I", os.environ.get("LORASYNC_INCLUDE", os.path.dirname(HERE)), "-I", HERE]
            subprocess.run([*cc, *flags, "-o", tool, os.path.join(HERE, "image_tool.c"), "-lm"], check=True)
        path = os.path.join(tmp, "f.safetensors")
        for seed in range(100):  # ours, read and written again by the library: the same bytes
            printed = run(tool, "write", str(seed), path)
            tensors = load_file(path)
            if set(printed) != listing(tensors):
                sys.exit(f"seed {seed}: the library reads other tensors than were written")
            with open(path, "rb") as f:
                ours = f.read()
            if ours != save(tensors, metadata={"format": "pt"}):
                sys.exit(f"seed {seed}: the library writes these tensors differently")
        for case in range(100):  # theirs, read by us
            tensors = random_tensors(rng)
            theirs = save(tensors, metadata=rng.choice([None, {"format": "pt"}, {"a": "b", "c": 'd"\n\u00e9'}]))
            with open(path, "wb") as f:
                f.write(theirs)
            if set(run(tool, "read", path)) != listing(tensors):
                sys.exit(f"case {case}: image_tool reads other tensors than the library wrote")
    print(f"interop_safetensors: 200 files agree with safetensors {safetensors.__version__}, numpy {numpy.__version__}")


main()

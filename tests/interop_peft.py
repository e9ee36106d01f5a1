"""Loads what examples/demo published with safetensors, with PEFT where that is installed, and compares every element.

usage: interop_peft.py [DEMO]      the compiled examples/demo.c; default: $LORASYNC_BUILD/examples/demo

The values are computed here once more, from the definition in demo.c (made_up), rounded by numpy or torch. Without
safetensors and numpy it exits with 77 (skipped); without torch, transformers and peft only the files are checked.
"""

import json
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import numpy as np
    import safetensors
except ImportError as e:
    print(f"skip interop_peft: {e}")
    sys.exit(77)

try:
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as e:
    torch = None
    print(f"without PEFT: {e}")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = (
    sys.argv[1]
    if len(sys.argv) > 1
    else os.path.join(os.environ.get("LORASYNC_BUILD", os.path.join(ROOT, "build")), "examples", "demo")
)
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, RANK = 3, 96, 12, 6, 8, 192, 12  # the model "tiny"
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
STEPS = 2


def tensors():
    """Key and shape of every tensor, in demo.c's order."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        for name, out, width in (
            ("self_attn.q_proj", q, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q),
            ("mlp.gate_proj", INTER, HIDDEN),
            ("mlp.up_proj", INTER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTER),
        ):
            key = f"base_model.model.model.layers.{layer}.{name}"
            yield key + ".lora_A.weight", (RANK, width)
            yield key + ".lora_B.weight", (out, RANK)


def truth(index, version, shape):
    """demo.c's made_up: float32."""
    with np.errstate(over="ignore"):
        u = np.uint32
        seed = u(index) * u(0x9E3779B1) ^ u(version) * u(0x85EBCA77) ^ u(0x27D4EB2F)
        h = (np.arange(shape[0] * shape[1], dtype=np.uint32) + seed) * u(0x9E3779B1)
        h = (h ^ h >> u(15) ^ seed) * u(0x2C1B3C6D)
        h = (h ^ h >> u(12)) * u(0x297A2D39)
        h ^= h >> u(15)
    return (((h >> u(8)).astype(np.int32) - 0x800000).astype(np.float32) / np.float32(134217728)).reshape(shape)


def rounded(values, wire):
    """The bytes of float32 values in the published type; None when nobody here can tell."""
    if wire == "F32":
        return values.tobytes()
    if wire == "F16":
        return values.astype(np.float16).tobytes()
    if wire == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    if torch and hasattr(torch, "float8_e4m3fn"):
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    return None


def check(condition, what):
    if not condition:
        sys.exit(f"FAIL interop_peft: {what}")


def check_file(directory, wire):
    with open(os.path.join(directory, "adapter_model.safetensors"), "rb") as f:
        found = dict(safetensors.deserialize(f.read()))
    expected = dict(tensors())
    check(set(found) == set(expected), f"keys differ: {sorted(set(found) ^ set(expected))[:4]}")
    for index, (key, shape) in enumerate(tensors()):
        t = found[key]
        dtype = t["dtype"] if isinstance(t["dtype"], str) else str(t["dtype"])
        check(dtype == wire and tuple(t["shape"]) == shape, f"{key} is {dtype} {t['shape']}, expected {wire} {shape}")
        data = rounded(truth(index, STEPS, shape), wire)
        check(data is None or bytes(t["data"]) == data, f"{key}: wrong bytes")


def check_config(directory):
    """What PEFT's LoraConfig, vLLM and SGLang read."""
    with open(os.path.join(directory, "adapter_config.json")) as f:
        c = json.load(f)
    for key, value in (
        ("peft_type", "LORA"),
        ("r", RANK),
        ("lora_alpha", 2 * RANK),
        ("bias", "none"),
        ("inference_mode", True),
        ("base_model_name_or_path", "tiny"),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("modules_to_save", None),
    ):
        check(key in c and c[key] == value, f"config: {key} is {c.get(key)!r}, expected {value!r}")
    check(sorted(c["target_modules"]) == TARGETS, f"config: target_modules {c['target_modules']}")
    check(not c.get("use_dora") and not c.get("use_rslora"), "config: use_dora or use_rslora")


def check_peft(directory):
    config = PeftConfig.from_pretrained(directory)
    check(config.peft_type == "LORA" and config.r == RANK and config.lora_alpha == 2 * RANK, f"PEFT reads {config}")
    check(sorted(config.target_modules) == TARGETS, f"PEFT reads target_modules {config.target_modules}")
    weights = load_peft_weights(directory, device="cpu")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            intermediate_size=INTER,
            num_hidden_layers=LAYERS,
            vocab_size=64,
        )
    )
    tokens = torch.arange(16).reshape(1, 16)
    with torch.no_grad():
        before = model(tokens).logits
        served = PeftModel.from_pretrained(model, directory)
        after = served(tokens).logits
    loaded = get_peft_model_state_dict(served, save_embedding_layers=False)
    check(set(loaded) == set(weights) == {key for key, _ in tensors()}, "PEFT's model has other tensors than the file")
    for index, (key, shape) in enumerate(tensors()):
        values = torch.from_numpy(truth(index, STEPS, shape)).to(weights[key].dtype)
        check(torch.equal(weights[key], values), f"PEFT loads other values for {key}")
        check(torch.equal(loaded[key].to(values.dtype), values), f"PEFT's model has other values for {key}")
    check(not torch.equal(before, after) and torch.isfinite(after).all(), "the adapter changes nothing")


def main():
    if not os.path.exists(DEMO):
        print(f"skip interop_peft: {DEMO} is not built")
        sys.exit(77)
    runs = [
        ("fsdp2", 4, "bf16", "BF16"),
        ("mixed", 5, "f32", "F32"),
        ("tp+fsdp", 4, "f16", "F16"),
        ("zero3", 3, "e4m3", "F8_E4M3"),
    ]
    for layout, ranks, wire, dtype in runs:
        with tempfile.TemporaryDirectory() as directory:
            out = os.path.join(directory, "adapter")
            command = [DEMO, "--model", "tiny", "--steps", str(STEPS), "--layout", layout, "--ranks", str(ranks)]
            subprocess.run(command + ["--wire", wire, "--out", out], check=True, stdout=subprocess.DEVNULL)
            check_file(out, dtype)
            check_config(out)
            if torch and wire != "e4m3":
                check_peft(out)
            print(f"ok {layout} over {ranks} ranks, {dtype}{', PEFT too' if torch and wire != 'e4m3' else ''}")


main()

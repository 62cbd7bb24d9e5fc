"""Compiles every Triton kernel for GPUs that need not be there, and prints what each takes, as JSON lines.

A process of its own, since Triton's interpreter and its compiler exclude each other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcompress.kernels import triton_codes, triton_decode, triton_mass, triton_write
from kvcompress.kernels.device import powers

Case: TypeAlias = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]  # kernel, types, constants, tile
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: dict[str, int], target: int) -> Any:
    """Resources of one kernel: bytes of shared memory, registers and bytes of local memory of a thread."""
    options = {name: tile[name] for name in ("num_warps", "num_stages") if name in tile}
    constants = {**constants, **{name: size for name, size in tile.items() if name not in options}}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("_row", "_head", "_slot", "_stride"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options={**options, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"shared": binary.metadata.shared, "registers": registers, "local": stack}


def cases(dtype: torch.dtype, head_dim: int, group: int, target: int) -> dict[str, Case]:
    """Kernel, types, constants and tile by name."""
    name, dims, itemsize = _TYPES[dtype], powers(head_dim), dtype.itemsize
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    mass = {"HEADS": 2, "GROUP": group, "D": head_dim, "DIMS": dims, "HAS_VALID": True, "HAS_FIRST": True}
    mass_types = {"Q": f"*{name}", "K": f"*{name}", "LSE": "*fp32", "VALID": "*u8", "FIRST": "*i64", "OUT": "*fp32"}
    decode = {
        "HEADS": 2,
        "GROUP": group,
        "GROUP_BLOCK": powers(group),
        "D": head_dim,
        "DIMS": dims,
        "VALUE_D": head_dim,
    }
    decode |= {"VALUE_DIMS": dims, "HAS_LENGTH": True, "HAS_START": False, "PRECISION": precision}
    decode_types = {"Q": f"*{name}", "K": f"*{name}", "V": f"*{name}", "LENGTH": "*i64", "OUT": "*fp32", "LSE": "*fp32"}
    decode_types |= {"START": "*i64"}
    return {
        "mass": (
            triton_mass.mass_kernel,
            {**mass_types, "scale": "fp32"},
            {**mass, "PRECISION": precision},
            triton_mass.blocks(head_dim, itemsize, target >= 90),
        ),
        "decode": (
            triton_decode.decode_kernel,
            {**decode_types, "scale": "fp32"},
            decode,
            triton_decode.blocks(head_dim, head_dim, itemsize),
        ),
        "decode without gaps": (
            triton_decode.decode_kernel,
            {**decode_types, "scale": "fp32"},
            {**decode, "HAS_START": True},
            triton_decode.blocks(head_dim, head_dim, itemsize),
        ),
        "write": (
            triton_write.write_kernel,
            dict.fromkeys(("K", "V", "NEW_K", "NEW_V"), f"*{name}") | {"SLOT": "*i64", "START": "*i64"},
            {"HEADS": 2, "D": head_dim, "DIMS": dims, "VALUE_D": head_dim, "VALUE_DIMS": dims, "HAS_START": True},
            {"num_warps": 1},
        ),
        "merge": (
            triton_decode.merge_kernel,
            {"PARTS": "*fp32", "LSE": "*fp32", "OUT": f"*{name}"},
            {"D": head_dim, "DIMS": min(64, dims), "SPLITS": 128},
            {"num_warps": 4},
        ),
    }


def codes_case(dtype: torch.dtype, head_dim: int, group: int, bits: int) -> Case:
    """The kernel over codes, with keys in groups of 64 tokens and values in runs of 64 dimensions."""
    name = _TYPES[dtype]
    pointers = {"K": "*u8", "V": "*u8", "K_ROWS": "*i32", "V_ROWS": "*i32", "LENGTH": "*i64", "OUT": "*fp32"}
    pointers |= {"START": "*i64", "DENSE_LENGTH": "*i64", "DENSE_START": "*i64"}
    pointers |= dict.fromkeys(("DENSE_K", "DENSE_V"), f"*{name}")
    pointers |= dict.fromkeys(("Q", "K_SCALE", "K_SHIFT", "V_SCALE", "V_SHIFT"), f"*{name}") | {"LSE": "*fp32"}
    words = triton_codes.words_of(head_dim, bits, False, dtype)
    pointers |= dict.fromkeys(("K", "V"), "*i16" if words["STEP"] == 2 else "*u8")
    constants = {"HEADS": 2, "GROUP": group, "GROUP_BLOCK": triton_codes.columns(group), "D": head_dim}
    constants |= {
        **words,
        "ASSEMBLY": words["STEP"] == 2,
        "BITS": bits,
        "FLOAT8": False,
        "HAS_SHIFT": True,
        "K_HAS_ROWS": False,
    }
    constants |= {"V_HAS_ROWS": False, "K_SLOTS": 64, "V_SLOTS": 1, "K_SHARED": 1, "V_SHARED": min(head_dim, 64)}
    constants |= {"HAS_LENGTH": True, "HAS_START": bits == 4, "PRECISION": "ieee"}  # without gaps once is enough
    constants |= {"HAS_DENSE": True, "HAS_DENSE_LENGTH": True}
    constants |= triton_codes.dense_tile(head_dim, group, dtype.itemsize)
    constants |= {"PRECISION": "tf32x3"} if dtype == torch.float32 else {}
    return (
        triton_codes.codes_kernel,
        {**pointers, "scale": "fp32"},
        constants,
        triton_codes.blocks(head_dim, triton_codes.columns(group), bits, words["BASE"], dtype)[0],
    )


def main(arguments: list[str]) -> None:
    """`DTYPE:HEAD_DIM:GROUP:CAPABILITY` each as one argument, such as `bfloat16:128:4:90`."""
    for argument in arguments:
        dtype, head_dim, group, target = argument.split(":")
        shape = (getattr(torch, dtype), int(head_dim), int(group))
        kernels = cases(*shape, int(target)) | {f"codes{bits}": codes_case(*shape, bits) for bits in (2, 4, 8)}
        for name, case in kernels.items():
            resources = compiled(*case, int(target))
            print(json.dumps({"case": argument, "kernel": name, **resources}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

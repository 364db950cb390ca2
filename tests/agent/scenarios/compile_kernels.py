"""Compile every kernel for NVIDIA cards, without a card: Triton's compiler and assembler come with its wheel."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foreshock._kernels import chunks, step

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]
F64, F32, I32, I64 = "*fp64", "*fp32", "*i32", "*i64"
MEASURE = {
    "addresses": I64, "kinds": I32, "sizes": I64, "chunk_parameter": I32, "chunk_begin": I64,
    "measurement": "i32", "squares": F64, "statuses": I64, "checksum": I64,
}  # fmt: skip
STEP = {
    "observed": I64, "loss": F64, "row": F64, "checksum": I64, "defaults": F64, "state": F64, "decision": F32,
    "squares": F64, "statuses": I64, "measurement": "i32", "positions": I32, "numbers": I64,
    "local_squares": F64, "local_statuses": I64, "local_measurement": "i32", "local_positions": I32,
    "local_numbers": I64, "layer_begin": I32, "chunks": "i32", "parameters": "i32", "layers": "i32",
    "carried": F64, "loss_scale": F64, "optimizer_scale": F64, "found_inf": F64, "sums": F64, "sums_scale": F64,
    "sums_sequence": "i32", "facts": "i32", "turn": "i32", "sequence": "i32", "number": "i32", "flags": "i32",
}  # fmt: skip
CONTRIBUTE = {
    "squares": F64, "chunks": "i32", "statuses": I64, "measurement": "i32", "positions": I32, "parameters": "i32",
    "loss": F64, "has_loss": "i32", "contribution": F64,
}  # fmt: skip
OBSERVE = {"words": I64, "loss": F64, "number": "i32", "flags": "i32", "sequence": "i32"}


def compile_for(target: GPUTarget, kernel: Any, types: dict[str, str], warps: int, **constants: Any) -> None:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, positions), target=target, options={"num_warps": warps})
    assert "ptx" in compiled.asm and "cubin" in compiled.asm
    print(kernel.__name__, target.arch, {k: v for k, v in constants.items() if k.isupper()}, compiled.metadata.shared)


def main() -> None:
    """Compile each kernel in the variants that differ most."""
    older, newer = TARGETS
    sizes = {"BLOCK": chunks.BLOCK, "CHUNK": chunks.CHUNK}
    # Every kind of gradient is in it.
    compile_for(older, chunks.measure_chunks, MEASURE, 8, KIND=chunks.MIXED.value, **sizes)
    compile_for(newer, chunks.measure_chunks, MEASURE, 8, KIND=chunks.FLOAT32.value, **sizes)
    blocks = {"SUM_BLOCK": step.SUM_BLOCK, "LAYER_BLOCK": step.LAYER_BLOCK}
    most = {"CLIP": step.ADAPTIVE_CLIP.value, "SKIP": True, "DRY_RUN": False, **blocks}
    compile_for(older, step.finish_step, STEP, 4, **most)
    least = {"CLIP": step.NO_CLIP.value, "SKIP": False, "DRY_RUN": True, **blocks}
    compile_for(newer, step.finish_step, STEP, 4, **least)
    compile_for(newer, step.contribute, CONTRIBUTE, 4, BLOCK=step.SUM_BLOCK)
    compile_for(newer, step.write_observed, OBSERVE, 4)


if __name__ == "__main__":
    main()

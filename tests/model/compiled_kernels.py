"""Program for tests: compiles every kernel for a Hopper GPU, without needing one, and prints the spilled bytes as JSON."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.kernels import convolve_norm, geglu, planes_to_rows

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = {"eps": "fp32", "low": "fp32", "high": "fp32"}


def stack_bytes(function, pointers, constants, warps):
    """Stack bytes per thread: spilled registers."""
    names = [parameter.name for parameter in function.params]
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, NUMBERS.get(name, "i32")) for name in names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in pointers}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["cubin"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(found.stdout.split("STACK:")[1].split()[0])


def main():
    stream = {"padded_ptr": "*fp32", "taps_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*fp32", "normed_ptr": "*bf16"}
    spilled = {}
    for channels in map(int, sys.argv[1:]):
        block = triton.next_power_of_2(channels)
        constants = {"CHANNELS": channels, "COLUMNS": convolve_norm.COLUMNS, "BLOCK": block}
        warps = convolve_norm.warps(block)
        spilled[f"layer {channels}"] = stack_bytes(convolve_norm._convolve_norm, stream, constants, warps)
    packed = {"packed_ptr": "*bf16", "gated_ptr": "*bf16"}
    spilled["gate"] = stack_bytes(geglu._geglu, packed, {"BLOCK": geglu.BLOCK}, 4)
    rows = {"planes_ptr": "*u8", "map_ptr": "*fp32", "rows_ptr": "*fp16"}
    sizes = {"SIDE": 8, "PIXELS": 256, "TOKENS": planes_to_rows.TOKENS, "BLOCK": 256}
    spilled["pixels"] = stack_bytes(planes_to_rows._planes_to_rows, rows, sizes, 4)
    print(json.dumps(spilled))


if __name__ == "__main__":
    main()

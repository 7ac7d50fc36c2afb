"""Compile kernels for real GPUs without one: what the launch code passes, through Triton and ptxas to machine code."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """One kernel on one target. `local_bytes`: stack and spilled registers of a thread; `local_in_loops`: how many
    instructions in loops read or write them."""

    name: str
    ttir: str
    registers: int
    local_bytes: int
    shared_bytes: int
    local_in_loops: int


def launches(work):
    """Run `work` on meta tensors and return the launches that it makes: kernel, arguments, options."""
    made = []

    def record(self, *args, grid, warmup, **options):
        made.append((self, args, options))

    with mock.patch.object(JITFunction, "run", record):
        work()
    return made


def compiled(kernel, args, options, capability):
    """What Triton would compile at this launch: ones and Nones as constants, multiples of 16 noted."""
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": options["num_warps"]}
    )
    usage, code = (_inspected(result.asm["cubin"], option) for option in ("-res-usage", "-sass"))
    found = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        kernel.__name__,
        result.asm["ttir"],
        found["REG"],
        found["STACK"] + found["LOCAL"],
        result.metadata.shared,
        _local_in_loops(code),
    )


def _inspected(cubin, option):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def _local_in_loops(code):
    """Accesses to local memory between a backward branch and its target."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(\S.*?);", code)]
    local = [at for at, text in instructions if re.search(r"\b(STL|LDL)\b", text)]
    branches = [(int(target[1], 16), at) for at, text in instructions if (target := re.search(r"BRA.* 0x(\w+)", text))]
    assert branches  # the trap behind the last instruction jumps to itself
    return sum(any(target <= at <= branch for target, branch in branches) for at in local)

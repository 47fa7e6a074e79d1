"""Compiles every launch of a module of tests/kernel_cases for one target, without a GPU. Run in a process of its own:
a kernel that was defined under the interpreter cannot be compiled."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx950": ("hip", "gfx950", 64), "gfx942": ("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Compiled:
    case: str
    hot: bool
    kernel: str
    shared: int  # bytes
    limit: int  # bytes of shared memory that a program may take on this target
    binary: str  # kind of machine code: cubin or hsaco
    registers: int = 0  # a thread; sm_90 alone
    spilled: int = 0  # bytes of stack a thread; sm_90 alone
    races: bool = False  # as `captures_race` finds; sm_90 alone
    waits: bool = True  # if it may begin before the launch ahead of it has ended


def pretend(target: str) -> None:
    """Launches compile for this target, which the machine need not have."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Stands where a GPU's driver would: launches ask it what to compile for."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_current_target = staticmethod(lambda: GPUTarget(*TARGETS[target]))

    triton.runtime.driver.set_active(Driver())


def compile_cases(module: str, target: str) -> list[Compiled]:
    import triton

    assert not triton.knobs.runtime.interpret, "start this process without TRITON_INTERPRET"

    pretend(target)
    compile_only = triton.JITFunction.run
    launched: list = []

    def run(self, *args, grid, warmup, **kwargs):
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        waits = not kwargs.get("launch_pdl") or "griddepcontrol.wait" in compiled.asm["ptx"]
        launched.append((self.fn.__name__, compiled, waits))

    triton.JITFunction.run = run
    from kernels.target import current

    found = []
    for case in importlib.import_module(f"tests.kernel_cases.{module}").CASES:
        launched.clear()
        case.launch()
        assert launched, f"{module}: case {case.name} launched nothing"
        for name, kernel, waits in launched:
            kind = "cubin" if target.startswith("sm") else "hsaco"
            usage = _usage(kernel.asm["cubin"], name) if kind == "cubin" else (0, 0)
            assert kernel.asm[kind]
            shared = kernel.metadata.shared
            races = kind == "cubin" and captures_race(kernel.asm["ptx"])
            found.append(Compiled(case.name, case.hot, name, shared, current().shared, kind, *usage, races, waits))
    return found


def captures_race(ptx: str) -> bool:
    """Whether, before partitions start (barrier 1), something is stored in shared memory where since the last barrier
    something was read: Triton 3.6 puts what partitions are given where the result of a scalar atomic is."""
    if "barrier.sync \t1;" not in ptx:
        return False
    read: set[str] = set()
    for line in ptx.split("barrier.sync \t1;")[0].splitlines():
        if "bar.sync" in line:
            read.clear()
        elif place := re.search(r"(ld|st)\.shared\S* .*\[global_smem\+(\d+)\]", line):
            if place[1] == "ld":
                read.add(place[2])
            elif place[2] in read:
                return True
    return False


def _usage(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers, bytes of stack) a thread, as the disassembler that comes with Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = text.split(f"Function {name}:")[1]
    fields = dict(field.split(":", 1) for field in line.split() if ":" in field)
    return int(fields["REG"]), int(fields["STACK"])

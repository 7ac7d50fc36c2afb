"""Run the Triton kernels in Triton's interpreter, on CPU tensors, whether or not this process also compiles them.

`TRITON_INTERPRET=1` would have to be set before anything imports Triton and would rule out compiling; so the decorated
kernels are replaced one by one for the time of a test.
"""

import inspect
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from peft_ext.sparse.ops import gpu
from peft_ext.sparse.ops.gpu import direct, staged


_convert_float = interpreter._convert_float


def _rounded(data, source, target, rounding_mode):
    """fp32 to bf16 by torch. The interpreter of Triton 3.7 loses the carry when a mantissa rounds up to a power of two
    (1.9999 becomes 1.0 instead of 2.0), and rounds halves up instead of to even."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _interpreted(function):
    if function.__name__.startswith("_"):  # called by kernels, inside of their launch
        called = interpreter.FunctionRewriter(function.fn).rewrite_ast()
        called.fn = called  # scans look for it
        return called
    return interpreter.InterpretedFunction(function.fn)


@contextmanager
def interpreted():
    """The products of the bypass run through the kernels, for every dtype that these take. Yields the names of those
    that were launched, as they are."""
    launched: list[str] = []
    with ExitStack() as stack:
        for module in (direct, staged):
            for name, function in inspect.getmembers(module, lambda member: isinstance(member, JITFunction)):
                stack.enter_context(mock.patch.object(module, name, _interpreted(function)))
        stack.enter_context(mock.patch.object(interpreter, "_convert_float", _rounded))
        # It would copy each CPU storage onto itself.
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None))
        stack.enter_context(
            mock.patch.object(gpu, "usable", lambda *tensors: all(tensor.dtype in gpu.DTYPES for tensor in tensors))
        )
        run = interpreter.InterpretedFunction.run

        def counted(self, *args, **kwargs):
            launched.append(self.__name__)
            return run(self, *args, **kwargs)

        stack.enter_context(mock.patch.object(interpreter.InterpretedFunction, "run", counted))
        yield launched

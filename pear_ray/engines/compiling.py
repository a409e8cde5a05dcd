"""torch.compile for the policy in training: each decoder layer, and what follows the last."""

import os
import shutil
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from pear_ray.engines.policy import Policy
from pear_ray.errors import EngineError

C_COMPILERS = ("cc", "gcc", "clang")  # where Triton looks for what builds its launchers


def compile_layers(policy: Policy, *, device: str, backend: str = "inductor") -> Policy:
    """`policy` with the forward pass of each decoder layer compiled, and its chosen log-probs.

    In place and before it is spread over ranks. A layer's `forward` is compiled, not the layer: its
    parameters keep their names, and the hooks that FSDP2 and checkpointing put around a layer stay
    outside, where they gather, free and compute again as without. The layers share their code and
    so its compiled form; lengths are dynamic, so that one form serves all microbatches.

    Args:
        policy: Not yet spread over ranks; changed in place.
        device: `cpu` or `cuda`.
        backend: What generates code, as `torch.compile` names it. `aot_eager` generates none and
            runs the same graphs.

    Raises:
        EngineError: The machine has no compiler for the code that is generated.
    """
    if backend == "inductor":
        check_compiler(device)
    # DDP would have a layer cut where its buckets of gradients are full, to send them sooner: a
    # layer is about as large as a bucket.
    torch._dynamo.config.optimize_ddp = False  # noqa: SLF001 - torch's documented way
    for layer in policy.causal_lm.get_decoder().layers:
        module: Any = layer
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
    policy.compile_backend = backend
    return policy


def check_compiler(device: str) -> None:
    """Refuse a machine on which the first step would end in a compiler's stack trace.

    Raises:
        EngineError: It lacks the C++ compiler that generated CPU kernels need, or the C compiler
            that Triton builds the launchers of GPU kernels with.
    """
    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise EngineError(
                "compile=true generates C++ on CPU, and there is no C++ compiler on this machine; "
                "install g++ (or name one in CXX), or set compile=false"
            ) from error
    elif not any(shutil.which(name) for name in (os.environ.get("CC", ""), *C_COMPILERS)):
        raise EngineError(
            "compile=true has Triton build launchers in C, and there is no C compiler on this "
            "machine; install gcc (or name one in CC), or set compile=false"
        )

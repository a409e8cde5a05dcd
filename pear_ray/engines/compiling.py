"""torch.compile for the policy in training: each decoder layer, and what follows the last."""

import os
import shutil
from typing import Any

import torch

from pear_ray.engines.policy import Policy
from pear_ray.errors import EngineError

# Where Inductor (on CPU) and Triton (the launchers of its GPU kernels) look for a compiler: the
# environment's, else these.
COMPILERS = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}


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
    variable, usual = COMPILERS[device]
    named = os.environ.get(variable)
    wanted = (named,) if named else usual
    if not any(shutil.which(name) for name in wanted):
        raise EngineError(
            f"compile=true needs a compiler on every trainer's machine, and none of {wanted} is on "
            f"this one's PATH; install {usual[0]} (or name one in {variable}), or set compile=false"
        )

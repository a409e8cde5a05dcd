"""The policy in training: a causal LM that gives log-probs of chosen tokens, under FSDP2."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from pear_ray.algorithms.batch_sizes import head_chunk_tokens
from pear_ray.algorithms.candidate_logprobs import candidate_and_rest_logprobs
from pear_ray.algorithms.compiled_logprobs import compiled_chosen_logprobs
from pear_ray.algorithms.entropy import exact_entropies
from pear_ray.algorithms.logprobs import chosen_logprobs, top_k_entropies
from pear_ray.config.sections import compute_dtype
from pear_ray.engines import packed_attention
from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.engines.norms import use_own_norms
from pear_ray.engines.rotary import use_own_rotary
from pear_ray.errors import EngineError, InputError

GUARD_TOKENS = 8
MAX_GUARD_GAP = 1e-3
MAX_LEAK = 1e-6


class Policy(nn.Module):
    """A causal LM whose forward pass gives log-probs, never `[token, vocab]` logits in float32.

    Attributes:
        causal_lm: The model.
        frozen_base: Where adapters are all that trains: the folder of the model they are on.
        autocast_dtype: What forward passes compute in, where that is not the parameters' dtype.
        packs: Whether rows go through it end to end, without padding.
        compile_backend: What the log-probs of chosen tokens are compiled with, if they are.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.frozen_base: Path | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.packs = False
        self.compile_backend: str | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the states that log-probs are made of."""
        return self.causal_lm.config.get_text_config().hidden_size

    def forward(
        self,
        batch: TokenBatch,
        *,
        temperature: float,
        entropy_k: int = 0,
        exact_entropy: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Log-prob (nats) of each loss token, float32 [token], of softmax(logits / temperature).

        For a batch with candidates, or with an `entropy_k`, a dict with those as `logprobs`, and:
        `candidates` [token, candidate], their log-probs; `rest` [token], the log of the probability
        of all other ids together; `entropies` [token], over the `entropy_k` likeliest ids (no
        gradient). With `exact_entropy` a dict whose `entropies` are over all ids, with a gradient.
        """
        device = batch.input_ids.device.type
        wants_grad = torch.is_grad_enabled()
        # Compiled for passes without gradients, layers would be fused and so rounded otherwise than
        # for those with them: in bfloat16 the ratio of a policy to itself would be noise.
        with (
            torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None),
            torch.set_grad_enabled(wants_grad or self.compile_backend is not None),
        ):
            hidden = self._hidden(batch)
        if not wants_grad:
            hidden = hidden.detach()  # lets go of what a backward pass would need
        predicting = hidden[batch.positions]  # [token, hidden]
        head = self.causal_lm.get_output_embeddings().weight.to(hidden.dtype)
        ids = batch.candidate_ids
        chunk_tokens = head_chunk_tokens(device, vocab_size=len(head))
        how: Any = {"temperature": temperature, "chunk_tokens": chunk_tokens}
        if exact_entropy and batch.num_loss_tokens:
            return {
                "logprobs": self._chosen_logprobs(predicting, head, batch.chosen_ids, **how),
                "entropies": exact_entropies(predicting, head, **how),
            }
        if not batch.num_loss_tokens:
            # Keeps the graph connected, so that this rank's backward joins the others' collectives.
            nothing = (hidden.sum() * 0.0 + head.sum() * 0.0).expand(0)
            if ids is None and not entropy_k and not exact_entropy:
                return nothing
            candidates = nothing[:, None].expand(0, 1 if ids is None else ids.shape[1])
            extras = {"candidates": candidates, "rest": nothing, "entropies": nothing.detach()}
            return {"logprobs": nothing} | extras
        if ids is None and not entropy_k:
            return self._chosen_logprobs(predicting, head, batch.chosen_ids, **how)
        outputs = {}
        if entropy_k:
            outputs["entropies"] = top_k_entropies(predicting, head, k=entropy_k, **how)
        if ids is None:
            chosen = self._chosen_logprobs(predicting, head, batch.chosen_ids, **how)
            return outputs | {"logprobs": chosen}
        # The token's own id as one more column: no second pass over the vocabulary.
        columns = torch.cat([ids, batch.chosen_ids[:, None]], dim=1)
        logprobs, rest = candidate_and_rest_logprobs(predicting, head, columns, **how)
        return outputs | {
            "logprobs": logprobs[:, -1],
            "candidates": logprobs[:, :-1],
            "rest": rest,
        }

    def _chosen_logprobs(self, *tensors: torch.Tensor, **how: Any) -> torch.Tensor:
        if self.compile_backend is None:
            return chosen_logprobs(*tensors, **how)
        return compiled_chosen_logprobs(*tensors, **how, backend=self.compile_backend)

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Last hidden states, [position, hidden]."""
        decoder = self.causal_lm.get_decoder()
        if self.packs:
            packed = decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                packing=batch.packing,
            )
            # Not [0], which in the backward pass is a tensor of zeros and a copy.
            return packed.last_hidden_state.squeeze(0)
        rows = torch.tensor_split(batch.input_ids, batch.packing.bounds[1:-1].tolist())
        padded = pad_sequence(list(rows), batch_first=True)
        lengths = batch.packing.bounds.diff()[:, None]
        real = torch.arange(padded.shape[1], device=padded.device) < lengths
        outputs = decoder(input_ids=padded, attention_mask=real, use_cache=False)
        return outputs.last_hidden_state[real]


def load_policy(folder: Path) -> Policy:
    """The model of `folder` in float32, checked to compute what transformers computes.

    Raises:
        InputError: transformers cannot load the folder.
        EngineError: The model does something to its logits (a bias, a scale, a soft cap) that log-
            probs from hidden states would miss.
    """
    policy = Policy(load_causal_lm(folder))
    use_own_norms(policy)
    use_own_rotary(policy)
    _guard_log_probs(policy, folder)
    return policy


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The model of `folder` in float32.

    Raises:
        InputError: transformers cannot load the folder.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers cannot load this model: {error}") from error


def shard(
    policy: Policy,
    *,
    device: str,
    dtype: str,
    shard_over: int | None = None,
    cpu_offload: bool = False,
) -> Policy:
    """`policy` on its device, parameters split over ranks (FSDP2), layer by layer.

    Needs an initialised process group. Parameters and gradients stay float32; forward and backward
    passes compute in `compute_dtype`.

    Args:
        policy: Changed in place.
        device: `cpu` or `cuda`.
        dtype: As `models.dtype`.
        shard_over: Ranks that a parameter is split over; groups of so many are copies. None: all.
        cpu_offload: Keep the split parameters in the host's memory (CUDA only).
    """
    world_size = torch.distributed.get_world_size()
    if shard_over is None or shard_over == world_size:
        mesh = init_device_mesh(device, (world_size,))
    else:
        mesh = init_device_mesh(
            device, (world_size // shard_over, shard_over), mesh_dim_names=("copy", "shard")
        )
    # Not moved here: each layer goes to the device as it is split, so that no device ever has to
    # hold the whole model.
    options: dict[str, Any] = {"mesh": mesh}
    if compute_dtype(dtype, device=device) == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in policy.causal_lm.get_decoder().layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)  # in place
    return policy


def replicate(policy: Policy, *, device: str, dtype: str) -> DistributedDataParallel:
    """`policy` whole on every rank's device, gradients averaged; dtypes as in `shard`."""
    policy.to(torch.device(device))
    if compute_dtype(dtype, device=device) == "bfloat16":
        policy.autocast_dtype = torch.bfloat16
    return DistributedDataParallel(policy)


def checkpoint_activations(policy: Policy) -> None:
    """Keep only each layer's input for backward and compute the rest again there."""
    policy.causal_lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    for layer in policy.causal_lm.get_decoder().layers:
        layer.training = True  # what transformers asks; the modules inside stay without dropout


def _guard_log_probs(policy: Policy, folder: Path) -> None:
    """Compare with the model's own log-probs, and find whether it takes rows end to end."""
    policy.causal_lm.set_attn_implementation("sdpa")
    ids = torch.arange(GUARD_TOKENS) * 7 % policy.causal_lm.config.vocab_size
    rows = [ids.tolist(), ids.flip(0)[: GUARD_TOKENS - 3].tolist()]
    with torch.no_grad():
        theirs = torch.cat([_own_logprobs(policy, row) for row in rows])
        if _packs(policy, rows, theirs):
            return
        found = (_guard_batch_logprobs(policy, rows) - theirs).abs().max().item()
    if not found <= MAX_GUARD_GAP:
        raise EngineError(
            f"{folder}: log-probs from hidden states differ from the model's own by {found:.3g} "
            "nats; the model changes its logits after the output layer, which is not supported"
        )


def _packs(policy: Policy, rows: list[list[int]], theirs: torch.Tensor) -> bool:
    """Switch `policy` to rows end to end if its model computes the same with them.

    Layers that mix tokens otherwise than by attention (state spaces, convolutions) do not, nor does
    attention with more to it than a past.
    """
    policy.packs = True
    policy.causal_lm.set_attn_implementation(packed_attention.NAME)
    try:
        ours = _guard_batch_logprobs(policy, rows)
        # Another first row must not be seen by the second: in a model with small random weights
        # that would not show beside the rounding of different kernels.
        others = _guard_batch_logprobs(policy, [[*rows[0][::-1]], *rows[1:]])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # its code takes no `packing`, or its attention wants what ours has not
    else:
        leak = (ours - others)[len(rows[0]) - 1 :].abs().max().item()
        if (ours - theirs).abs().max().item() <= MAX_GUARD_GAP and leak <= MAX_LEAK:
            return True
    policy.packs = False
    policy.causal_lm.set_attn_implementation("sdpa")
    return False


def _guard_batch_logprobs(policy: Policy, rows: list[list[int]]) -> torch.Tensor:
    trained = [Row(row, [True] * len(row), {}) for row in rows]
    batch = collate(trained, pad_id=0, names=(), device=torch.device("cpu"))
    return policy(batch, temperature=1.0)


def _own_logprobs(policy: Policy, row: list[int]) -> torch.Tensor:
    """Of a row's tokens but the first, from the logits that transformers gives."""
    ids = torch.tensor(row)
    logits = policy.causal_lm(ids[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)

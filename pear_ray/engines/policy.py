"""The policy in training: a causal LM that gives log-probs of chosen tokens, under FSDP2."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from pear_ray.algorithms.logprobs import chosen_logprobs
from pear_ray.engines.batches import TokenBatch
from pear_ray.errors import EngineError, InputError

GUARD_TOKENS = 8
MAX_GUARD_GAP = 1e-3


class Policy(nn.Module):
    """A causal LM whose forward pass gives log-probs, never `[token, vocab]` logits in float32."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch: TokenBatch, *, temperature: float) -> torch.Tensor:
        """Log-prob (nats) of each loss token, float32 [token], of softmax(logits / temperature)."""
        hidden = self.causal_lm.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state
        predicting = hidden.flatten(0, 1)[batch.positions]  # [token, hidden]
        head = self.causal_lm.get_output_embeddings().weight
        if not batch.num_loss_tokens:
            # Keeps the graph connected, so that this rank's backward joins the others' collectives.
            return (hidden.sum() * 0.0 + head.sum() * 0.0).expand(0)
        return chosen_logprobs(predicting, head, batch.chosen_ids, temperature=temperature)


def load_policy(folder: Path) -> Policy:
    """The model of `folder` in float32, checked to compute what transformers computes.

    Raises:
        InputError: transformers cannot load the folder.
        EngineError: The model does something to its logits (a bias, a scale, a soft cap) that log-
            probs from hidden states would miss.
    """
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers cannot load this model: {error}") from error
    policy = Policy(causal_lm)
    _guard_log_probs(policy, folder)
    return policy


def shard(policy: Policy, *, device: str, dtype: str) -> Policy:
    """`policy` on its device, parameters split over all ranks (FSDP2), layer by layer.

    Needs an initialised process group. Parameters and gradients stay float32; with `bfloat16` the
    forward and backward passes compute in it on CUDA. On CPU they stay in float32: without matrix
    instructions for bfloat16, an SFT step of SmolLM2-135M took 100 s in it.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy.to(torch.device(device))
    mixed = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if dtype == "bfloat16" and device == "cuda"
        else MixedPrecisionPolicy()
    )
    for layer in policy.causal_lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed)  # in place
    return policy


def _guard_log_probs(policy: Policy, folder: Path) -> None:
    vocab = policy.causal_lm.config.vocab_size
    ids = torch.arange(GUARD_TOKENS)[None] * 7 % vocab
    batch = TokenBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        positions=torch.arange(GUARD_TOKENS - 1),
        chosen_ids=ids[0, 1:],
        sequence_ids=torch.zeros(GUARD_TOKENS - 1, dtype=torch.long),
        aligned={},
    )
    with torch.no_grad():
        ours = policy(batch, temperature=1.0)
        logits = policy.causal_lm(ids, use_cache=False).logits[0, :-1]
    theirs = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    gap = (ours - theirs).abs().max().item()
    if not gap <= MAX_GUARD_GAP:
        raise EngineError(
            f"{folder}: log-probs from hidden states differ from the model's own by {gap:.3g} "
            "nats; the model changes its logits after the output layer, which is not supported"
        )

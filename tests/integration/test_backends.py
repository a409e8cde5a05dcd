"""Every backend takes the steps of plain PyTorch in one process, and resumes bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backend_ranks
import peft
import pytest
import torch
from free_ports import free_ports
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pear_ray.embedded.paths import embedded_path

Steps = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]
WHOLE = [name for name in backend_ranks.BACKENDS if "lora" not in name]
ADAPTED = [name for name in backend_ranks.BACKENDS if "lora" in name]


def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded_path("student"), dtype=torch.float32)


def adapted() -> Any:
    lora = backend_ranks.LORA
    torch.manual_seed(backend_ranks.SEED)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")
    return peft.get_peft_model(student(), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote, all backends one after the other."""
    folder = tmp_path_factory.mktemp("backends")
    spawn(backend_ranks.run_rank, folder, num_ranks=len(backend_ranks.CUTS))
    return folder


def spawn(act: Callable[..., None], folder: Path, *, num_ranks: int) -> None:
    [port] = free_ports(1)
    torch.multiprocessing.spawn(act, args=(folder, port), nprocs=num_ranks)


@pytest.fixture(scope="module")
def reference() -> Steps:
    """Of the whole model."""
    return steps_of_one_process(student())


@pytest.fixture(scope="module")
def adapted_reference() -> Steps:
    """Of an adapter, as peft wraps a model; names as in an adapter's file."""
    norms, *weights = steps_of_one_process(adapted())
    last, average = (
        {key.replace(".default.", "."): each for key, each in state.items() if "lora_" in key}
        for state in weights
    )
    return norms, last, average


def steps_of_one_process(model: Any) -> Steps:
    """Gradient norms, last and averaged weights with transformers' own loss."""
    config = backend_ranks.OPTIMIZER
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    norms = []
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        for row in backend_ranks.ROWS:
            ids = torch.tensor([row])
            logits = model(ids, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            (loss / backend_ranks.NUM_TOKENS).backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        )
        optimizer.step()
        optimizer.zero_grad()
        decay = backend_ranks.EMA_DECAY
        for name, tensor in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    return norms, model.state_dict(), average


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WHOLE)
def test_the_steps_are_those_of_one_process(
    folder: Path, found: dict[str, dict[str, Any]], reference: Steps, name: str
) -> None:
    norms, weights, _ = reference
    assert found[name]["norms"] == pytest.approx([norms[0], *norms], rel=1e-5)  # first the probe's
    written = load_file(folder / name / "model" / "model.safetensors")
    assert written.keys() == weights.keys() - {"lm_head.weight"}  # tied: written once
    for key, tensor in written.items():
        # AdamW's first steps are near the sign of the gradient: rounding shows where that is 0.
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_takes_the_steps_of_peft_in_one_process(
    folder: Path, found: dict[str, dict[str, Any]], adapted_reference: Steps, name: str
) -> None:
    norms, weights, _ = adapted_reference
    assert found[name]["norms"] == pytest.approx([norms[0], *norms], rel=1e-5)
    written = load_file(folder / name / "model" / "adapter" / "adapter_model.safetensors")
    assert written.keys() == weights.keys()
    for key, tensor in written.items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_the_merged_model_is_the_model_that_was_trained(
    folder: Path, found: dict[str, dict[str, Any]], name: str
) -> None:
    """And the one that peft makes of the student and the adapter's folder."""
    model = folder / name / "model"
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    by_peft = peft.PeftModel.from_pretrained(student(), model / "adapter")
    ours, theirs, untrained = (logprobs_of(each) for each in (merged, by_peft, student()))
    assert ours == pytest.approx(found[name]["trained"], abs=1e-5)
    assert theirs == pytest.approx(found[name]["trained"], abs=1e-5)
    assert untrained != pytest.approx(ours, abs=0.1)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(model / "model.safetensors")


@torch.no_grad()
def logprobs_of(model: Any) -> list[float]:
    """Of the tokens that `backend_ranks` looked at after its last step."""
    found = []
    for row in backend_ranks.ROWS[:2]:
        ids = torch.tensor([row])
        logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        found += logprobs.gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    return found


@pytest.mark.parametrize("name", ADAPTED)
def test_a_checkpoint_holds_no_frozen_parameter(folder: Path, name: str) -> None:
    """It takes less than the student's weights alone would."""
    files = (folder / name / "checkpoint").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    assert size < (embedded_path("student") / "model.safetensors").stat().st_size


def test_the_average_of_an_adapter(folder: Path, adapted_reference: Steps) -> None:
    path = folder / "fsdp-lora-average"
    found = load_file(path / "average" / "adapter" / "adapter_model.safetensors")
    resumed = load_file(path / "average-resumed" / "adapter" / "adapter_model.safetensors")
    last = load_file(path / "model" / "adapter" / "adapter_model.safetensors")
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, adapted_reference[2][key], rtol=0, atol=2e-5)
        assert torch.equal(tensor, resumed[key])
    assert not all(torch.equal(tensor, last[key]) for key, tensor in found.items())


@pytest.mark.parametrize("name", [name for name in WHOLE if name.endswith("average")])
def test_the_average_of_the_weights(folder: Path, reference: Steps, name: str) -> None:
    found = load_file(folder / name / "average" / "model.safetensors")
    resumed = load_file(folder / name / "average-resumed" / "model.safetensors")
    last = load_file(folder / name / "model" / "model.safetensors")
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, reference[2][key], rtol=0, atol=2e-5)
        assert torch.equal(tensor, resumed[key])
    assert not torch.equal(found["model.norm.weight"], last["model.norm.weight"])


@pytest.mark.parametrize(("names", "make"), [(WHOLE, student), (ADAPTED, adapted)])
def test_candidates_and_entropies_train_alike(
    found: dict[str, dict[str, Any]], names: list[str], make: Callable[[], Any]
) -> None:
    """What the policy gives beside log-probs goes through every backend's hooks."""
    model = make()
    ids = list(backend_ranks.CANDIDATES)
    weights = torch.tensor([*backend_ranks.CANDIDATES.values()])
    for row in backend_ranks.ROWS:
        tokens = torch.tensor([row])
        logprobs = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, tokens[0, 1:, None])
        top = logprobs.detach().topk(5).values.log_softmax(-1)
        entropies = -(top.exp() * top).sum(1)
        kept = logprobs.exp()[:, ids].sum(1)
        # A token's own id is told apart as well, where it is none of the candidates.
        apart = ~torch.isin(tokens[0, 1:], torch.tensor(ids))
        rest = (1 - kept - torch.where(apart, own[:, 0].exp(), 0.0)).log()
        losses = -(logprobs[:, ids] * weights).sum(1) - backend_ranks.REST * rest
        (((losses * entropies).sum() - own.sum()) / backend_ranks.NUM_TOKENS).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert {name: found[name]["distilled"] for name in names} == pytest.approx(
        dict.fromkeys(names, norm), rel=1e-4
    )


@pytest.mark.parametrize("name", backend_ranks.BACKENDS)
def test_a_checkpoint_goes_on_bit_for_bit(
    folder: Path, found: dict[str, dict[str, Any]], name: str
) -> None:
    assert found[name]["count"] == 2
    assert found[name]["again"] == found[name]["norms"][-1]
    assert found[name]["half_way"] == pytest.approx(3 * found[name]["norms"][-1], rel=1e-5)
    straight = load_file(folder / name / "model" / "model.safetensors")
    resumed = load_file(folder / name / "resumed" / "model.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize("name", backend_ranks.BACKENDS)
def test_a_gradient_that_is_not_finite_leaves_the_weights(
    folder: Path, found: dict[str, dict[str, Any]], name: str
) -> None:
    assert found[name]["error"].startswith("TrainingError: step 1: the gradient norm is")
    before = load_file(embedded_path("student") / "model.safetensors")
    after = load_file(folder / name / "poisoned" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_another_number_of_ranks_goes_on_or_is_refused_in_words(
    folder: Path,
    reference: tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """What two ranks saved, one process takes up: native checkpoints do, ZeRO's say why not."""
    spawn(backend_ranks.go_on_alone, folder, num_ranks=1)
    found = json.loads((folder / "alone.json").read_text(encoding="utf-8"))
    for name in backend_ranks.ALONE:
        if name.startswith("zero"):
            assert "of 2 DeepSpeed trainers, it cannot go on with 1" in found[name]
            assert "set cluster.num_trainers=2" in found[name]
            continue
        assert found[name] == pytest.approx(reference[0][1], rel=1e-5)
        for key, tensor in load_file(folder / name / "alone" / "model.safetensors").items():
            torch.testing.assert_close(tensor, reference[1][key], rtol=0, atol=2e-5)
    averaged = load_file(folder / "fsdp-average" / "alone-average" / "model.safetensors")
    for key, tensor in averaged.items():
        torch.testing.assert_close(tensor, reference[2][key], rtol=0, atol=2e-5)

"""What `pear serve` refuses before anything starts, and what it makes of what it takes."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pear_ray.artifacts.manifest import begin, complete
from pear_ray.artifacts.run_dir import claim
from pear_ray.embedded.paths import embedded_path
from pear_ray.errors import CapacityError, ConfigError, InputError, PearRayError
from pear_ray.serving.checkpoints import checkpoint_folder, default_name, served_models
from pear_ray.serving.order import ServeOrder, check_order, check_port
from pear_ray.serving.settings import KEY_VARIABLE

HIDDEN = 96  # of the embedded student


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose sft and rl stages have left the student, and whose score stage no model."""
    folder = tmp_path / "game"
    claim(folder, name="game")
    for stage in ("sft", "rl", "score"):
        begin(folder / stage, "0" * 20)
        if stage != "score":
            shutil.copytree(embedded_path("student"), folder / stage / "model")
        complete(folder / stage, counts={})
    return folder


def write_lora(folder: Path, *, base: Path, wide: int = HIDDEN, **config: object) -> Path:
    """An adapter of rank 2 on one weight of the student, as peft lays it out."""
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, wide), f"{name}B.weight": torch.ones(HIDDEN, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    tree = {"r": 2, "base_model_name_or_path": str(base), "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(tree))
    return folder


def test_a_run_a_stage_and_a_model_are_the_same_checkpoint(run_dir: Path) -> None:
    wanted = (run_dir / "rl" / "model").resolve()
    for location in (run_dir, run_dir / "rl", run_dir / "rl" / "model"):
        assert checkpoint_folder(str(location)) == wanted
        assert default_name(str(location)) == "game-rl"
    assert default_name(str(run_dir / "sft")) == "game-sft"
    assert default_name("embedded:automaton/student") == "student"


def test_what_is_no_finished_model_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'score' leaves no model; serve rl or sft"):
        checkpoint_folder(str(run_dir / "score"))
    (run_dir / "rl" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no finished rl stage; serve .*game/sft"):
        checkpoint_folder(str(run_dir))
    with pytest.raises(InputError, match=r"rl: the stage is not finished"):
        checkpoint_folder(str(run_dir / "rl"))
    adapter = write_lora(tmp_path / "adapter", base=embedded_path("student"))
    with pytest.raises(InputError, match=r"an adapter, no model; .*--lora"):
        checkpoint_folder(str(adapter))


def test_weights_that_are_cut_off_are_refused(run_dir: Path) -> None:
    weights = run_dir / "rl" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        checkpoint_folder(str(run_dir))


def test_names_are_given_once_and_are_names(run_dir: Path) -> None:
    named = [f"new={run_dir / 'rl'}", f"old={run_dir / 'sft'}"]
    assert [model.name for model in served_models([], named, [])] == ["new", "old"]
    with pytest.raises(ConfigError, match="two models are called 'game-rl'"):
        served_models([str(run_dir), str(run_dir / "rl")], [], [])
    with pytest.raises(ConfigError, match=r"'../x' cannot be a model's name"):
        served_models([], [f"../x={run_dir}"], [])
    with pytest.raises(ConfigError, match="write it as --name NAME=FOLDER"):
        served_models([], [str(run_dir)], [])
    with pytest.raises(ConfigError, match="nothing to serve"):
        served_models([], [], [])


def test_an_adapter_goes_on_the_model_it_was_trained_on(run_dir: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", base=run_dir / "sft" / "model")
    rl, sft = served_models([str(run_dir / "rl"), str(run_dir / "sft")], [], [f"tuned={adapter}"])
    assert (rl.adapters, rl.max_lora_rank) == ([], 0)
    assert ([each.name for each in sft.adapters], sft.max_lora_rank) == (["tuned"], 2)
    with pytest.raises(InputError, match=r"trained on .*sft/model, and served are game-rl .*@game"):
        served_models([str(run_dir / "rl")], [], [f"tuned={adapter}"])
    [asked] = served_models([str(run_dir / "rl")], [], [f"tuned={adapter}@game-rl"])
    assert [each.name for each in asked.adapters] == ["tuned"]
    with pytest.raises(ConfigError, match="no such model is served, only game-rl"):
        served_models([str(run_dir / "rl")], [], [f"tuned={adapter}@other"])


def test_adapters_that_cannot_be_served(run_dir: Path, tmp_path: Path) -> None:
    base = run_dir / "rl" / "model"
    narrow = write_lora(tmp_path / "narrow", base=base, wide=HIDDEN - 1)
    with pytest.raises(InputError, match=rf"lora_A.weight \[2, 95\] fits no weight .*{HIDDEN}\]"):
        served_models([str(run_dir)], [], [f"a={narrow}"])
    dora = write_lora(tmp_path / "dora", base=base, use_dora=True)
    with pytest.raises(InputError, match="use_dora, which vLLM does not serve"):
        served_models([str(run_dir)], [], [f"a={dora}"])
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        served_models([str(run_dir)], [], [f"a={base}"])


def test_more_replicas_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = len(os.sched_getaffinity(0))
    order = ServeOrder(
        checkpoints=["embedded:student"], device="cpu", port=free_port(), max_replicas=cores + 1
    )
    wanted = rf"{cores + 1} replicas of each of 1 models ask for {cores + 1} CPU, and there are"
    with pytest.raises(CapacityError, match=wanted):
        check_order(order)
    with pytest.raises(ConfigError, match="--min-replicas 3 is more than --max-replicas 2"):
        check_order(ServeOrder(checkpoints=["embedded:student"], min_replicas=3, max_replicas=2))


def test_a_taken_port_is_named_with_its_owner() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port} .* taken by .*process {os.getpid()}"):
            check_port("127.0.0.1", port)
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.77 .*cannot listen there"):
        check_port("192.0.2.77", port)


def test_the_key_decides_whether_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_key(host: str) -> bool:
        order = ServeOrder(checkpoints=["embedded:student"], host=host, port=free_port())
        return check_order(order).needs_key

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert not needs_key("127.0.0.1")
    with pytest.raises(PearRayError, match=KEY_VARIABLE):
        needs_key("0.0.0.0")
    monkeypatch.setenv(KEY_VARIABLE, "0123456789abcdef")
    assert needs_key("127.0.0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=disabled: whoever reaches Ray's own"):
        needs_key("0.0.0.0")
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert needs_key("0.0.0.0")


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

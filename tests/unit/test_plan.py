"""`pear plan`: words, JSON and exit codes; nothing is started and no weights are needed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_ray import cli

RUN = """\
name: planned
models: {policy: POLICY, behavior: embedded:teacher, dtype: float32, max_model_len: 1024}
corpus: {kind: dataset, path: nowhere.jsonl}
sft: {optimizer: {learning_rate: 1e-3}}
rl:
  problems: {games: [{name: chain_sum}], size: 4}
  optimizer: {learning_rate: 1e-4}
  num_steps: 1
evaluate: {problems: {games: [{name: chain_sum}], size: 4, seed: 1}}
"""
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose policy is no more than a config.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3").mkdir()
    (tmp_path / "qwen3" / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(RUN.replace("POLICY", "./qwen3"), encoding="utf-8")
    return tmp_path


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        code = cli.main(["plan", "run.yaml", *arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        assert not Path("outputs").exists()
        return code, captured.out

    return run


def test_a_run_that_fits(plan: Callable[..., tuple[int, str]]) -> None:
    code, out = plan("--device-memory", "200GiB")
    assert code == 0
    assert "policy    ./qwen3: 596,049,920 parameters" in out
    assert "behavior  386,400 parameters (source *)" in out
    for phase in ("score", "sft", "rl", "evaluate"):
        assert f"\n{phase}: fits: " in out
    assert "4 bytes x 596,049,920 parameters / 2 trainers" in out
    assert "mend" not in out


def test_a_phase_that_does_not_fit_names_item_setting_and_value(
    plan: Callable[..., tuple[int, str]],
) -> None:
    on_gpu = ("cluster.device=cuda", "--device-memory", "24GiB")
    code, out = plan(*on_gpu)
    assert code == 2
    sft = out.split("\nsft: ")[1].split("\nrl: ")[0]
    assert sft.startswith("does not fit: ")
    assert "too much; the largest item is activations of the layers, " in sft
    assert " GiB, set by sft.microbatch_tokens\n" in sft
    [mend] = [line for line in sft.splitlines() if "mend: sft.microbatch_tokens=" in line]
    value = mend.split("=")[1].split()[0]
    _, out = plan(f"sft.microbatch_tokens={value}", *on_gpu)
    assert "\nsft: does not fit" not in out


def test_nothing_that_can_be_set(plan: Callable[..., tuple[int, str]]) -> None:
    code, out = plan("--device-memory", "1GiB")
    assert code == 2
    assert "no setting mends it: take devices with more memory" in out


def test_a_gpu_is_not_judged_unseen(plan: Callable[..., tuple[int, str]]) -> None:
    code, out = plan("cluster.device=cuda")
    assert code == 0
    assert "not known; say which GPU with --device, or what it has with --device-memory" in out
    assert out.count(": not judged: ") == 4
    code, out = plan("cluster.device=cuda", "--device-memory", "2GB")
    assert code == 2
    assert "an engine cannot start: cluster.gpu_memory_fraction=0.85 is 1.58 GiB" in out


def test_json_holds_every_number(plan: Callable[..., tuple[int, str]]) -> None:
    code, out = plan("cluster.device=cuda", "--device-memory", "24GiB", "--json")
    assert code == 2
    tree = json.loads(out)
    phases: dict[str, Any] = {each["phase"]: each for each in tree["phases"]}
    assert tree["run"] == "planned"
    assert list(phases) == ["score", "sft", "rl", "evaluate"]
    sft = phases["sft"]
    assert sft["verdict"] == "does not fit"
    assert sft["available_bytes"] == 24 * 2**30
    for moment in sft["moments"]:
        assert moment["num_bytes"] == sum(item["num_bytes"] for item in moment["items"])
    assert sft["num_bytes"] == max(moment["num_bytes"] for moment in sft["moments"])
    assert all(mend["num_bytes"] <= 24 * 2**30 for mend in sft["mends"])
    assert "sft.activation_checkpointing" in sft["mends"][0]["settings"]
    assert phases["score"]["mends"] == []


def test_this_machine_is_looked_at(plan: Callable[..., tuple[int, str]]) -> None:
    _, out = plan("models.policy=embedded:student", "models.max_model_len=256")
    assert " in this machine, 1.37 GiB for driver and Ray, the rest for the workers" in out


@pytest.mark.parametrize("size", ["80", "GiB", "-1GiB", "0GiB", "80 gigs"])
def test_what_is_no_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "run.yaml", f"--device-memory={size}"])
    assert stopped.value.code == 2
    assert f"{size!r} is not a size; write it as 80GiB or 24GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.policy=./absent", "InputError: models.policy: ./absent: no such model folder"),
        ("models.policy=nobody/nothing", "InputError: models.policy: 'nobody/nothing': neither"),
        ("models.behavior={a: ./absent}", "InputError: models.behavior.a: ./absent: no such model"),
        ("sft.microbatch=1", "did you mean 'microbatch_tokens'"),
    ],
)
def test_bad_input_is_one_error(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "run.yaml", override]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_planning_loads_no_heavy_library(here: Path) -> None:
    probe = (
        "import sys; from pear_ray.cli import main; main(['plan', 'run.yaml', '--json']); "
        "heavy = {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=here, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_named_gpu_gives_memory_and_times(plan: Callable[..., tuple[int, str]]) -> None:
    _, out = plan("cluster.device=cuda", "--json", "--device", "a100", "--row-tokens", "500")
    tree = json.loads(out)
    assert {phase["available_bytes"] for phase in tree["phases"]} == {80 * 10**9}
    assert tree["time"]["pace"]["flops_per_s"] == 19.5e12  # the run is in float32
    sft = next(each for each in tree["time"]["phases"] if each["phase"] == "sft")
    # 1,000 rows over two trainers; 28 layers whose queries are 2,048 wide; 14 % of it
    flops = 3 * 1000 * 500 * (2 * 596_049_920 + 4 * 28 * 2048 * 500)
    assert sft["seconds"] == pytest.approx(flops / (2 * 19.5e12 * 0.14))


def test_a_gpu_for_a_run_on_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "run.yaml", "--device", "h100"]) == 2
    assert "--device h100 is a GPU, and cluster.device=cpu" in capsys.readouterr().err

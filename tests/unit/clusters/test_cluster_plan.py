"""`pear plan --cluster`: which stages fit where, worked out by hand; nothing is started."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pear_ray import cli

ROOT = Path(__file__).parents[3]
MODELS = (
    "models.policy=jobs/runs/shapes/Qwen3-4B-Base",
    "models.behavior=jobs/runs/shapes/Qwen3-8B",
)
Plan = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)

    def run(*arguments: str, cluster: str | Path = "cluster/aws.yaml") -> tuple[int, str]:
        overrides = [each for each in arguments if "=" in each]
        options = [each for each in arguments if "=" not in each]
        command = ["plan", "jobs/runs/paper_math.yaml", *MODELS, *overrides]
        code = cli.main([*command, "--cluster", str(cluster), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def stage(out: str, name: str) -> str:
    return out.split(f"\n{name}: ")[1].split("\n\n", maxsplit=1)[0]


def test_the_cheapest_type_that_fits_is_taken(plan: Plan) -> None:
    code, out = plan("--rows", "104569")
    assert code == 0
    assert stage(out, "score").startswith("8 workers, on h100-spot\n")
    assert "a100       no: turned off: its maximum is 0" in stage(out, "score")
    assert "l4-spot    no: an engine cannot start: " in stage(out, "score")
    assert "score.chunk_tokens=" in stage(out, "score")
    for training in ("sft", "rl"):
        assert stage(out, training).startswith("8 workers, on h100\n")
        assert "h100-spot  no: may be taken back" in stage(out, training)
        assert "cluster.training_nodes=any" in stage(out, training)
    assert "add output_dir=/mnt/shared/outputs" in out
    assert "wait_for_devices_s" not in out
    assert "to fill in before it starts (22): docker.image," in out
    assert "list prices, check yours: SkyPilot's catalog" in out


def test_training_may_be_let_on_spot_nodes(plan: Plan) -> None:
    _, out = plan("--rows", "104569", "cluster.training_nodes=any")
    for training in ("sft", "rl"):
        assert stage(out, training).startswith("8 workers, on h100-spot\n")
        assert "costs the steps since the last checkpoint" in stage(out, training)


def test_the_cost_is_nodes_times_price_times_hours(plan: Plan) -> None:
    workers = ("cluster.num_trainers=16", "cluster.num_samplers=16")
    _, out = plan("--rows", "104569", "--json", *workers)
    tree = json.loads(out)
    stages = {each["stage"]: each for each in tree["stages"]}
    [sft] = [each for each in stages["sft"]["fits"] if each["kind"] == "h100"]
    assert sft["num_nodes"] == 2
    assert sft["dollars"] == pytest.approx(2 * 55.04 * sft["seconds"] / 3600)
    # 8 passes of 2 N and attention, over 16 GPUs at 14 % of 989 TFLOP/s.
    tokens, layers, width, length = 104569 * 4096, 36, 4096, 4096
    parameters = 4_022_468_096
    flops = 4 * tokens * (2 * parameters + 4 * layers * width * length)
    assert sft["seconds"] == pytest.approx(flops / (16 * 0.14 * 989e12), rel=0.01)
    chosen = [stages[name]["fits"][0]["dollars"] for name in ("score", "sft", "rl", "evaluate")]
    assert tree["dollars"] == pytest.approx(sum(chosen) + 1.428 * tree["seconds"] / 3600)


def test_too_short_a_wait_for_nodes_is_said(plan: Plan) -> None:
    _, out = plan("cluster.wait_for_devices_s=30")
    assert "note: cluster.wait_for_devices_s=30 is less than a node with GPUs takes to start" in out


def test_what_fits_nowhere_says_what_would(plan: Plan) -> None:
    many = ("cluster.num_trainers=128", "sft.global_batch_size=128", "rl.prompts_per_step=128")
    code, out = plan(*many)
    assert code == 2
    assert (
        "h100       no: 128 workers want 16 nodes (8 on each), and there are at most 8; raise the "
        "maximum to 16, or set cluster.num_trainers=64"
    ) in stage(out, "sft")
    assert "does not fit: sft, rl; see above what would" in out


def test_cpus_count_too(plan: Plan) -> None:
    code, out = plan("cluster.cpus_per_worker=100")
    assert code == 0
    assert "8 nodes" in stage(out, "sft")  # 192 CPUs hold one of 100, whatever the GPUs
    code, out = plan("cluster.cpus_per_worker=200")
    assert code == 2
    assert (
        "h100       no: a node has 8 GPU and 192 CPUs, and one engine or worker wants 1 GPU and "
        "200 CPUs; lower cluster.cpus_per_worker"
    ) in stage(out, "sft")


def test_scoring_may_begin_with_fewer(plan: Plan) -> None:
    many = "cluster.num_samplers=64"
    _, out = plan(many)
    assert "h100-spot  no: 64 workers want 8 nodes (8 on each)" in stage(out, "score")
    _, out = plan(many, "cluster.min_samplers=8")
    assert "with 32 of 64 workers" in stage(out, "score")


def test_an_engine_over_several_devices_stays_on_a_node(plan: Plan) -> None:
    sizes = ("score.tensor_parallel_size=4", "cluster.num_samplers=2", "cluster.cpus_per_worker=30")
    _, out = plan(*sizes, "--json")
    [score] = [each for each in json.loads(out)["stages"] if each["stage"] == "score"]
    nodes = {each["kind"]: each["num_nodes"] for each in score["fits"]}
    assert score["num_workers"] == 8
    assert nodes["h100"] == 2  # its CPUs hold six workers, which are one engine of four


def test_the_hosts_memory_counts(plan: Plan, tmp_path: Path) -> None:
    """A model of 32B: eight ranks load it, 976 GiB of the node's memory."""
    sizes = (
        "models.policy=jobs/runs/shapes/Qwen3-32B",
        "rl.activation_checkpointing=true",
        "rl.colocation.offload=all",
        "rl.tensor_parallel_size=4",
        "evaluate.tensor_parallel_size=2",
        "cluster.num_samplers=4",
    )
    _, out = plan(*sizes)
    assert stage(out, "rl").startswith("8 workers, on h100\n")
    assert stage(out, "evaluate").startswith("8 workers, on h100")
    tree = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8"))
    tree["metadata"] = dict(tree.get("metadata") or {})
    machine = {"cpus": 192, "memory_gib": 512, "gpus": 8, "gpu": "H100"}
    tree["metadata"]["instances"] = {"p5.48xlarge": machine}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    _, out = plan(*sizes, cluster=file)
    assert (
        "h100       no: a node has 512.00 GiB beside its GPUs, and its 8 workers hold 976.39 GiB "
        "there (whole model while it is loaded)"
    ) in stage(out, "rl")


def test_your_prices_and_none(plan: Plan, tmp_path: Path) -> None:
    code, out = plan(cluster="cluster/gcp.yaml")
    assert code == 0
    assert "cost not known: say prices under metadata.prices" in out
    tree = yaml.safe_load((ROOT / "cluster" / "gcp.yaml").read_text(encoding="utf-8"))
    types = ("n2-standard-16", "a3-highgpu-8g", "g2-standard-48")
    tree["metadata"]["prices"] = {name: {"on_demand": 10, "spot": 4} for name in types}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    _, out = plan("--json", cluster=file)
    tree = json.loads(out)
    [rl] = [each for each in tree["stages"] if each["stage"] == "rl"]
    assert rl["fits"][0]["dollars"] == pytest.approx(10 * rl["fits"][0]["seconds"] / 3600)
    assert tree["dollars"] > 0


def test_pods_and_machines_on_premises(plan: Plan) -> None:
    code, out = plan("output_dir=/mnt/shared/outputs", cluster="cluster/kuberay/raycluster.yaml")
    assert code == 0
    assert stage(out, "sft").startswith("8 workers, on h100\n")
    assert "is not on /mnt/shared" not in out
    code, out = plan(cluster="cluster/on-prem.yaml")
    assert code == 0
    assert stage(out, "rl").startswith("8 workers, on worker\n")


def test_a_run_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(ROOT / "jobs" / "runs" / "demo.yaml"), "--cluster", str(ROOT / "cluster/aws.yaml")]
    assert cli.main(["plan", *files]) == 0
    out = capsys.readouterr().out
    assert "note: cluster.device=cpu uses no GPU; add cluster.device=cuda" in out
    assert "h100       1 node, time not known" in stage(out, "sft")
    assert "all stages fit; how long is not known" in out


@pytest.mark.parametrize(
    ("arguments", "cluster", "message"),
    [
        ((), "cluster/nowhere.yaml", "ConfigError: cluster/nowhere.yaml: cannot read the cluster"),
        (("--device", "h100"), "cluster/aws.yaml", "--device and --cluster cluster/aws.yaml: the"),
        (("--device-memory", "80GiB"), "cluster/aws.yaml", "--device-memory and --cluster"),
        ((), "jobs/runs/demo.yaml", "provider.type is None"),
    ],
)
def test_bad_input_is_one_error(
    plan: Plan, arguments: tuple[str, ...], cluster: str, message: str
) -> None:
    code, out = plan(*arguments, cluster=cluster)
    assert code == 2
    assert message in out

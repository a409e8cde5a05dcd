"""What a run file cannot mean is refused, with its dotted key and what to do."""

from pathlib import Path

import pytest

from pear_ray.config.run import load_run
from pear_ray.errors import ConfigError


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.num_epoch=2", "sft.num_epoch: unknown key; did you mean 'num_epochs'?"),
        ("rl.groupsize=2", "rl.groupsize: unknown key; did you mean 'group_size'?"),
        ("clusters={}", "clusters: unknown key; did you mean 'cluster'?"),
        # the right key in the wrong section
        ("sft.group_size=4", "sft.group_size: unknown key; did you mean 'group_size'?"),
        # the right key, one level too high
        ("rl.clip_low=0.1", "rl.clip_low: unknown key; did you mean 'rl.loss.clip_low'?"),
        ("telemetry.zzzz=4", "telemetry.zzzz: unknown key; known here: project, trackers"),
    ],
)
def test_unknown_keys(run_file: Path, override: str, line: str) -> None:
    assert line in refusal(run_file, override)


def test_unknown_key_inside_a_choice_and_inside_a_list(run_file: Path) -> None:
    message = refusal(run_file, "sft.weights={kind: pear, gama: 0.9}")
    assert "gama: unknown key; did you mean 'gamma'?" in message
    message = refusal(run_file, "rl.problems.games.0.nam=x")
    assert "rl.problems.games.0.nam: unknown key; did you mean 'name'?" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=yes", "seed"),
        ("seed=1.5", "seed"),
        ("seed=-1", "seed"),
        ('sft.num_epochs="2"', "sft.num_epochs"),
        ("sft.num_epochs=true", "sft.num_epochs"),
        ("sft.optimizer.learning_rate=fast", "sft.optimizer.learning_rate"),
        ("sft.optimizer.learning_rate=-1e-5", "sft.optimizer.learning_rate"),
        ("models.dtype=float16", "models.dtype"),
        ("models.policy=3", "models.policy"),
        ("rl.group_size=1", "rl.group_size"),
        ("ready.num_steps=0", "ready.num_steps"),
        ("ready.probe={num_steps: 1}", "ready.probe.num_steps"),
        ("ready.probe={seeds: []}", "ready.probe.seeds"),
        ("ready.probe={seeds: [3, 3]}", "ready.probe"),
        ("rl.problems.games=[]", "rl.problems.games"),
        ("sft=3", "sft"),
        ("name=a/b", "name"),
        ("sft.weights={kind: none}", "sft.weights"),
        ("sft.num_epochs=-1", "sft.num_epochs"),
        ("sft.weights.control=shufled", "sft.weights.pear.control"),
        ("sft.weights={kind: by_source, weights: {}}", "sft.weights.by_source.weights"),
        ("sft.weights={kind: by_source, weights: {a: 0}}", "sft.weights.by_source"),
        ("sft.weights={kind: by_source, weights: {a: -1}}", "sft.weights.by_source.weights.a"),
        (
            "corpus={kind: sampled, problems: {games: [{name: x}], size: 1}, seed: -1}",
            "corpus.sampled.seed",
        ),
    ],
)
def test_wrong_types_and_bounds_name_the_key(run_file: Path, override: str, key: str) -> None:
    message = refusal(run_file, override)
    assert "1 problem\n" in message
    assert f"  {key}: " in message


def test_all_problems_are_listed_at_once(run_file: Path) -> None:
    message = refusal(run_file, "seed=yes", "sft.num_epoch=2", "rl.group_size=1")
    assert "3 problems" in message
    assert [key in message for key in ("seed", "sft.num_epoch", "rl.group_size")] == [True] * 3


def test_missing_key(run_file: Path) -> None:
    run_file.write_text(
        run_file.read_text(encoding="utf-8").replace("name: tiny\n", ""), encoding="utf-8"
    )
    assert "name: Field required" in refusal(run_file)


def test_duplicate_key_in_the_file(run_file: Path) -> None:
    with run_file.open("a", encoding="utf-8") as file:
        file.write("name: other\n")
    assert "'name' is set twice" in refusal(run_file)


def test_missing_file_names_it_and_the_shipped_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent.yaml")
    assert str(tmp_path / "absent.yaml") in message
    assert "jobs/runs/" in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    assert "expected a mapping at the top" in refusal(path)


def test_broken_yaml(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("a: [1, 2", encoding="utf-8")
    assert "not valid YAML" in refusal(path)


@pytest.mark.parametrize("field", ["rl.prompts_per_step", "sft.global_batch_size"])
def test_a_batch_that_does_not_split_over_the_ranks(run_file: Path, field: str) -> None:
    message = refusal(run_file, f"{field}=9", "cluster.num_trainers=4")
    assert f"{field}=9 does not split over cluster.num_trainers=4" in message
    load_run(run_file, [f"{field}=12", "cluster.num_trainers=4"])


def test_pass_at_k_needs_k_samples(run_file: Path) -> None:
    message = refusal(run_file, "evaluate.num_samples=4")
    assert "evaluate.k=8 needs at least that many samples" in message
    assert "evaluate.num_samples=4" in message
    load_run(run_file, ["evaluate.num_samples=4", "evaluate.k=[1, 4]"])


def test_configs_are_frozen(run_file: Path) -> None:
    config = load_run(run_file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (
            "{kind: fsdp, shard_over: 3}",
            "sft.backend.shard_over=3 does not divide",
        ),
        ("{kind: fsdp, cpu_offload: true}", "moves parameters off a GPU, and cluster.device=cpu"),
        ("{kind: deepspeed, zero_stage: 2, offload: all}", "zero_stage=2 keeps them whole"),
    ],
)
def test_backends_that_contradict_the_run(run_file: Path, backend: str, words: str) -> None:
    assert words in refusal(run_file, f"sft.backend={backend}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sft.objective=nl"], "sft.objective: Input tag 'nl'"),
        (["sft.objective={kind: psft, clip_hi: 1}"], "did you mean 'clip_high'?"),
        (["sft.objective=forward_kl"], "score.top_k=0 keeps none; set score.top_k"),
        (["sft.negatives={scale: -1}"], "sft.negatives.scale: "),
        (["sft.negatives={scale: 0.1, logprob_floor: 0.5}"], "sft.negatives.logprob_floor: "),
    ],
)
def test_objectives_that_cannot_be(run_file: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(run_file, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rl.loss=ppo"], "rl.loss: Input tag 'ppo'"),
        (["rl.loss={kind: gspo, clip_hi: 1}"], "clip_hi: unknown key; did you mean 'clip_high'?"),
        (["rl.loss={kind: reinforce, clip_low: 0.1}"], "rl.loss.reinforce.clip_low: unknown key"),
        (["rl.kl={coefficient: 0.1, estimator: k1}"], "rl.kl: estimator=k1 in the loss has a grad"),
        (["rl.overlong.buffer_tokens=200"], "buffer_tokens=200 is more than max_tokens=128"),
        (["rl.mismatch_correction.low=1.5"], "rl.mismatch_correction.low: "),
        (["rl.mismatch_correction.high=0.9"], "rl.mismatch_correction.high: "),
        (
            ["rl.rollouts_ahead=1", "rl.dynamic_sampling={}"],
            "rl: rollouts_ahead=1 and dynamic_sampling do not go together",
        ),
        (
            ["rl.lora={sync: adapter}", "rl.tensor_parallel_size=2"],
            "rl.lora.sync=adapter is for engines on one device",
        ),
        (
            ["rl.lora={sync: adapter}", "cluster.device=cuda"],
            "rl.lora.sync=adapter wants an engine that keeps its base",
        ),
        (["rl.rollouts_ahead=2"], "rl.rollouts_ahead: Input should be 0 or 1"),
        (["rl.updates_per_batch=3"], "rl.updates_per_batch=3 updates of cluster.num_trainers=2"),
    ],
)
def test_rl_losses_that_cannot_be(run_file: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(run_file, *overrides)


def test_rl_losses_by_name_and_in_full(run_file: Path) -> None:
    assert load_run(run_file, ["rl.loss=gspo"]).rl.loss.clip_high == 4e-4
    loss = load_run(run_file, ["rl.loss={kind: cispo, clip_high: 3}"]).rl.loss
    assert (loss.kind, loss.clip_low, loss.clip_high) == ("cispo", 1.0, 3.0)
    load_run(run_file, ["rl.kl={coefficient: 0.1, estimator: k1, placement: reward}"])
    assert load_run(run_file, ["rl.mismatch_correction.level=off"]).rl.mismatch_correction.high == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sft.weights={kind: pear, ratio_policy: ema}"], "ratio_policy=ema wants an average"),
        (["sft.export=ema"], "sft.export=ema wants an average of the weights"),
        (["sft.ema_decay=0.9", "sft.backend={kind: deepspeed}"], "sft.ema_decay is not there"),
    ],
)
def test_averages_that_nobody_keeps(run_file: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(run_file, *overrides)


def test_compiling_under_deepspeed(run_file: Path) -> None:
    message = refusal(run_file, "sft.compile=true", "sft.backend=deepspeed")
    assert "sft.compile=true is for sft.backend.kind=fsdp and ddp" in message
    assert load_run(run_file, ["sft.compile=true", "sft.backend=ddp"]).sft.compile


def test_evaluating_on_more_problems_than_there_are(run_file: Path) -> None:
    size = load_run(run_file, []).evaluate.problems.size
    for stage in ("sft", "rl"):
        settings = f"{stage}.pass_at_k={{every: 5, num_problems: {size + 1}}}"
        assert (
            f"{stage}.pass_at_k.num_problems={size + 1} wants more than the "
            f"evaluate.problems.size={size} there are"
        ) in refusal(run_file, settings)
        load_run(run_file, [settings.replace(str(size + 1), str(size))])


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ("{rank: 0}", "sft.lora.rank: Input should be greater than 0 (got 0)"),
        ("{alpha: -1}", "sft.lora.alpha: Input should be greater than 0 (got -1)"),
        ("{ranks: 8}", "sft.lora.ranks: unknown key; did you mean 'rank'?"),
        ("{dropout: 0.1}", "sft.lora.dropout: unknown key"),
        ("{target_modules: q_proj}", "sft.lora.target_modules: wanted all-linear, or a list of"),
        ("{target_modules: []}", "layers' names such as [q_proj, v_proj]; got []"),
        ("{target_modules: [3]}", "Input should be a valid string (got 3)"),
    ],
)
def test_adapters_that_cannot_be(run_file: Path, lora: str, line: str) -> None:
    message = refusal(run_file, f"sft.lora={lora}")
    assert line in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.objective.k=3", "sft.objective.nll.k: unknown key; it belongs to kind eaft"),
        ("sft.backend.zero_stage=3", "unknown key; it belongs to kind deepspeed"),
        ("sft.weights.gama=0.9", "sft.weights.pear.gama: unknown key; did you mean 'gamma'?"),
        ("sft.weights={kind: uniform, gamma: 0.9}", "it belongs to kind pear"),
        ("corpus={kind: dataset, path: x, max_tokens: 3}", "it belongs to kind sampled"),
    ],
)
def test_keys_of_another_kind(run_file: Path, override: str, words: str) -> None:
    assert words in refusal(run_file, override)


def test_a_kind_is_named_by_its_name_or_not_at_all(run_file: Path) -> None:
    """An override of one key works whether or not the run file has the section."""
    run = load_run(run_file, ["sft.weights.ratio_policy=init", "sft.backend=ddp"])
    assert run.sft.weights.kind == "pear"
    assert run.sft.weights.ratio_policy == "init"
    assert run.sft.backend.kind == "ddp"
    assert load_run(run_file, ["sft.weights=uniform"]).sft.weights.kind == "uniform"

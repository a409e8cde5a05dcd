"""Who shares a device, what each worker has, and which setting mends what does not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pear_ray.config.run import RunConfig, load_run, validate_run
from pear_ray.embedded.paths import embedded_path
from pear_ray.memory.items import GIB, Item, Moment, Phase, Verdict, moment, size, summary
from pear_ray.memory.mend import find_mends, with_settings
from pear_ray.memory.model_shape import ModelShape
from pear_ray.memory.phases import (
    DRIVER_AND_RAY_BYTES,
    PROCESS_BYTES,
    VERIFIER_BYTES,
    Memory,
    ModelShapes,
    plan_phases,
    read_shapes,
)

DEMO = Path(__file__).parents[3] / "jobs" / "runs" / "demo.yaml"
# Qwen3-0.6B's shape: large enough for its share and its activations to matter.
QWEN3 = ModelShape(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    num_norms=2,
    has_qk_norm=True,
    has_float32_norms=False,
    is_tied=True,
    num_parameters=596_049_920,
    layer_parameters=15_730_944,
)
SHAPES = ModelShapes(policy=QWEN3, behavior={"*": QWEN3})


def run(*overrides: str) -> RunConfig:
    return load_run(DEMO, ["models.max_model_len=2048", *overrides])


def phases(
    config: RunConfig, *, device: int | None = None, host: int = 64 * GIB, **given: Any
) -> dict[str, Phase]:
    memory = Memory(device_bytes=device, host_bytes=host)
    return {each.name: each for each in plan_phases(config, SHAPES, memory, **given)}


def names(one: Moment) -> set[str]:
    return {item.name for item in one.items}


def test_every_stage_with_a_model_has_a_phase() -> None:
    assert list(phases(run())) == ["collect", "score", "sft", "rl", "evaluate"]
    tree = run().model_dump(mode="json") | {"corpus": {"kind": "dataset", "path": "rows.jsonl"}}
    config = validate_run(tree, origin="test")
    assert list(phases(config)) == ["score", "sft", "rl", "evaluate"]


def test_shares_of_this_machine() -> None:
    host = DRIVER_AND_RAY_BYTES + 12 * GIB
    found = phases(run("cluster.num_trainers=4", "cluster.num_samplers=3"), host=host)
    assert found["sft"].available_bytes == 3 * GIB
    assert found["score"].available_bytes == 4 * GIB
    # The driver's verifiers are beside the engines.
    assert found["evaluate"].available_bytes == (12 * GIB - VERIFIER_BYTES) // 3
    assert [found[name].num_workers for name in ("sft", "score")] == [4, 3]


@pytest.mark.parametrize("override", ["cluster.device=cuda", "cluster.address=auto"])
def test_elsewhere_nothing_is_judged_until_somebody_says(override: str) -> None:
    assert {each.verdict for each in phases(run(override)).values()} == {Verdict.UNKNOWN}
    said = phases(run(override), device=80 * GIB)
    assert {each.available_bytes for each in said.values()} == {80 * GIB}


def test_trainer_and_engine_are_there_together() -> None:
    rl, sft = phases(run())["rl"], phases(run())["sft"]
    engine = {"engine's weights", "packed copies of embedding and head", "KV cache"}
    assert all(engine | {"process with its libraries"} <= names(each) for each in rl.moments)
    assert not engine & names(sft.peak)
    assert {"weight sync", "log-probs in the engine"} <= {each.name for each in rl.moments}


def test_evaluating_while_sft_trains_takes_an_engine() -> None:
    """The engine, its verifiers and a checkpoint on its way; switched off it is what mends it."""
    on = phases(run("sft.pass_at_k={every: 5}"))["sft"]
    engine = {"engine's weights", "packed copies of embedding and head", "KV cache"}
    assert all(engine | {"verifier processes"} <= names(each) for each in on.moments)
    [loading] = [each for each in on.moments if each.name == "loading weights to evaluate"]
    sizes = {item.name: item.num_bytes for item in loading.items}
    assert sizes["checkpoint while it is loaded"] == 4 * QWEN3.num_parameters
    assert sizes["parameters"] == 4 * QWEN3.num_parameters // 2
    off = phases(run())["sft"]
    extra = on.peak.num_bytes - off.peak.num_bytes
    # float32 weights and two packed embeddings, a GiB of KV cache, a verifier, vLLM's code
    least = 4 * QWEN3.num_parameters + 8 * QWEN3.vocab_size * QWEN3.hidden_size + GIB
    least += VERIFIER_BYTES + PROCESS_BYTES["rl"] - PROCESS_BYTES["sft"]
    assert extra == least
    on_cuda = run("cluster.device=cuda", "models.dtype=bfloat16", "sft.pass_at_k={every: 5}")
    # There the engine sleeps while the policy trains, and is awake beside its state alone.
    [awake] = [
        each
        for each in phases(on_cuda, device=48 * GIB)["sft"].moments
        if each.name == "the engine is awake"
    ]
    assert {"vLLM's share of the GPU", "AdamW's moments", "parameters"} <= names(awake)
    assert "saved activations" not in " ".join(names(awake))


def test_rl_that_evaluates_has_its_verifiers_too() -> None:
    on, off = phases(run("rl.pass_at_k={every: 5}"))["rl"], phases(run())["rl"]
    assert on.peak.num_bytes == off.peak.num_bytes + VERIFIER_BYTES


def test_a_process_counts_where_its_memory_is_the_devices() -> None:
    on_cpu, on_cuda = phases(run()), phases(run("cluster.device=cuda"), device=80 * GIB)
    libraries = [item for item in on_cpu["sft"].peak.items if item.formula == "as measured"]
    assert [item.num_bytes for item in libraries] == [PROCESS_BYTES["sft"]]
    assert not any("process" in name for name in names(on_cuda["rl"].peak))
    assert "CUDA context" in on_cuda["sft"].notes[0]


def test_the_largest_behavior_model_counts() -> None:
    small = read_shapes(embedded_path("student"), {}).policy
    shapes = ModelShapes(policy=small, behavior={"a": small, "b": QWEN3})
    memory = Memory(device_bytes=None, host_bytes=64 * GIB)
    score = next(p for p in plan_phases(run(), shapes, memory) if p.name == "score")
    [weights] = [item for item in score.peak.items if item.name == "engine's weights"]
    assert weights.num_bytes == 4 * 596_049_920


def test_checkpointing_takes_less() -> None:
    config = run("cluster.device=cuda")
    with_it, without = phases(config, checkpointing=True), phases(config)
    for name in ("sft", "rl"):
        assert with_it[name].peak.num_bytes < 0.6 * without[name].peak.num_bytes
    assert with_it["score"] == without["score"]


def test_each_stage_says_for_itself_whether_it_checkpoints() -> None:
    on_cuda = "cluster.device=cuda"
    plain, all_of_it = phases(run(on_cuda)), phases(run(on_cuda), checkpointing=True)
    for name, other in (("sft", "rl"), ("rl", "sft")):
        found = phases(run(on_cuda, f"{name}.activation_checkpointing=true"))
        assert found[name] == all_of_it[name]
        assert found[other] == plain[other]


def test_a_gpu_takes_a_model_unit_by_unit_and_its_host_all_of_it() -> None:
    on_cuda = phases(run("cluster.device=cuda"))["rl"]
    [loading] = [each for each in on_cuda.moments if each.name == "loading and sharding"]
    outside = 596_049_920 - 28 * 15_730_944
    assert loading.num_bytes == 4 * outside + 4 * 596_049_920 // 2
    [whole] = [item for item in on_cuda.on_host if "while it is loaded" in item.name]
    assert whole.num_bytes == 4 * 596_049_920
    ddp = phases(run("cluster.device=cuda", "sft.backend.kind=ddp"))["sft"]
    [loading] = [each for each in ddp.moments if each.name == "loading and sharding"]
    assert loading.num_bytes >= 4 * 596_049_920
    assert phases(run())["rl"].on_host == ()  # where there is no other memory


def test_slack_is_of_what_is_made_anew_in_every_step() -> None:
    def slack_and_changing(tokens: int) -> tuple[int, int]:
        row = (f"models.max_model_len={tokens}", f"sft.microbatch_tokens={tokens}")
        sft = phases(run(*row, "cluster.kv_cache_gib=4"))["sft"]
        stays = 12 * QWEN3.num_parameters // 2 + PROCESS_BYTES["sft"]
        return sft.slack_bytes, sft.peak.num_bytes - stays

    # 8,192 tokens x 1,024 x 4 bytes are 32 MiB, which glibc gives back at once; left in its heap
    # are numbers per token: log-sum-exps of 16 heads, two norms, 24 normed heads
    slack, changing = slack_and_changing(8192)
    small = 28 * 8192 * 4 * (16 + 2 + 24)
    assert slack == pytest.approx(0.1 * changing + 0.75 * small, abs=2)
    # with a token less all that is 1,024 wide is in the heap as well: what goes into two norms, two
    # products and the keys' norm; keys and values
    slack, changing = slack_and_changing(8191)
    small = 28 * 8191 * 4 * (16 + 2 + 24 + 7 * 1024)
    assert slack == pytest.approx(0.1 * changing + 0.75 * small, abs=2)
    assert phases(run("cluster.device=cuda"))["sft"].slack_bytes == 0


def mends(name: str, config: RunConfig, **given: Any) -> dict[str, Any]:
    """The single mends of a phase, each checked to fit and the next larger value not to."""
    assert phases(config, **given)[name].verdict is Verdict.TOO_LARGE
    found = find_mends(config, name, lambda changed: list(phases(changed, **given).values()))
    for mend in found:
        changed = with_settings(config, mend.settings)
        assert changed is not None
        phase = phases(changed, **given)[name]
        assert phase.verdict in (Verdict.FITS, Verdict.TIGHT)
        assert (phase.peak.num_bytes, phase.available_bytes) == (
            mend.num_bytes,
            mend.available_bytes,
        )
    return {key: value for mend in found for key, value in mend.settings.items()}


def test_nearly_the_greatest_number_of_tokens_that_fits() -> None:
    config = run("sft.global_batch_size=64", "cluster.device=cuda")
    found = mends("sft", config, device=24 * GIB)
    tokens = found["sft.microbatch_tokens"]
    assert tokens % 64 == 0
    more = with_settings(config, {"sft.microbatch_tokens": round(1.05 * tokens)})
    assert more is not None
    assert phases(more, device=24 * GIB)["sft"].verdict is Verdict.TOO_LARGE


def test_a_cpu_takes_no_more_tokens_than_are_enough_for_it() -> None:
    short = "models.max_model_len=256"
    most, less = (phases(run(short, f"sft.microbatch_tokens={n}"))["sft"] for n in (8192, 1024))
    assert most == less
    [layers] = [item for item in most.peak.items if item.name == "activations of the layers"]
    assert " x 1,024 tokens x " in layers.formula
    assert layers.setting == "sft.microbatch_tokens"
    [layers] = [item for item in phases(run())["sft"].peak.items if item.name == layers.name]
    assert (" x 2,048 tokens x " in layers.formula, layers.setting) == (
        True,
        "models.max_model_len",
    )


def test_a_model_whose_rows_are_padded_is_not_packed() -> None:
    padding = dataclasses.replace(QWEN3, packs=False)
    shapes = ModelShapes(policy=padding, behavior={"*": QWEN3})
    memory = Memory(device_bytes=None, host_bytes=64 * GIB)
    found = {each.name: each for each in plan_phases(run(), shapes, memory)}
    for name in ("sft", "rl"):
        [layers] = [i for i in found[name].peak.items if i.name == "activations of the layers"]
        assert " x 8,192 tokens x " in layers.formula
        assert "masks" in found[name].notes[0]
    assert found["evaluate"].notes == ()


def test_adapters_are_all_that_trains() -> None:
    lora = "sft.lora={rank: 8, target_modules: [q_proj]}"
    with_it, without = phases(run(lora))["sft"], phases(run())["sft"]
    [moments] = [i for i in with_it.peak.items if i.name == "AdamW's moments"]
    # rank x (1,024 in, 2,048 out) in 28 layers; two moments, two trainers
    assert moments.num_bytes == 8 * 28 * 8 * (1024 + 2048) // 2
    assert not any("head's gradient" in name for name in names(with_it.peak))
    assert with_it.slack_bytes < without.slack_bytes
    assert phases(run(lora))["rl"] == phases(run())["rl"]


def test_adapters_of_rl_take_less_and_keep_no_reference() -> None:
    lora, kl = "rl.lora={rank: 8, target_modules: [q_proj]}", "rl.kl.coefficient=0.1"
    with_it, without = phases(run(lora, kl))["rl"], phases(run(kl))["rl"]
    [moments] = [i for i in with_it.peak.items if i.name == "AdamW's moments"]
    assert moments.num_bytes == 8 * 28 * 8 * (1024 + 2048) // 2
    assert any("frozen copy" in note for note in without.notes)
    assert not any("frozen copy" in note for note in with_it.notes)
    [sync] = [each for each in with_it.moments if each.name == "weight sync"]
    [merged] = [i for i in sync.items if i.name == "merged weights of a layer"]
    assert merged.num_bytes == 4 * QWEN3.layer_parameters
    [sync] = [each for each in without.moments if each.name == "weight sync"]
    assert "merged weights of a layer" not in names(sync)
    assert phases(run(lora))["sft"] == phases(run())["sft"]


def test_fewer_workers_have_larger_shares_of_this_machine() -> None:
    found = mends("sft", run("sft.global_batch_size=64"), host=23 * GIB)
    assert found == {"sft.activation_checkpointing": True}  # which changes nothing else
    checkpointed = run("sft.global_batch_size=64", "sft.activation_checkpointing=true")
    found = mends("sft", checkpointed, host=13 * GIB)
    assert found["cluster.num_trainers"] == 1


def test_more_trainers_split_the_state_on_gpus() -> None:
    config = run("cluster.device=cuda", "cluster.num_trainers=1", "sft.microbatch_tokens=2048")
    found = mends("sft", config, device=12 * GIB)
    assert found["cluster.num_trainers"] in (2, 4, 8, 16)  # of 16 prompts and 32 sequences


def test_an_engine_leaves_the_trainer_its_part_of_a_gpu() -> None:
    stays = ("cluster.device=cuda", "models.dtype=bfloat16", "rl.colocation.sleep=false")
    found = mends("rl", run(*stays), device=24 * GIB)
    assert found["cluster.gpu_memory_fraction"] < 0.85


def test_an_engine_that_sleeps_leaves_the_gpu_to_the_trainer() -> None:
    config = ("cluster.device=cuda", "models.dtype=bfloat16", "cluster.num_trainers=1")
    state = {"none": {"AdamW's moments", "parameters"}, "optimizer": {"parameters"}, "all": set()}
    for offload, kept in state.items():
        rl = phases(run(*config, f"rl.colocation.offload={offload}"), device=24 * GIB)["rl"]
        [awake] = [each for each in rl.moments if each.name == "the engine is awake"]
        assert names(awake) & {"AdamW's moments", "parameters"} == kept
        others = [each for each in rl.moments if each is not awake]
        with_moments = {each.name for each in others if "AdamW's moments" in names(each)}
        if offload != "none":  # they come for the update, which goes tensor by tensor
            assert with_moments == {"the optimizer step"}
            assert "AdamW's moments" in {item.name for item in rl.on_host}
            [step] = [each for each in others if each.name == "the optimizer step"]
            sizes = {item.name: item.num_bytes for item in step.items}
            assert sizes["temporaries of the update"] == 8 * QWEN3.vocab_size * QWEN3.hidden_size
        else:
            assert {"a layer, backward", "weight sync"} < with_moments
        assert not any("vLLM's share of the GPU" in names(each) for each in others)
        [sync] = [each for each in rl.moments if each.name == "weight sync"]
        assert "engine's weights" in names(sync)


def test_a_cache_that_is_too_small_is_made_larger() -> None:
    config = run("models.max_model_len=40000", "score.rows_per_block=1")
    found = mends("score", config, host=400 * GIB)
    # 2 x 28 layers x 1,024 x 4 bytes x 40,001 tokens are 8.5 GiB
    assert found == {"cluster.kv_cache_gib": 9}
    elsewhere = run("models.max_model_len=40000", "cluster.address=auto")
    [mend] = find_mends(elsewhere, "score", lambda run: list(phases(run).values()))
    assert (mend.settings, mend.available_bytes) == ({"cluster.kv_cache_gib": 9}, None)


def test_chunks_make_scoring_fit() -> None:
    config = run("score.chunk_tokens=16384", "cluster.num_samplers=1")
    found = mends("score", config, host=24 * GIB)
    assert 64 <= found["score.chunk_tokens"] < 16384


def test_several_settings_together_where_one_will_not_do() -> None:
    config = run("cluster.kv_cache_gib=4", "cluster.num_trainers=1", "models.max_model_len=256")
    host = 37 * GIB // 2
    [mend] = find_mends(config, "rl", lambda changed: list(phases(changed, host=host).values()))
    together = {"rl.activation_checkpointing", "rl.microbatch_tokens", "cluster.kv_cache_gib"}
    assert set(mend.settings) == together


def test_nothing_mends_a_model_that_is_too_large() -> None:
    config = run()
    assert (
        find_mends(config, "rl", lambda changed: list(phases(changed, host=4 * GIB).values())) == []
    )


def test_settings_that_do_not_go_together_are_no_mend() -> None:
    assert with_settings(run(), {"cluster.num_trainers": 3}) is None  # of 16 prompts
    changed = with_settings(run(), {"cluster.num_trainers": 4})
    assert changed is not None
    assert changed.cluster.num_trainers == 4


def test_verdicts() -> None:
    def verdict(available: int | None) -> Verdict:
        one = moment("m", [Item(name="i", num_bytes=100, formula="")])
        return Phase(
            name="p", num_workers=1, moments=(one,), available_bytes=available, slack_bytes=20
        ).verdict

    assert [verdict(each) for each in (None, 99, 100, 119, 120)] == [
        Verdict.UNKNOWN,
        Verdict.TOO_LARGE,
        Verdict.TIGHT,
        Verdict.TIGHT,
        Verdict.FITS,
    ]


def test_words() -> None:
    assert size(3 * GIB // 2) == "1.50 GiB"
    assert size(3 * 2**20) == "3.0 MiB"
    assert summary(phases(run(), host=200 * GIB)["sft"]).startswith("fits: ")


def test_a_backend_of_ones_own_is_planned_as_itself() -> None:
    ddp = phases(run("sft.backend.kind=ddp"))
    assert "buckets that gradients are reduced in" in names(ddp["sft"].peak)
    assert ddp["rl"] == phases(run())["rl"]  # which is always FSDP2
    zero = phases(run("sft.backend.kind=deepspeed"))["sft"]
    libraries = [i.num_bytes for i in zero.peak.items if i.name == "process with its libraries"]
    assert libraries == [PROCESS_BYTES["deepspeed"]]


def test_what_offloading_puts_on_the_host() -> None:
    on_cuda = ("cluster.device=cuda", "sft.backend.kind=fsdp", "sft.backend.cpu_offload=true")
    found = phases(run(*on_cuda), device=80 * GIB)["sft"]
    kept = [item for item in found.on_host if "while it is loaded" not in item.name]
    assert sum(item.num_bytes for item in kept) == 16 * QWEN3.num_parameters // 2
    assert not {"parameters", "AdamW's moments"} & names(found.peak)


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("collect", "corpus.tensor_parallel_size"),
        ("score", "score.tensor_parallel_size"),
        ("evaluate", "evaluate.tensor_parallel_size"),
    ],
)
def test_devices_of_one_engine(stage: str, setting: str) -> None:
    found = phases(run(f"{setting}=2"), host=64 * GIB)[stage]
    assert found.num_workers == 2 * run().cluster.num_samplers
    [weights] = [item for item in found.peak.items if item.name == "engine's weights"]
    assert (weights.num_bytes, weights.setting) == (2 * QWEN3.num_parameters, setting)


def test_an_engine_that_sft_evaluates_with_is_evaluates_own() -> None:
    on = ("sft.pass_at_k={every: 5}", "cluster.num_trainers=2")
    whole, half = (
        phases(run(*on, f"evaluate.tensor_parallel_size={size}"))["sft"] for size in (1, 2)
    )
    [weights] = [item for item in half.peak.items if item.name == "engine's weights"]
    assert weights.num_bytes == 2 * QWEN3.num_parameters
    assert half.num_workers == whole.num_workers == 2


def test_more_devices_for_an_engine_mend_a_model_that_is_too_large_for_one() -> None:
    config = run("cluster.device=cuda", "models.dtype=bfloat16", "cluster.num_trainers=16")
    for stage, section in (("collect", "corpus"), ("evaluate", "evaluate")):
        found = mends(stage, config, device=3 * GIB // 2)
        assert found[f"{section}.tensor_parallel_size"] == 2


def test_heads_that_do_not_split_over_the_devices() -> None:
    found = phases(run("evaluate.tensor_parallel_size=3"), host=64 * GIB)["evaluate"]
    assert found.verdict is Verdict.TOO_LARGE
    assert found.shortage is not None
    assert found.shortage.words.startswith("evaluate.tensor_parallel_size=3 does not divide its 16")


def test_the_host_of_a_gpu_holds_a_checkpoint_while_it_is_loaded() -> None:
    found = phases(run("cluster.device=cuda"), device=80 * GIB)["evaluate"]
    assert [item.num_bytes for item in found.on_host] == [4 * QWEN3.num_parameters]

"""The halves of RL: artifacts of their own, and rollouts that do not fit are refused at once."""

from pathlib import Path
from typing import Any

import pytest
from rollout_files import write_steps

from pear_ray import cli, dry_run, pipeline, preflight
from pear_ray.artifacts import manifest, replay
from pear_ray.config.run import RunConfig, dump_run, validate_run
from pear_ray.errors import ArtifactError, InputError
from pear_ray.identities import fingerprints
from pear_ray.preflight import Models

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
MODELS = Models(Path("p"), {"*": Path("b")}, "policy-1", "behavior-1")


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"prompt": "1 + 2 =", "completion": "3"}\n', encoding="utf-8")
    return {
        "name": "t",
        "output_dir": str(tmp_path / "outputs"),
        "models": {
            "policy": "embedded:student",
            "behavior": "embedded:teacher",
            "max_model_len": 200,
        },
        "corpus": {"kind": "dataset", "path": str(corpus)},
        "sft": {"optimizer": {"learning_rate": 1e-3}},
        "rl": {
            "problems": GAMES,
            "optimizer": {"learning_rate": 1e-4},
            "num_steps": 2,
            "prompts_per_step": 3,
            "group_size": 2,
        },
        "evaluate": {"problems": GAMES},
        "cluster": {"num_trainers": 1},
    }


def config_of(base: dict[str, Any], **rl: Any) -> RunConfig:
    return validate_run(base | {"rl": base["rl"] | rl}, origin="test")


def rollouts_identity(base: dict[str, Any], **rl: Any) -> str:
    return replay.rollouts_fingerprint(config_of(base, **rl), {"sft": "x"})


def test_rollouts_hang_on_what_samples_and_rewards_alone(base: dict[str, Any]) -> None:
    known = rollouts_identity(base)
    for rl in (
        {"loss": "gspo"},
        {"optimizer": {"learning_rate": 1e-5}},
        {"kl": {"coefficient": 0.1}},
        {"microbatch_tokens": 512},
        {"save_rollouts_every": 0},
    ):
        assert rollouts_identity(base, **rl) == known, rl
    for rl in (
        {"temperature": 0.5},
        {"num_steps": 3},
        {"group_size": 4},
        {"problems": GAMES | {"seed": 1}},
        {"rewards": {"components": [{"kind": "exact"}]}},
    ):
        assert rollouts_identity(base, **rl) != known, rl


def test_every_trainers_key_is_one_of_the_sections(base: dict[str, Any]) -> None:
    assert set(config_of(base).rl.model_dump()) >= replay.TRAINING_ONLY


def finish(folder: Path, identity: str) -> None:
    manifest.begin(folder, identity)
    manifest.complete(folder, counts={})


def test_a_finished_half_is_no_finished_rl(base: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(base)
    write_steps(tmp_path / "given")
    given = tmp_path / "given"
    for only in ("rl_rollouts", "rl_train"):
        wanted = {"rollouts": given} if only == "rl_train" else {}
        stage = pipeline.plan(config, tmp_path / "run", MODELS, only=only, **wanted)[-1]
        assert (stage.name, stage.is_current) == (only, False)
        finish(tmp_path / "run" / only, stage.fingerprint)
        again = pipeline.plan(config, tmp_path / "run", MODELS, only=only, **wanted)
        assert [(each.name, each.is_current) for each in again] == [
            *[(name, False) for name in ("collect", "score", "sft")],
            (only, True),
        ]
    whole = pipeline.plan(config, tmp_path / "run", MODELS)
    assert not any(stage.is_made for stage in whole)
    assert not {"rl_rollouts", "rl_train"}.intersection(stage.name for stage in whole)


def test_other_rollouts_make_another_training(base: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(base)
    one = replay.replay_fingerprint(config, write_steps(tmp_path / "one"), sft="x")
    same = replay.replay_fingerprint(config, write_steps(tmp_path / "same"), sft="x")
    other = replay.replay_fingerprint(
        config, write_steps(tmp_path / "other", trained=False), sft="x"
    )
    assert one == same
    assert other != one
    assert replay.replay_fingerprint(config, tmp_path / "one", sft="y") != one


def test_the_runs_own_rollouts_are_found_best_first(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"run `pear rl RUN\.yaml --rollouts-only` first"):
        replay.find_rollouts(tmp_path, None, current="now")
    of_rl = write_steps(tmp_path / "rl" / "rollouts")
    assert replay.find_rollouts(tmp_path, None, current="now") == of_rl
    finish(tmp_path / "rl_rollouts", "now")
    assert replay.find_rollouts(tmp_path, None, current="now") == tmp_path / "rl_rollouts/rollouts"
    assert replay.find_rollouts(tmp_path, None, current="later") == of_rl
    for given in (tmp_path / "rl", of_rl):
        assert replay.find_rollouts(tmp_path, given, current="now") == of_rl.resolve()
    with pytest.raises(InputError, match=r"no step-NNNNN\.parquet is in it"):
        replay.find_rollouts(tmp_path, tmp_path, current="now")


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"num_steps": 4}, r"holds the rollouts of 3 steps, and rl\.num_steps=4"),
        ({"group_size": 3}, r"3 groups of 2 completions, and the run wants .*group_size=3"),
        ({"prompts_per_step": 4}, r"3 groups of 2 completions, and the run wants rl\.prompts"),
        ({"temperature": 0.7}, r"sampled at temperature 1\.0, and rl\.temperature=0\.7"),
    ],
)
def test_rollouts_of_other_settings_are_refused(
    base: dict[str, Any], tmp_path: Path, rl: dict[str, Any], message: str
) -> None:
    write_steps(tmp_path / "given")
    with pytest.raises(InputError, match=message):
        replay.rollout_files(tmp_path / "given", config_of(base, **rl))


def test_rollouts_of_another_tokenizer_are_refused(tmp_path: Path, student: Path) -> None:
    """The files' prompts are not what the student's template makes of their questions."""
    folder = write_steps(tmp_path / "given")
    with pytest.raises(InputError, match="of another tokenizer or chat template"):
        preflight.check_rollouts(folder, student, 200)


def test_flags_that_do_not_go_together(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "t.yaml"
    run_file.write_text(dump_run(config_of(base)), encoding="utf-8")
    assert cli.main(["rl", str(run_file), "--rollouts", str(tmp_path)]) == 2
    assert "add that flag, or leave --rollouts out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["rl", str(run_file), "--rollouts-only", "--train-only"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert cli.main(["rl", str(run_file), "--rollouts-only"]) == 2
    assert "stage 'collect', which 'rl_rollouts' builds on" in capsys.readouterr().err


def test_a_dry_run_names_the_rollouts(base: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(base)
    identities = fingerprints(config, preflight.check_models(config))
    write_steps(tmp_path / "given")
    run_dir = tmp_path / "outputs" / "t"
    current = replay.replay_fingerprint(config, tmp_path / "given", sft=identities["sft"])
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text('{"name": "t"}')
    finish(run_dir / "rl_train", current)
    text = dry_run.describe(config, only="rl_train", rollouts=tmp_path / "given")
    assert f"rl_train  {current}  skip: complete and current, from {tmp_path / 'given'}" in text

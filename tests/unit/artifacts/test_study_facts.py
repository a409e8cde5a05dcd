"""study.json comes back as it was written, and what is none is named."""

from pathlib import Path

import pytest

from pear_ray.artifacts.study_facts import (
    FACTS_FILE,
    ArmFacts,
    RegistrationFacts,
    StudyFacts,
    arm_facts,
    budget_uses,
    read_facts,
    write_facts,
)
from pear_ray.config.run import load_run
from pear_ray.config.study import BudgetConfig
from pear_ray.config.study_plan import Arm
from pear_ray.errors import ArtifactError

RUN = Path(__file__).parents[3] / "jobs" / "runs" / "demo.yaml"
ARM = ArmFacts(
    name="pear.shuffled",
    parent="pear",
    control="shuffled",
    rescaled=False,
    overrides={"sft.weights": {"kind": "pear", "level": "token"}},
    weights="pear",
    objective="nll",
    has_sft=True,
)


@pytest.mark.parametrize(
    "registration",
    [None, RegistrationFacts(time=12.5, first_rl_time=None, content_hash="ab")],
)
def test_facts_come_back(tmp_path, registration):
    facts = StudyFacts(
        arms=[ARM],
        state="stopped",
        learning_rates={"pear.shuffled": 1e-3},
        registration=registration,
        changed_since_registration=["seeds were [0, 1], now [0, 1, 2]"],
        budget=budget_uses(BudgetConfig(tokens=10), tokens=7, device_hours=0.5),
    )
    assert [(each.limit, each.used) for each in facts.budget] == [(10, 7), (None, 0.5)]
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts


def test_an_arm_says_what_its_run_does():
    name = {"name": "a", "parent": "a", "overrides": {}}
    uniform = arm_facts(Arm(**name), load_run(RUN, ["sft.weights=uniform"]))
    assert uniform.is_uniform
    dft = arm_facts(Arm(**name), load_run(RUN, ["sft.weights=uniform", "sft.objective=dft"]))
    assert (dft.objective, dft.is_uniform) == ("dft", False)
    assert not arm_facts(Arm(**name), load_run(RUN, ["sft.weights=pear"])).is_uniform


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no folder of a study; give the one that `pear study`"):
        read_facts(tmp_path)
    (tmp_path / FACTS_FILE).write_text('{"arms": [{"name": "a"}], "registration": null}')
    with pytest.raises(ArtifactError, match=r"not of this version .* run `pear study` again"):
        read_facts(tmp_path)

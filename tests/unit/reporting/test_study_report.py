"""A study's report: planted effects are found, planted nulls are not claimed, limits are said."""

import dataclasses
import json
import random
import re
from html import unescape

import pytest
from synthetic_study import (
    ARMS,
    DFT,
    LIKELIHOOD,
    NULL,
    PEAR,
    SFT,
    SHUFFLED,
    Made,
    MadeArm,
    make_study,
    registered,
)

from pear_ray.artifacts.study_facts import FACTS_FILE, RegistrationFacts, StudyFacts
from pear_ray.config.study import ArmConfig, PrimaryConfig, StudyConfig
from pear_ray.errors import ArtifactError, ConfigError
from pear_ray.reporting.study.estimates import as_family, compare
from pear_ray.reporting.study.load import StudyData
from pear_ray.reporting.study.numbers import study_numbers
from pear_ray.reporting.study.page import study_text as text_of
from pear_ray.reporting.study.page import write_study_report
from pear_ray.reporting.study.words import notes, verdict

PRIMARY = PrimaryConfig(arm="pear", against=["sft", "pear.shuffled"])
MEAN_ONE = MadeArm("pear.mean_one", 0.36, 0.84, "pear", rescaled=True, parent="pear")
NONE = MadeArm("none", 0.10, 0.30, has_sft=False)


def said_of(folder):
    found = study_numbers(folder)
    return found, verdict(found), notes(found)


def words_of(page):
    """The page's text, without its figures and tags."""
    html = re.sub(r"<(svg|style).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def row(found, arm):
    return next(each for each in found.main.arms if each.arm == arm)


def test_a_planted_effect_is_found_and_the_registered_rule_holds(tmp_path):
    found, said, noted = said_of(make_study(tmp_path / "s", made=registered(PRIMARY)))
    begins = "The registered comparison holds: after RL, pear is above sft (+0.099"
    assert said[0].startswith(begins)
    assert "and above pear.shuffled (+0.09" in said[0]
    assert "p = 0.008; n = 8" in said[0]  # 2 of 2^8 patterns
    assert noted == []
    versus = row(found, "pear").versus_after
    assert versus.difference.value == pytest.approx(0.10, abs=0.02)
    assert versus.difference.low < 0.10 < versus.difference.high
    assert (versus.difference.p, versus.holm_p, versus.family) == (2 / 256, 5 * 2 / 256, 5)
    assert (versus.difference.num_better, versus.difference.num_worse) == (8, 0)


def test_a_planted_null_is_not_claimed(tmp_path):
    primary = PrimaryConfig(arm="null", against=["sft"])
    found, said, _ = said_of(make_study(tmp_path / "s", made=registered(primary)))
    assert said[0].startswith("The registered comparison does not hold. Rule: after RL, null above")
    assert "Found: not told apart from sft" in said[0]
    null = row(found, "null").versus_after
    assert not null.is_apart(found.alpha)
    assert null.difference.low < 0 < null.difference.high


def test_no_more_nulls_are_claimed_than_alpha_allows():
    """Of 400 studies of four arms that are all the same, at most one in twenty tells any apart."""
    chance = random.Random(0)
    arms = ["sft", "a", "b", "c"]
    alone = together = 0
    for _ in range(400):
        family = as_family(
            [
                compare(data, arm, "sft", suite="main", metric="pass_at_1", when="after")
                for data in [null_study(arms, chance)]
                for arm in arms[1:]
            ]
        )
        alone += any(each.is_apart(0.05) for each in family)
        together += any(each.is_apart_in_family(0.05) for each in family)
    assert together <= 0.05 * 400 + 2 * (400 * 0.05 * 0.95) ** 0.5
    assert alone > together  # what Holm's correction is for


def null_study(arms, chance):
    values = {
        (arm, "main", "rl", "pass_at_1"): {seed: chance.gauss(0.5, 0.05) for seed in range(8)}
        for arm in arms
    }
    config = StudyConfig(
        name="s", base="base.yaml", arms=[ArmConfig(name=arm) for arm in arms], seeds=[*range(8)]
    )
    return StudyData(
        config=config,
        facts=StudyFacts(arms=[], state="done"),
        runs=[],
        scores=values,
        tuning_scores={},
        curves={},
        strangers=[],
    )


def test_the_rule_wants_every_one_of_against_and_the_right_side(tmp_path):
    both = PrimaryConfig(arm="pear", against=["sft", "pear.likelihood_only"])
    _, said, _ = said_of(make_study(tmp_path / "a", made=registered(both)))
    assert "does not hold" in said[0]
    assert "Found: above sft" in said[0]
    assert "not told apart from pear.likelihood_only" in said[0]
    below = PrimaryConfig(arm="dft", against=["sft"])
    _, said, _ = said_of(make_study(tmp_path / "b", made=registered(below)))
    assert "does not hold" in said[0]
    assert "Found: below sft (-0.1" in said[0]


@pytest.mark.parametrize(
    ("made", "first"),
    [
        (Made(primary=PRIMARY), "The primary comparison, which was not registered and so is"),
        (Made(), "Exploratory: the study names no primary comparison"),
        (
            registered(PRIMARY, changed=["seeds were [0, 1], now [0, 1, 2]"]),
            "The comparison, changed since it was registered and so exploratory, holds",
        ),
        (
            registered(
                PRIMARY,
                registration=RegistrationFacts(time=2.0, first_rl_time=1.0, content_hash="x"),
            ),
            "The comparison, registered only after RL had begun and so exploratory, holds",
        ),
    ],
)
def test_what_was_not_written_down_before_is_exploratory(tmp_path, made, first):
    folder = make_study(tmp_path / "s", made=made)
    _, said, noted = said_of(folder)
    assert said[0].startswith(first)
    assert ("Changed since registration: seeds were [0, 1], now [0, 1, 2]." in noted) == bool(
        made.changed
    )


@pytest.mark.parametrize("primary", [None, PRIMARY])
def test_four_seeds_carry_nothing_and_the_first_line_says_so(tmp_path, primary):
    folder = make_study(tmp_path / "s", made=Made(seeds=range(4), primary=primary, logs=False))
    found, said, _ = said_of(folder)
    first = "Too few seeds for any claim: 4 give p >= 0.125, whatever the scores"
    assert said[0].startswith(f"{first}; p <= 0.05 takes at least 6.")
    page = write_study_report(folder)
    verdict_on_page = words_of(page).partition("state done")[2]
    assert verdict_on_page.strip().startswith(first)
    assert (folder / "summary.md").read_text().splitlines()[2].startswith(f"**{first}")
    assert first in text_of(folder).splitlines()[1]
    # and no sentence or table claims a difference all the same
    assert not any(
        each.is_apart(found.alpha) for table in found.tables for each in table.comparisons
    )
    told = re.findall(r"is (above|below) ", words_of(page))
    assert told == []
    assert not any(each.is_apart for each in found.reversals)


def test_one_seed_has_no_interval(tmp_path):
    folder = make_study(tmp_path / "s", (SFT, PEAR), Made(seeds=[3]))
    _, said, _ = said_of(folder)
    assert said[0].startswith("Too few seeds for any claim: 1 gives p >= 1, whatever the scores")
    assert "(one seed), p = 1.000; n = 1" in " ".join(said)
    page = words_of(write_study_report(folder))
    after, before = (row(study_numbers(folder), arm).after.value for arm in ("pear", "sft"))
    assert f"{after - before:+.3f} (one seed)" in page
    assert not re.search(r"[+-]0\.\d+ \[", page)
    assert "No correlations with so few arms" in page


def test_six_seeds_are_not_called_too_few(tmp_path):
    _, said, _ = said_of(make_study(tmp_path / "s", (SFT, PEAR), Made(seeds=range(6))))
    assert not any("Too few" in sentence for sentence in said)
    assert "above sft" in " ".join(said)


def test_so_many_comparisons_that_no_corrected_p_can_hold(tmp_path):
    arms = (*ARMS, MEAN_ONE, NONE)  # 7 with sft: 7 x 2 / 2^7 > .05
    found, said, _ = said_of(make_study(tmp_path / "s", arms, Made(seeds=range(7), logs=False)))
    assert any(s.startswith("Corrected for 7 comparisons, 7 seeds cannot tell") for s in said)
    assert "that takes 9" in " ".join(said)  # 7 x 2 / 2^8 is above .05, of 2^9 below
    pear = row(found, "pear").versus_after
    assert pear.is_apart(found.alpha)
    assert not pear.is_apart_in_family(found.alpha)
    assert "apart only if taken alone" in " ".join(said)
    page = words_of(write_study_report(tmp_path / "s"))
    assert "only alone: above" in page


def test_the_reversal_is_said_and_counted_by_hand(tmp_path):
    folder = make_study(tmp_path / "s", made=Made(logs=False))
    found, said, _ = said_of(folder)
    reversal = next(sentence for sentence in said if sentence.startswith("Reversal"))
    assert reversal.startswith("Reversal: dft is 1st of 6 before RL and 6th after.")
    assert "Before RL it is above sft: +0.1" in reversal
    assert "after RL it is below sft: -0.1" in reversal
    assert {each.arm for each in found.reversals if each.is_apart} == {"dft"}
    assert "dft is 1st of 6 before RL and 6th after" in words_of(write_study_report(folder))


def test_means_that_change_order_by_chance_are_no_reversal(tmp_path):
    twin = MadeArm("twin", 0.302, 0.698, objective="p_family")
    found, said, _ = said_of(make_study(tmp_path / "s", (SFT, twin)))
    assert not any(each.is_apart for each in found.reversals)
    assert not any(sentence.startswith("Reversal") for sentence in said)


def test_a_partial_study_has_a_page_that_says_so(tmp_path):
    pending = [(arm.name, seed) for arm in ARMS for seed in (6, 7)] + [("pear", 5), ("dft", 5)]
    made = registered(PRIMARY, state="running", pending=pending)
    folder = make_study(tmp_path / "s", made=made)
    found, said, _ = said_of(folder)
    assert said[0].startswith("Too few seeds for any claim: 5 give p >= 0.0625")
    assert "(8 are planned)" in said[0]
    assert said[1].startswith("The study is running: 34 of 48 runs are done.")
    assert "is not judged before all its runs have ended" in said[2]
    assert "n = 5 of 8, the seeds that both have" in said[2]
    assert found.primary.outcome == "open"
    assert "34 of 48 runs done" in words_of(write_study_report(folder))


def test_a_study_cut_short_by_its_budget_is_not_judged(tmp_path):
    made = registered(PRIMARY, state="stopped", not_run=[("pear", 7), ("sft", 7)])
    _, said, noted = said_of(make_study(tmp_path / "s", made=made))
    assert said[0].startswith("The study was stopped: 46 of 48 runs are done.")
    assert "is not judged before all its runs have ended" in said[1]
    assert noted == ["2 runs not started: the budget of 10 tokens was used up."]


def test_before_the_first_run_there_is_a_page_too(tmp_path):
    everything = [(arm.name, seed) for arm in ARMS for seed in range(8)]
    folder = make_study(tmp_path / "s", made=Made(state="running", pending=everything))
    for table in (folder / "results").iterdir():
        table.unlink()
    page = words_of(write_study_report(folder))
    assert "Nothing can be claimed yet: no seed has a score after RL of two arms" in page
    assert "0 of 48 runs done" in text_of(folder)


def test_failed_runs_are_named_and_the_rest_is_paired(tmp_path):
    made = registered(PRIMARY, failed=[("pear", 2), ("dft", 2), ("dft", 3)])
    folder = make_study(tmp_path / "s", made=made)
    found, said, noted = said_of(folder)
    failed = "dft seed 2, dft seed 3 and pear seed 2"
    rest = "comparisons are over the seeds that both arms have"
    assert noted == [f"3 runs failed: {failed}; {rest}."]
    versus = row(found, "pear").versus_after
    assert (versus.seeds, versus.missing) == ([0, 1, 3, 4, 5, 6, 7], [2])
    assert versus.difference.p == 2 / 128
    assert "n = 7 of 8, the seeds that both have" in said[0]
    assert "The registered comparison holds" in said[0]  # all its runs have ended
    page = words_of(write_study_report(folder))
    assert "EngineError: the engine ran out of memory" in page
    reward = next(each for each in found.curves if each.metric == "rl/reward/mean")
    curve = next(each for each in reward.arms if each.arm == "dft")
    assert curve.seeds == [0, 1, 4, 5, 6, 7]  # not the half curves of failed runs
    assert curve.steps[-1] == 30


def test_controls_say_what_the_weights_are_shown_to_do(tmp_path):
    arms = (*ARMS, MEAN_ONE)
    folder = make_study(tmp_path / "s", arms, Made(logs=False))
    found = study_numbers(folder)
    pairs = [(each.arm, each.against) for each in found.controls]
    # of the same scale only: the rescaled arm has no control here
    assert pairs == [("pear", "pear.shuffled"), ("pear", "pear.likelihood_only")]
    assert [(each.arm, each.against) for each in found.rescaled] == [("pear.mean_one", "pear")]
    page = words_of(write_study_report(folder))
    assert "pear is above pear.shuffled: +0.09" in page
    assert "So which token or sequence gets which weight matters" in page
    assert "pear is not told apart from pear.likelihood_only" in page
    assert "So the policy's own likelihood, without a teacher, is not shown to be worse." in page


def test_every_suite_and_pass_at_k_has_its_table(tmp_path):
    found = study_numbers(make_study(tmp_path / "s"))
    assert [(table.suite, table.metric) for table in found.tables] == [
        *(("main", "pass_at_1"), ("main", "pass_at_8")),
        *(("shifted", "pass_at_1"), ("shifted", "pass_at_8")),
    ]


def test_without_sft_the_base_is_what_rl_begins_with(tmp_path):
    found = study_numbers(make_study(tmp_path / "s", (SFT, NONE)))
    assert row(found, "none").before.value == pytest.approx(0.10, abs=0.06)
    assert found.baseline == "sft"


def test_without_a_uniform_arm_the_first_stands_in_and_the_page_says_so(tmp_path):
    found, _, noted = said_of(make_study(tmp_path / "s", (DFT, PEAR)))
    assert (found.baseline, found.baseline_is_uniform) == ("dft", False)
    assert any(each.startswith("No arm is plain SFT") for each in noted)


def test_a_rate_at_the_end_of_the_range_is_warned_of(tmp_path):
    made = Made(rates=[3e-4, 1e-3, 3e-3], chosen={"sft": 3e-3, "pear": 1e-3})
    folder = make_study(tmp_path / "s", (SFT, PEAR), made)
    found, said, _ = said_of(folder)
    assert {each.arm: each.is_at_end for each in found.tuning} == {"sft": True, "pear": False}
    assert any(s.startswith("The learning rate chosen for sft is at the end") for s in said)
    # tuning seeds are in no score
    assert row(found, "sft").after.seeds == list(range(8))
    assert found.runs.planned == found.runs.done == 16


def test_predictors_say_over_what(tmp_path):
    found = study_numbers(make_study(tmp_path / "s"))
    by_name = {each.metric: each for each in found.predictors}
    assert by_name["pass_at_1"].num_arms == 6
    assert by_name["pass_at_1"].within_seeds.seeds == list(range(8))
    assert by_name["entropy"].over_arms == pytest.approx(
        -by_name["mean_length"].over_arms
    )  # one falls with the score as the other rises
    assert "update/relative_sft_norm" in by_name
    assert "update/relative_rl_norm" not in by_name  # known only after RL


def test_power_is_of_the_paired_sd(tmp_path):
    found = study_numbers(make_study(tmp_path / "s"))
    pear = next(each for each in found.power if each.arm == "pear")
    # seeds shift both arms alike: what is left is twice the variance of .01
    assert pear.sd == pytest.approx(0.014, abs=0.006)
    assert pear.needed == {"0.05": 6, "0.03": 6}
    assert pear.detectable < 0.03


def test_json_has_what_the_page_says(tmp_path):
    folder = make_study(tmp_path / "s", made=registered(PRIMARY))
    page = write_study_report(folder)
    tree = json.loads((folder / "results.json").read_text())
    assert tree["verdict"] == verdict(study_numbers(folder))
    assert all(sentence in words_of(page) for sentence in tree["verdict"])
    assert tree["numbers"]["primary"]["outcome"] == "holds"
    assert tree["numbers"]["tables"][0]["arms"][2]["versus_after"]["difference"]["num_pairs"] == 8
    summary = (folder / "summary.md").read_text()
    assert all(sentence in summary for sentence in tree["verdict"])
    # every row of a Markdown table has as many cells as its head
    for block in re.findall(r"(?:^\|.*\n)+", summary, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    again = {name: (folder / name).read_bytes() for name in ("summary.md", "results.json")}
    write_study_report(folder)
    assert again == {name: (folder / name).read_bytes() for name in again}


def test_what_a_run_says_is_never_markup(tmp_path):
    evil = dataclasses.replace(NULL, name="a_b")
    folder = make_study(tmp_path / "s", (SFT, evil), Made(failed=[("a_b", 1)]))
    facts = (
        (folder / FACTS_FILE)
        .read_text()
        .replace(
            '"changed_since_registration": []',
            '"changed_since_registration": ["<script>x</script>"]',
        )
    )
    (folder / FACTS_FILE).write_text(facts)
    assert "<script>" not in write_study_report(folder).read_text()


def test_what_the_study_no_longer_has_is_left_out_and_named(tmp_path):
    folder = make_study(tmp_path / "s", (SFT, PEAR, NULL))
    config = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(config.replace("- 7\n", ""))
    found, _, noted = said_of(folder)
    assert found.seeds == list(range(7))
    assert row(found, "pear").versus_after.seeds == list(range(7))
    left_out = "null seed 7, pear seed 7 and sft seed 7"
    assert noted == [f"Left out, because the study no longer has them: {left_out}."]


def test_what_is_no_study_is_one_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match="no folder of a study"):
        write_study_report(tmp_path)
    folder = make_study(tmp_path / "s", (SFT, SHUFFLED, LIKELIHOOD))
    (folder / "study.yaml").write_text("name: s\nseeds: []\n")
    with pytest.raises(ArtifactError, match="not a study of this version"):
        study_numbers(folder)
    (folder / "study.yaml").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        study_numbers(folder)

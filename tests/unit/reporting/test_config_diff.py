"""Which settings tell runs apart, by hand."""

from pear_ray.reporting.comparison.config_diff import SHOWN_CHARS, differing_settings, shortened


def tree(**sft):
    settings = {"optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0}, "negatives": None}
    settings |= {"objective": {"kind": "nll"}, "reduction": "token_mean"}
    return {"name": "any", "seed": 0, "sft": settings | sft, "telemetry": {"trackers": []}}


def words(*trees):
    return {setting.key: setting.words for setting in differing_settings(trees)}


def test_alike_runs_differ_in_nothing_whatever_their_names():
    other = tree() | {"name": "other", "output_dir": "/far", "telemetry": {"trackers": ["wandb"]}}
    assert words(tree(), other) == {}


def test_a_setting_deep_inside_is_named_as_an_override_would():
    other = tree(optimizer={"learning_rate": 3e-4, "weight_decay": 0.0})
    assert words(tree(), other, tree()) == {
        "sft.optimizer.learning_rate": ["0.001", "0.0003", "0.001"]
    }
    (setting,) = differing_settings([tree(), other])
    assert setting.values == [1e-3, 3e-4]


def test_a_choice_is_one_setting_that_shows_what_tells_its_own_kind_apart():
    def psft(high):
        return tree(objective={"kind": "psft", "clip_low": 0.2, "clip_high": high})

    assert words(tree(), psft(0.3)) == {"sft.objective": ["nll", "psft"]}
    assert words(tree(), psft(0.3), psft(0.5)) == {
        "sft.objective": ["nll", "psft (clip_high 0.3)", "psft (clip_high 0.5)"]
    }
    # where all runs made the same choice, its settings are settings like any
    assert words(psft(0.3), psft(0.5)) == {"sft.objective.clip_high": ["0.3", "0.5"]}


def test_a_section_that_only_some_runs_have_shows_all_of_itself():
    negatives = {"scale": 0.1, "logprob_floor": -5.0}
    assert words(tree(), tree(negatives=negatives)) == {
        "sft.negatives": ["none", "scale 0.1, logprob_floor -5"]
    }


def test_a_setting_that_an_older_config_does_not_have_is_told_from_one_that_is_none():
    older, newer = tree(), tree(ema_decay=None)
    assert words(older, newer) == {"sft.ema_decay": ["-", "none"]}
    (setting,) = differing_settings([older, tree(ema_decay=0.9)])
    assert setting.values == [None, 0.9]


def test_settings_come_in_the_order_of_the_configs():
    other = tree(reduction="sum", objective={"kind": "dft"}) | {"seed": 1}
    assert list(words(tree(), other)) == ["seed", "sft.objective", "sft.reduction"]


def test_truth_values_and_long_values_are_readable():
    one = tree() | {"check": True, "games": [{"name": "a" * 100}]}
    other = tree() | {"check": False, "games": [{"name": "b" * 100}]}
    found = words(one, other)
    assert found["check"] == ["true", "false"]
    assert all(len(text) < SHOWN_CHARS and "…" in text for text in found["games"])
    assert found["games"][0].startswith('[{"name": "aaa')
    assert shortened("/data/corpora/a.jsonl") == "/data/corpora/a.jsonl"

"""YAML is read by its 1.2 rules, and twice-written keys are refused."""

import pytest

from pear_ray.config.yaml12 import YamlError, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("1e-5", 1e-5),
        ("-.5", -0.5),
        ("1e3", 1000.0),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-24", "2026-11-24"),
        ("null", None),
        ("", None),
        ("~", None),
        ("[1, on, 2.5]", [1, "on", 2.5]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ('"1e-5"', "1e-5"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x: {a: 1, a: 1}"])
def test_a_key_written_twice_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(YamlError, match="'a' is set twice"):
        parse(text)


def test_no_python_objects() -> None:
    with pytest.raises(YamlError):
        parse("!!python/object/apply:os.getcwd []")

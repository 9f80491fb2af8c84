"""YAML that stays what was written: one value a key, text as text, and no file that explodes."""

import math

import pytest
import yaml

from cluster.configuration.config import resolve, validate
from cluster.configuration.plain_yaml import YamlError, as_text, as_value, parse, parse_word
from cluster.configuration.trees import ConfigError, load_tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("010", 10),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0.90", 0.9),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("25921e05", 2592100000.0),
        (".inf", math.inf),
        ("true", True),
        ("no", False),
        ("On", True),
        ("FALSE", False),
        ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"),
        ("e5", "e5"),
        ("1e", "1e"),
    ],
)
def test_a_plain_scalar_is_text_or_a_value_as_it_is_wanted(text, value):
    (found,) = parse(f"- {text}")
    assert (as_value(found), type(as_value(found))) == (value, type(value))
    assert as_text(found) == text
    (quoted,) = parse(f"- '{text}'")
    assert (as_value(quoted), as_text(quoted)) == (text, text)


@pytest.mark.parametrize(
    "text",
    [
        "25921e05",
        "0123456",
        "2024-01-01",
        "yes",
        "1_0",
        "0x10",
        "12:30",
        "#5",
        "wip #2",
        "a: b",
        "*",
        "- x",
        "'",
    ],
)
def test_a_tag_is_what_was_typed(text):
    config = resolve("quickstart", [f"tracking.tags.x={text}"])
    assert config.tracking.tags["x"] == text
    assert validate(yaml.safe_load(yaml.safe_dump(config.dump()))) == config


def test_text_in_lists_and_files_is_what_was_written(tmp_path):
    assert resolve("quickstart", ["data.exclude_classes=[yes,no,on,1e3,007]"]).data.exclude_classes == (
        "yes",
        "no",
        "on",
        "1e3",
        "007",
    )
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: quickstart\n"
        "tracking: {enabled: no, experiment: 2024-05, tags: {on: off, 7: 1_0}}\n"
        "label: {zone: 1}\n"
        "model: {name: small_cnn, norm: group, channels: [4, 6], hidden: 1_6}\n"
        "local: {lr: 1e-3}\n"
    )
    config = resolve(file)
    assert config.tracking.enabled is False
    assert (config.tracking.experiment, config.tracking.tags) == ("2024-05", {"on": "off", "7": "1_0"})
    assert config.label == {"zone": "1"}
    assert config.model.options["hidden"] == 16
    assert type(config.model.options["hidden"]) is int
    assert config.local.lr == 0.001
    config = resolve("quickstart", [f"model.name={__name__}:own", "model.bias=no"])
    assert config.model.options == {"bias": False}


def own(*, input_shape, classes, bias=True):
    """A model of one's own."""


def test_quotes_and_brackets_of_an_override_are_yaml():
    assert parse_word("'25921e05'") == "25921e05"
    assert as_text(parse_word("[a, 'b c', 1e2]")) == ["a", "b c", "1e2"]
    assert as_value(parse_word("{low: 1, log: yes}")) == {"low": 1, "log": True}
    assert parse_word("null") is parse_word("") is None
    with pytest.raises(ConfigError, match=r"cohort: '\[1' is not a YAML value"):
        resolve("quickstart", ["cohort=[1"])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"rounds: 3\nlocal: {lr: 1}\nrounds: 4\n", "line 3: rounds stands there twice, first in line 1"),
        (b"local:\n  lr: 1\n  epochs: 2\n  lr: 2\n", "line 4: lr stands there twice, first in line 2"),
        (b"tracking: {tags: {a: 1, a: 2}}", "line 1: a stands there twice"),
        (BOMB.encode(), "111,111 values, most of them by aliases"),
        (b"a: &a\n  b: *a\n", "an alias that stands for what it lies in"),
        (b"a: \xe9t\xe9\n", "not UTF-8 text"),
        (b"a: 1\x00", "not UTF-8 text"),
        (b"local:\n\tlr: 1\n", "line 2, column 1: .*; indent with blanks, not with tabs"),
        (b"", "expected keys and values, found nothing"),
        (b"# nothing yet\n", "expected keys and values, found nothing"),
        (b"- 1\n- 2\n", "expected keys and values, found a list"),
        (b"just words", "expected keys and values, found a single value"),
        (b"a: 1\n---\nb: 2\n", "line 2, column 1: a second document"),
        (b"a: " + b"[" * 5000, "nest"),
        (b"? [a, b]\n: 1\n", "a key is a word, found a list"),
        (b"a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (b"extends: 5", r"extends: expected presets or files, found 5"),
        (b"extends: {a: 1}", "extends: expected presets or files"),
        (b"extends: [quickstart, no]", "no: neither a file nor a preset"),
    ],
)
def test_a_file_that_says_nothing_clear_is_one_line(tmp_path, content, says):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refused:
        load_tree(file)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read_and_circles(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_tree(tmp_path / "here")
    (tmp_path / "here" / "a.yaml").write_text("extends: ../here/b.yaml")
    (tmp_path / "here" / "b.yaml").write_text("extends: ../here/a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_tree(tmp_path / "here" / "a.yaml")
    with pytest.raises(ConfigError, match="at most 255 bytes"):
        load_tree("x" * 300)
    with pytest.raises(ConfigError, match="zero byte"):
        load_tree("x\0y")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path, encoding):
    (tmp_path / "mine.yaml").write_text("rounds: 3\ntracking: {tags: {who: Zoë}}\n", encoding=encoding)
    assert load_tree(tmp_path / "mine.yaml") == {"rounds": 3, "tracking": {"tags": {"who": "Zoë"}}}


def test_aliases_and_merge_keys_of_a_sane_size_work():
    tree = parse("base: &base {lr: 0.1, epochs: 2}\nlocal: {<<: *base, epochs: 3}\nagain: *base\n")
    assert tree["local"] == {"lr": 0.1, "epochs": 3}
    assert tree["again"] == {"lr": 0.1, "epochs": 2}
    with pytest.raises(YamlError, match="twice"):
        parse("local: {<<: {lr: 1}, lr: 2, lr: 3}")


@pytest.mark.parametrize("override", ["rounds.=3", ".rounds=3", "local..lr=1", "=3", "rounds"])
def test_a_key_with_an_empty_part_is_no_key(override):
    with pytest.raises(ConfigError, match="is not an override"):
        resolve("quickstart", [override])

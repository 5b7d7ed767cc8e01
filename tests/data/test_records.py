r"""A template reaches no further than the keys of a record, and says where it is wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.records import BadValue, Kind, ReadOptions, parse_template, texts_of
from megatron_aquila.errors import ConfigError


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"{title}\n{content}", "T\nC"),
        ("{title}", "T"),
        (r"\t{{{title}}} \\n {内容}{title}\{\}", "\t{T} \\n 三T{}"),
        ("# {two words-x}\n\n", "# W\n\n"),
    ],
)
def test_templates(source: str, text: str) -> None:
    record = {"title": "T", "content": "C", "内容": "三", "two words-x": "W"}
    assert texts_of(ReadOptions(template=parse_template(source)))(record) == (text,)


@settings(max_examples=30)
@given(st.text(max_size=20), st.text(max_size=20))
def test_literals_are_themselves(before: str, value: str) -> None:
    escaped = before.replace("\\", r"\\").replace("{", "{{").replace("}", "}}")
    template = parse_template(escaped + "{x}")
    assert template.join([value]) == before + value


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{title", "'{' at character 1 stands alone"),
        ("{a} b}", "'}' at character 6 stands alone"),
        ("{a}\\", r"'\\\\' at character 4 stands alone"),
        (r"{a}\q", r"'\\\\q' at character 4 stands alone"),
        ("{}", "'{}' is no plain key"),
        ("{a.__class__}", "'{a.__class__}' is no plain key"),
        ("{a[0]}", r"'{a\[0\]}' is no plain key"),
        ("{a!r}", "'{a!r}' is no plain key"),
        ("{a:>9}", "'{a:>9}' is no plain key"),
        ("{{title}}", "it has no field"),
    ],
)
def test_templates_that_are_wrong(source: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^--text-template .*{why}"):
        parse_template(source)


def test_a_template_needs_its_keys() -> None:
    texts = texts_of(ReadOptions(template=parse_template("{title} {content}"), keys=("ignored",)))
    for record, kind in (({"title": "T"}, Kind.MISSING_KEY), ({"title": "T", "content": None}, Kind.NULL)):
        with pytest.raises(BadValue) as caught:
            texts(record)
        assert caught.value.kind is kind

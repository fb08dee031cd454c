"""The page as text: hostile names and captions stay text, nothing is loaded from elsewhere, files go where the user said."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.errors import OutputError
from pipeline.ledger.takedowns import record_takedown
from pipeline.report.collect import collect
from pipeline.report.page import CHECKS, page_of, visible
from pipeline.report.pictures import Pictures
from pipeline.report.written import page_path, store_report, stored_page, write_report
from tests.pipeline.latent_clips import local_store
from tests.report.conftest import WITHOUT_PICTURES
from tests.report.outputs import SCRIPT, TURNED, add_shard, publish, source


class Elements(HTMLParser):
    """Tags with their attributes, the text of scripts, and all other text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def page(report):
    return page_of(report, Pictures()).decode()


def test_hostile_text_stays_text(page):
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == len(elements.scripts) == 2
    assert "img" not in {tag for tag, _ in elements.tags}
    assert not [name for _, attrs in elements.tags for name in attrs if name.startswith("on")]
    assert SCRIPT in elements.text  # the name of the output and the message of a reject, as text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x1b]", page)
    assert TURNED.replace("\u202e", "\\u202e") in elements.text
    columns = {column["name"]: column for column in json.loads(elements.scripts[0])}
    assert {len(column["cells"]) for column in columns.values()} == {10}
    assert columns["source"]["values"] == ["s3://corpus/shard-000.tar", "s3://corpus/shard-001.tar"]
    captions = columns["caption"]["cells"]
    assert SCRIPT in captions
    assert "<" not in elements.scripts[0]
    assert "{{ 7 * 7 }}{% raw %}" in captions
    assert "\\x1b[31mred\\x00" in captions
    assert len(page) < 200_000  # although a caption has 16 MB


def test_the_page_loads_nothing(page):
    elements = Elements(page)
    places = [attrs[name] for _, attrs in elements.tags for name in ("src", "href", "action", "data") if name in attrs]
    assert places
    assert [place for place in places if not place.startswith(("#", "data:image/webp;"))] == []
    (policy,) = (attrs["content"] for tag, attrs in elements.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; connect-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_sections_have_headings_and_images_have_names(page):
    elements = Elements(page)
    sections = [attrs for tag, attrs in elements.tags if tag == "section"]
    assert [attrs["id"] for attrs in sections] == ["glance", "left-out", "pictures", "statistics", "changes", "rows"]
    headings = {attrs["id"] for tag, attrs in elements.tags if tag == "h2"}
    assert {attrs["aria-labelledby"] for attrs in sections} == headings
    drawn = [attrs for tag, attrs in elements.tags if tag == "svg"]
    assert len(drawn) == 2 + 3 + 4  # histograms of source videos and of rows, channels
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert "2 of 2 undecodable" in elements.text


def test_every_check_has_a_sentence(page, report):
    names = {check["name"] for check in report.checks}
    assert {"conservation", "drift"} < names <= CHECKS.keys()
    assert all(CHECKS[name].replace("'", "&#39;") in page for name in names)


def test_a_snapshot_without_rows_has_a_page(tmp_path):
    store = local_store(tmp_path / "out")
    add_shard(store, tmp_path, 0, ())
    publish(store)
    report, pictures = collect(store, 1, StorageConfig())  # with pictures: there is nothing to decode
    elements = Elements(page_of(report, pictures).decode())
    assert (report.rows.total, report.seconds, report.channels) == (0, 0.0, ())
    assert "No row counts, so there are no statistics." in elements.text
    assert "2 of 2 inputs were rejected (100.0%)" in elements.text


def test_the_command_writes_page_and_values(hostile, report, tmp_path):
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", f"{hostile.root}@2", "--html", str(page), "--clips", "0"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == str(page)
    assert "snapshot 2 of" in result.output
    values = json.loads((tmp_path / "page.json").read_bytes())
    expected = json.loads(json.dumps(report.to_dict()))
    assert {name for name in values if values[name] != expected[name]} <= {"made"}
    assert Elements(page.read_text()).scripts


@pytest.mark.parametrize("name", ["page.txt", "s3://bucket/page.html", "missing/page.html"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=f"--html {name}: "):
        page_path(name)
    result = CliRunner().invoke(app, ["report", "nowhere", "--html", name])
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])


def test_pictures_go_into_the_page_or_beside_it(report, tmp_path):
    pictures = Pictures({"channel-0": b"RIFF0000WEBP"})
    write_report(report, pictures, tmp_path / "in.html")
    write_report(report, pictures, tmp_path / "beside.html", assets=True)
    assert not (tmp_path / "in_files").exists()
    assert (tmp_path / "beside_files" / "channel-0.webp").read_bytes() == b"RIFF0000WEBP"


def test_a_stored_page_is_not_shown_after_a_takedown(tmp_path):
    store = local_store(tmp_path / "out")
    add_shard(store, tmp_path, 0, ("kept", "secret"))
    publish(store)
    assert stored_page(store, 1) is None
    place = store_report(store, *collect(store, 1, StorageConfig(), WITHOUT_PICTURES))
    assert place == store.uri("_snapshots/1.html")
    assert b"secret" in stored_page(store, 1)
    record_takedown(store, "asked", samples=[(source(0), "dir/video00001")])
    assert stored_page(store, 1) is None
    store_report(store, *collect(store, 1, StorageConfig(), WITHOUT_PICTURES))
    assert b"secret" not in stored_page(store, 1)


def test_text_that_would_be_shown_as_other_text_is_written_out():
    assert visible("a\u202eb\u2067c\u200fd") == "a\\u202eb\\u2067c\\u200fd"
    assert visible("two\nlines\ttab") == "two lines tab"
    assert visible("\udcff\x07") == "\\xff\\x07"
    assert visible("مرحبا, 你好, 👩‍👩‍👧") == "مرحبا, 你好, 👩‍👩‍👧"
    assert visible(None) == ""

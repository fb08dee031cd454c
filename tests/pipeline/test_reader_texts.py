"""Captions in any encoding and any JSON: text, or none with a warning; never replacement characters, NULs or invalid JSON."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.reader.text_encoding import decode_text
from pipeline.reader.texts import LEVELS, TEXT_BYTES, distinct, parse_caption, parse_metadata
from pipeline.records import Sample
from tests.pipeline.test_reader import pack, read

CAPTIONS = {
    "cp1252": (
        *(
            "it’s a “dog” – running",
            "café à la crème",
            "ein größerer Hund läuft über die Straße",
            "niño corriendo",
        ),
        *("crème brûlée", "Der Mann öffnet die Tür", "São Paulo at night", "naïve façade", "€5 coffee…", "Frühling"),
        *("señor", "smörgåsbord på bordet", "l’été", "20 °C outside", "¿Dónde está el gato?", "Ørsted vindmølle"),
        *("été 2020", "Beyoncé on stage", "Müller & Söhne", "año nuevo", "une fille mange une pêche"),
    ),
    "gb18030": (
        *("一只狗在跑", "一个女人在海边散步", "夜晚的城市街道", "小女孩在公园里玩耍", "一辆红色的汽车", "厨师正在做饭"),
        *(
            "两个人在跳舞, 4k",
            "老人和孩子一起下棋",
            "直升机在城市上空飞行,镜头缓慢拉远",
            "微距镜头:蜜蜂采蜜",
            "他在打篮球",
        ),
        *("蓝天白云下的草原", "特写:咖啡倒入杯中", "婴儿在睡觉", "一名穿白色衬衫的男子正在讲话", "秋天的落叶"),
        *("上海外滩夜景", "动画风格,少女,长发", "微风吹过麦田", "水下珊瑚礁"),
    ),
    "shift_jis": (
        *(
            "犬が走る",
            "夜の東京の街",
            "女の子が公園で遊んでいる",
            "赤い車が走っている",
            "料理を作る人",
            "海辺を歩く女性",
        ),
        *("電車が駅に入る", "アニメ風の少女", "桜の花が散る", "走る犬 4K", "子供たちが笑っている", "美しい夕日"),
        *("スローモーション", "飛行機の離陸", "祭りの花火", "コーヒーを注ぐ", "青空と白い雲", "パンダが竹を食べる"),
        *("ピアノを弾く男性", "傘をさす人々"),
    ),
    "big5": (
        *("一隻狗在跑", "一個女人在海邊散步", "夜晚的城市街道", "小女孩在公園裡玩耍", "一輛紅色的汽車", "廚師正在做飯"),
        *("他在打籃球", "老人和孩子一起下棋", "高畫質,電影感", "台北的夜市", "直升機飛過城市", "藍天白雲下的草原"),
        *("無人機拍攝的瀑布", "運動員衝過終點線", "嬰兒在睡覺", "熊貓吃竹子", "秋天的落葉", "雨中的傘"),
        *("鋼琴家演奏蕭邦", "香港的街道"),
    ),
    "euc_kr": (
        *("개가 달린다", "바다를 걷는 여자", "밤의 도시 거리", "공원에서 노는 아이", "빨간 자동차", "요리하는 사람"),
        *(
            "기차가 역에 들어온다",
            "두 사람이 춤을 춘다",
            "눈 덮인 산",
            "로봇이 걷는다",
            "웃고 있는 아이들",
            "비행기가 이륙한다",
        ),
        *("서울의 밤", "커피를 마시는 남자", "춤추는 소녀", "커피를 따르는 손", "파란 하늘과 흰 구름", "드론 촬영"),
        *("고양이가 소파에서 잔다", "한복을 입은 여인"),
    ),
    "cp1251": ("Собака бежит по пляжу", "кот", "ночной город", "Київ вночі", "Медведь ест мёд"),
    "koi8_r": ("Собака бежит по пляжу", "ночной город", "девочка играет в парке"),
    "cp1250": ("pies biegnie po plaży", "kobieta idzie wzdłuż brzegu", "Český pes běží", "dívka si hraje v parku"),
    "cp1253": ("σκύλος τρέχει στην παραλία",),
    "cp1254": ("köpek sahilde koşuyor", "güneş batıyor"),
    "cp1255": ("אישה הולכת",),
    "euc_jp": ("犬が走る", "夜の東京の街", "アニメ風の少女"),
}
TEXTS = [text for texts in CAPTIONS.values() for text in texts]


@pytest.mark.parametrize("encoding", CAPTIONS)
def test_a_short_caption_is_read_in_its_encoding_with_a_warning(encoding: str) -> None:
    for text in CAPTIONS[encoding]:
        caption = parse_caption(text.encode(encoding))
        assert caption.text == text, caption
        assert [warning.partition(":")[0] for warning in caption.warnings] == ["caption_encoding"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-marked-be"])
def test_unicode_with_a_mark_is_never_a_guess(encoding: str) -> None:
    for text in (*TEXTS, "plain", "🐕 runs 👨‍👩‍👧", "x"):
        data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-marked-be" else text.encode(encoding)
        assert parse_caption(data) == parse_caption(text.encode()), text
        assert parse_caption(data).warnings == ()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_unicode_without_a_mark_is_detected_by_its_zero_bytes(encoding: str) -> None:
    latin = [
        *CAPTIONS["cp1252"],
        "a dog runs",
        "a dog 狗 runs",
        "Собака бежит по пляжу",
        "犬が走る",
        "一只狗在跑",
        "개가 달린다",
    ]
    for text in latin:
        assert parse_caption(text.encode(encoding)).text == text


def test_bytes_that_are_not_text_give_no_caption_and_a_warning() -> None:
    for data in (
        b"\xff\xfea",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        "gr\u00f6\u00dfer".encode()[:-4] + b"\xff\xfe",
        b"\xb0" * 3,
    ):
        caption = parse_caption(data)
        assert caption.text is None or "\ufffd" not in caption.text
        assert caption.warnings, data
    assert parse_caption(b"x" * (TEXT_BYTES + 1)).warnings == ("oversized_caption",)
    for blank in (b"", b" \n ", b"\0\0\0", b"\xff\xfe", b"\xef\xbb\xbf"):
        assert parse_caption(blank) == parse_caption(b"")


def test_control_characters_are_removed() -> None:
    assert parse_caption(b"a dog\x00 runs\x00\x00").text == "a dog runs"
    assert parse_caption(b"\x00one\x07\ttwo\r\nthree\x7f\xc2\x85 ").text == "one\ttwo\r\nthree"
    replaced = parse_caption("caf\ufffd".encode())
    assert (replaced.text, replaced.warnings) == ("caf", ("replacement_characters",))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=20).map(lambda text: text.encode("utf-16", "surrogatepass"))))
@example(b"dog\0\0\0\0\0")
@example(b"\xff\xfe\0\0")
def test_any_bytes_give_storable_text_or_none(data: bytes) -> None:
    caption = parse_caption(data)
    assert caption.text is None or (caption.text.strip() and not {"\0", "\ufffd"} & set(caption.text))
    assert caption.text is None or caption.text.encode()
    try:
        text = data.decode().replace("\0", "").strip()
    except UnicodeDecodeError:
        return
    assert caption.text or not text.isprintable() or not text or "\0" in data.decode() or caption.warnings


def test_long_texts_are_decoded_in_bounded_time() -> None:
    for text, encoding in (("größere Hunde ", "cp1252"), ("一只狗在跑，", "gb18030"), ("犬が走る。", "shift_jis")):
        long = text * (1_000_000 // len(text))
        assert parse_caption(long.encode(encoding)).text == long.strip()
    assert decode_text(b"a" * 1_000_000 + b" caf\xe9").text.endswith(" café")


# --- json -----------------------------------------------------------------------------------------------------------------


def strict(value: dict[str, Any]) -> str:
    """The column as written, checked by two readers that accept only standard JSON."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False)
    assert duckdb.connect().execute("select json_valid(?)", [text]).fetchall() == [(True,)]
    json.dumps(json.loads(text), ensure_ascii=False).encode()  # no half of a surrogate pair
    return text


def test_nonstandard_json_numbers_become_null_or_text() -> None:
    found = parse_metadata(b'{"a": NaN, "b": [Infinity, -Infinity, 1e999, 2.5], "c": 18446744073709551616, "d": -7}')
    assert found.values == {"a": None, "b": [None, None, None, 2.5], "c": "18446744073709551616", "d": -7}
    assert found.warnings == ("huge_integers", "nonfinite_metadata")
    digits = b"9" * 5000
    assert parse_metadata(b'{"n": %s}' % digits).values == {"n": digits.decode()}
    strict(found.values)


def test_strings_that_cannot_be_stored_are_escaped() -> None:
    found = parse_metadata(rb'{"caption": "half \ud800 pair\u0000", "k\ud800": "x\u0000y", "emoji": "\ud83d\ude00"}')
    assert found.caption.text == "half  pair"
    assert found.values == {"caption": "half \\ud800 pair", "k\\ud800": "xy", "emoji": "😀"}
    strict(found.values)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "gb18030"])
def test_json_is_read_in_the_encodings_of_captions(encoding: str) -> None:
    text = "一只狗在海边的公园里跑" if encoding == "gb18030" else "größer"
    found = parse_metadata(json.dumps({"caption": text, "n": 1}, ensure_ascii=False).encode(encoding))
    assert (found.caption.text, found.values["n"]) == (text, 1)
    guessed = encoding in ("cp1252", "gb18030")
    assert found.warnings == ((f"metadata_encoding:{encoding}",) if guessed else ())


@pytest.mark.parametrize("levels", [LEVELS + 1, 100, 300, 500, 700, 900, 990, 1000, 1100, 5000, 100_000])
@pytest.mark.parametrize("kind", [(b'{"a":', b"}"), (b"[", b"]")])
def test_nesting_is_bounded(levels: int, kind: tuple[bytes, bytes]) -> None:
    inner = kind[0] * (levels - 1) + b"1" + kind[1] * (levels - 1)
    found = parse_metadata(b'{"caption": "words", "a": %s}' % inner)
    assert (found.values, found.warnings) == ({}, ("deep_metadata",))
    if levels < 900:
        assert found.caption.text == "words"
    inner = kind[0] * (LEVELS - 1) + b"1" + kind[1] * (LEVELS - 1)
    assert parse_metadata(b'{"a": %s}' % inner).warnings == ()


def test_refused_json_has_a_warning_with_the_reason() -> None:
    for data, warning in {
        b"{not json": "bad_json",
        b"": "bad_json",
        b"[1, 2]": "json_not_an_object",
        b"1" * 5000: "json_not_an_object",
        b'{"a": "' + b"x" * TEXT_BYTES + b'"}': "oversized_metadata",
        b"\xff\xfe{": "undecodable_metadata",
    }.items():
        assert (parse_metadata(data).values, parse_metadata(data).warnings) == ({}, (warning,))
    assert parse_metadata(b'{"a": 1, "a": 2}').warnings == ("repeated_json_keys",)


def test_a_huge_json_is_not_read_into_memory(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.mp4", b"1"), ("a.json", b'{"a": [' + b"1," * (25 << 20) + b"1]}")])
    tracemalloc.start()
    items, _ = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.warnings for item in items if isinstance(item, Sample)] == [("oversized_metadata",)]
    assert peak < 16 << 20


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(st.characters(), max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_metadata_is_always_strict_json(value: dict[str, Any]) -> None:
    found = parse_metadata(json.dumps(value).encode())
    strict(found.values)
    if "nonfinite_metadata" not in found.warnings:
        assert not any(isinstance(item, float) and not math.isfinite(item) for item in value.values())


def test_metadata_lists_captions_by_name():
    for value, expected in (
        (["one", " ", "two"], (("0", "one"), ("2", "two"))),
        ([{"name": "short", "caption": "s"}, {"text": "t"}], (("short", "s"), ("1", "t"))),
        ({"short": "s", "long": ["l1", "l2"]}, (("short", "s"), ("long", "l1"), ("long", "l2"))),
        ("alone", (("captions", "alone"),)),
        ('["one", "two"]', (("0", "one"), ("1", "two"))),
        ("[laughs] no list", (("captions", "[laughs] no list"),)),
    ):
        found = parse_metadata(json.dumps({"captions": value, "prompt": "p"}).encode())
        assert distinct(found.captions) == (("prompt", "p"), *expected)
        assert found.values["captions"] == value
    assert parse_metadata(b'{"captions": ["a", 3, null, ""]}').warnings == ("unusable_captions:3",)
    many = parse_metadata(json.dumps({"captions": [f"{n}" for n in range(400)]}).encode())
    assert (len(many.captions), many.warnings) == (256, ("unusable_captions:144",))
    nan = parse_metadata(b'{"captions": ["a"], "score": NaN}')
    assert (nan.values, nan.caption.text) == ({"captions": ["a"], "score": None}, "a")

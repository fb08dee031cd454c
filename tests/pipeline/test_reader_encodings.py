"""Captions of 40 languages in the encodings they are written in: read rightly or not at all, never as other letters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.reader import letter_statistics, text_encoding
from pipeline.reader.text_encoding import decode_text
from pipeline.reader.texts import parse_caption

# Language: encodings that it is written in, captions.
CAPTIONS = {
    language: (entry["encodings"], entry["captions"])
    for language, entry in json.loads(Path(__file__).with_name("captions_by_language.json").read_text()).items()
}
# One foreign word, one symbol.
ENGLISH = (
    "A waiter carries two cups of coffee out of a café",
    "naïve painting of a village",
    "She says “hello” to the camera",
    "a dog’s paw touches the snow",
    "It’s raining – people run for shelter…",
    "the thermometer shows 25 °C",
    "a sign reads €5 per kilo",
    "add ½ cup of flour and stir slowly",
    "A chef torches the top of a crème brûlée in close-up",
    "Beyoncé sings in front of a crowd in São Paulo",
    "a jalapeño is sliced on a wooden board",
    "tourists climb the steps of Machu Picchu at 2,430 m • drone shot",
    "The Škoda turns left at the roundabout",
    "fiancée and fiancé dance under the lights of a château",
    "Coca-Cola® bottle rotating, studio light",
    "© 2021 Nature Films, all rights reserved",
    "a 4×4 drives through mud",
    "price: £3.50",
    "résumé lying on a desk",
    "Mötley Crüe poster on a garage door",
    "déjà vu: the same cat walks by twice",
    "an El Niño storm hits the coast of Perú",
    "Jürgen throws the ball to his dog",
    "jalapeños, açaí and crème fraîche on a table",
)
WINDOWS = ("cp125", "cp874", "cp93", "cp94", "cp95", "gb")
LONG = 40  # letters


def answers(language):
    """(encoding, caption, what was read) of each caption in each encoding; letters that the encoding lacks are left out."""
    encodings, captions = CAPTIONS[language]
    for encoding in encodings.split():
        for caption in captions:
            data = caption.encode(encoding, "ignore")
            if not data.isascii():
                found = decode_text(data)
                yield encoding, data.decode(encoding), None if found is None else found.text


@pytest.mark.parametrize("language", CAPTIONS)
def test_a_caption_is_read_rightly_or_not_at_all(language):
    found = list(answers(language))
    wrong = [(encoding, text, read) for encoding, text, read in found if read not in (None, text)]
    assert wrong == []
    unread = [(encoding, text) for encoding, text, read in found if read is None]
    assert len(unread) <= 0.3 * len(found), unread
    assert sum(encoding.startswith(WINDOWS) for encoding, _ in unread) <= 1, unread


def test_nearly_all_captions_are_read():
    found = [answer for language in CAPTIONS for answer in answers(language)]
    unread = [(encoding, text) for encoding, text, read in found if read is None]
    assert len(unread) <= 0.05 * len(found), unread
    long = [text for encoding, text in unread if encoding.startswith(WINDOWS) and len(text) >= LONG]
    assert len(long) <= 3, long


@pytest.mark.parametrize("text", ENGLISH)
def test_an_english_caption_with_one_foreign_word_or_symbol_is_read(text):
    caption = parse_caption(text.encode("cp1252"))
    assert caption.text == text, caption
    assert [warning.partition(":")[0] for warning in caption.warnings] == ["caption_encoding"]


@pytest.mark.parametrize(
    "language", ["French", "Hungarian", "Swedish", "Russian", "Greek", "Chinese", "Japanese", "Korean"]
)
def test_long_texts_of_any_length_are_read(language):
    encodings, captions = CAPTIONS[language]
    for encoding in encodings.split():
        text = (" ".join(captions) * 12).encode(encoding, "ignore").decode(encoding)
        for blank in (" ", ""):  # without blanks, the sample ends anywhere
            written = text.replace(" ", blank) if language in ("Chinese", "Japanese") else text
            assert decode_text(written.encode(encoding)).text == written
        assert decode_text(b"a dog runs " * 500 + text.encode(encoding)).text.endswith(text)


def test_letters_at_the_end_of_json_without_blanks_are_found():
    text = '{"tags":"' + "x," * 5000 + '","caption":"Großaufnahme"}'
    assert decode_text(text.encode("cp1252")).text == text
    text = text.replace("Großaufnahme", "一只小狗在跑")
    assert decode_text(text.encode("gb18030")).text == text


def test_the_work_is_bounded_whatever_the_length():
    for text in ("größere Hunde laufen ".encode("cp1252"), "一只狗在跑".encode("gb18030"), b"a\xe9"):
        assert len(text_encoding._sample(text * 100_000)) <= 2 * text_encoding.SAMPLE_BYTES + 1
    for cached in (letter_statistics.word_cost, letter_statistics.character_cost, letter_statistics.is_known):
        assert cached.cache_parameters()["maxsize"]


def test_what_is_as_likely_east_asian_as_of_a_single_byte_encoding_is_not_read():
    assert "às".encode("cp850") == "卻".encode("gb18030")
    assert decode_text("às".encode("cp850")) is None


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("vīrietis", "cp1257"),
        ("puše niz", "iso8859-2"),
        ("începe", "cp852"),
        ("smörgås", "cp1252"),
        ("kahvilassä ", "cp1252"),
    ],
)
def test_latin_words_are_not_chinese_in_utf16(text, encoding):
    found = decode_text(text.encode(encoding))
    assert found is None or found.text == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_read_in_all_scripts(encoding):
    for language in (
        "French",
        "Polish",
        "Russian",
        "Greek",
        "Arabic",
        "Thai",
        "Chinese",
        "Taiwanese",
        "Japanese",
        "Korean",
    ):
        for text in CAPTIONS[language][1]:
            data = text.encode(encoding)
            if data.isascii() and data.decode().isprintable():
                continue  # such bytes may be anything
            assert decode_text(data).text == text


def test_utf16_of_which_all_bytes_are_ascii_is_told_by_its_control_characters():
    data = "一只小狗在跑".encode("utf-16-le")
    assert "你好吗".encode("utf-16-le").isascii()
    assert decode_text(data).text == "一只小狗在跑"
    assert decode_text("你好吗".encode("utf-16-le")).text == "你好吗"
    assert decode_text(b"a dog\x00 runs\x07 home").text == "a dog\x00 runs\x07 home"


def test_spaces_of_arabic_macs_are_spaces():
    text = CAPTIONS["Arabic"][1][3]
    data = text.encode("mac_arabic")
    assert data.count(b"\xa0") == text.count(" ") > 5
    assert decode_text(data).text == text


def test_a_word_of_another_encoding_is_not_a_rare_letter_of_utf8():
    data = "mašīna brauc gar upi".encode("cp775")
    assert data.decode("utf-8") == "maՌna brauc gar upi"
    found = decode_text(data)
    assert found is None or found.text == "mašīna brauc gar upi"


@pytest.mark.parametrize(
    "text", ["the sign ॐ on a wall", "Հայաստան", "ქართული", "नमस्ते दुनिया", "H₂O", "ა", "naïve", "πr²", "🐕 runs"]
)
def test_utf8_stays_utf8(text):
    found = decode_text(text.encode())
    assert (found.text, found.guessed) == (text, False)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("犬が通りを走っている", "iso2022_jp"), ("한국어 자막입니다", "iso2022_kr"), ("一只狗在街上跑", "hz")],
)
def test_encodings_of_seven_bits_are_told_by_their_escapes(text, encoding):
    assert decode_text(text.encode(encoding)).text == text


def test_utf8_that_a_limit_has_cut_loses_its_last_character_only():
    whole = "It’s a dog’s life…"
    for cut in (1, 2):
        assert decode_text(whole.encode()[:-cut]).text == whole[:-1]
    assert decode_text("naïve ~{ text".encode()).text == "naïve ~{ text"
    assert decode_text(b"a ~{ b").text == "a ~{ b"

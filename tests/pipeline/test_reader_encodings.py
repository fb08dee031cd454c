"""Captions of many languages in the encodings they are written in: read rightly, or not at all, never as other letters."""

from __future__ import annotations

import pytest

from pipeline.reader import text_encoding
from pipeline.reader.text_encoding import decode_text

# Captions of a few words, and one of a single word where the language has one that tells nothing away.
CAPTIONS = {
    "Russian": (
        "собака бежит по улице",
        "Мужчина идёт по пляжу на закате",
        "кот",
        "Красный автомобиль едет по мосту, вид сверху. Люди гуляют в парке и разговаривают.",
    ),
    "Ukrainian": (
        "собака біжить вулицею",
        "Чоловік йде пляжем на заході сонця",
    ),
    "Greek": (
        "ένας σκύλος τρέχει στον δρόμο",
        "Ένας άνδρας περπατά στην παραλία",
        "σκύλος",
    ),
    "Hebrew": (
        "כלב",
        "כלב רץ ברחוב",
        "שלום",
        "בוקר טוב",
        "איש הולך על החוף בשקיעה",
        "מכונית אדומה נוסעת על הגשר",
    ),
    "Arabic": (
        "كلب يركض في الشارع",
        "رجل يمشي على الشاطئ",
        "سيارة حمراء",
    ),
    "Thai": (
        "สุนัขวิ่งบนถนน",
        "ผู้ชายเดินบนชายหาด",
    ),
    "French": (
        "un garçon très fatigué marche à côté de l’église",
        "café",
        "Un homme âgé boit du thé près de la fenêtre",
    ),
    "German": (
        "ein Hund läuft über die Straße",
        "Mädchen mit grünem Hut",
    ),
    "Icelandic": (
        "Þetta er hundur",
        "Það er gaman",
        "hundur hleypur á götunni",
    ),
    "Turkish": (
        "köpek sokakta koşuyor",
        "Güneş batarken sahilde yürüyen adam",
    ),
    "Polish": (
        "pies biegnie po ulicy wśród ludzi",
        "Mężczyzna idzie plażą o zachodzie słońca",
    ),
    "Czech": (
        "pes běží po ulici",
        "Muž kráčí po pláži při západu slunce",
    ),
    "Lithuanian": (
        "Ąžuolas šalia ežero",
        "Šuo bėga gatve",
    ),
    "Spanish": (
        "un niño pequeño corre por la montaña",
        "¿Qué está pasando aquí?",
    ),
    "Hungarian": (
        "egy kutya fut az utcán",
        "Piros autó megy a hídon, fölötte kék ég",
    ),
}
# Encodings of each language, and whether its captions of several words must be read in it.
ENCODINGS = {
    "Russian": {"cp1251": True, "koi8-r": True, "cp866": True, "mac_cyrillic": True, "iso8859-5": True},
    "Ukrainian": {"cp1251": True, "koi8-u": True},
    "Greek": {"cp1253": True, "iso8859-7": True, "cp737": True},
    "Hebrew": {"cp1255": True, "iso8859-8": True},
    "Arabic": {"cp1256": True, "iso8859-6": True},
    "Thai": {"cp874": True, "tis-620": True},
    "French": {"cp1252": True, "cp850": False, "cp437": False},
    "German": {"cp1252": True, "cp850": False},
    "Icelandic": {"cp1252": True},
    "Turkish": {"cp1254": True},
    "Polish": {"cp1250": True, "iso8859-2": True},
    "Czech": {"cp1250": True, "iso8859-2": True},
    "Lithuanian": {"cp1257": True},
    "Spanish": {"cp1252": True, "cp850": False},
    "Hungarian": {"cp1250": True, "iso8859-2": True},
}
CASES = [(language, encoding) for language, encodings in ENCODINGS.items() for encoding in encodings]


@pytest.mark.parametrize(("language", "encoding"), CASES)
def test_a_caption_is_read_rightly_or_not_at_all(language, encoding):
    captions = CAPTIONS[language]
    for text in (*captions, " ".join(captions * 12)):
        data = text.replace("’", "'").encode(encoding) if encoding != "cp1252" else text.encode(encoding)
        found = decode_text(data)
        assert found is None or found.text.replace("’", "'") == text.replace("’", "'"), found
        if ENCODINGS[language][encoding] and " " in text and len(text) > 20:
            assert found is not None, text
            assert found.guessed == (not data.isascii())


def test_the_detector_reads_long_texts_in_a_rarer_encoding(monkeypatch):
    text, encoding = " ".join(CAPTIONS["Russian"] * 12), "cp855"
    assert decode_text(text.encode(encoding)).text == text
    monkeypatch.setattr(text_encoding, "_detected", lambda data: None)
    assert decode_text(text.encode(encoding)) is None


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

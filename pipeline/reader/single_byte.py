"""Readings of bytes in encodings of one byte per character, with what they cost.

A reading is the text in one encoding. It is scored in each language that is written in that encoding, by how likely each letter follows the
one before; symbols cost by whether they stand where they usually do. All readings have as many characters, so their costs compare.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from pipeline.reader.letter_statistics import word_cost

WESTERN = (
    "french german spanish portuguese italian dutch swedish danish norwegian finnish icelandic catalan albanian english"
)
CENTRAL = "polish czech slovak hungarian romanian croatian slovene albanian german english"
BALTIC = "lithuanian latvian estonian polish german english"
CYRILLIC = "russian ukrainian bulgarian serbian macedonian belarusian"
# Encodings with their languages, and what a reading in them costs in advance: those of DOS and old Macs are rare today.
ENCODINGS = (
    ("cp1252", 0.0, WESTERN), ("iso8859-15", 2.0, WESTERN), ("cp1250", 1.0, CENTRAL), ("iso8859-2", 2.0, CENTRAL),
    ("iso8859-16", 4.0, "romanian"), ("cp1254", 2.0, "turkish english"), ("cp1257", 2.0, BALTIC), ("iso8859-4", 4.0, BALTIC),
    ("cp1258", 2.0, "vietnamese"),
    ("cp1251", 0.0, CYRILLIC), ("koi8-u", 1.0, "russian ukrainian belarusian"), ("iso8859-5", 2.0, CYRILLIC),
    ("cp1253", 0.0, "greek"), ("iso8859-7", 1.0, "greek"), ("cp1255", 0.0, "hebrew"), ("cp1256", 0.0, "arabic persian"),
    ("iso8859-6", 1.0, "arabic"), ("cp874", 0.0, "thai"), ("cp850", 4.0, WESTERN), ("cp437", 4.0, WESTERN),
    ("cp860", 5.0, "portuguese"), ("cp861", 5.0, "icelandic"), ("cp865", 5.0, "danish norwegian"), ("cp852", 4.0, CENTRAL),
    ("cp857", 4.0, "turkish"), ("cp775", 4.0, BALTIC), ("cp866", 1.0, CYRILLIC), ("cp1125", 3.0, "ukrainian"),
    ("cp855", 4.0, CYRILLIC), ("cp737", 2.0, "greek"), ("cp869", 4.0, "greek"), ("cp862", 3.0, "hebrew"),
    ("mac_roman", 4.0, WESTERN), ("mac_iceland", 5.0, "icelandic"), ("mac_latin2", 4.0, CENTRAL),
    ("mac_croatian", 5.0, "croatian slovene"), ("mac_romanian", 5.0, "romanian"), ("mac_turkish", 4.0, "turkish"),
    ("mac_cyrillic", 3.0, CYRILLIC), ("mac_greek", 4.0, "greek"), ("mac_arabic", 4.0, "arabic"),
)  # fmt: skip
RARE_LANGUAGES = {"albanian": 3.0}  # costs in advance
MARGIN = 8.0  # nats beyond the cheapest reading within which others are of interest
WORST, SLACK = (
    5.2,
    8.0,
)  # mean nats of a pair with a letter beyond ASCII, and nats beyond it; above, the reading is not of the language
FOREIGN_WORD = 2.0  # an English word in another language
SYMBOL_IN_PLACE, RARE_SYMBOL, LONE_QUOTE, JOINING = 4.0, 7.0, 10.0, 10.0
SYMBOL, IN_WORD, LETTER_BEFORE_DIGIT = 14.0, 18.0, 5.0
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0e30-\u0e3a\u0e47-\u0e4e"  # above and below letters
WORD = re.compile(rf"(?:[^\W\d_²³¹½¼¾µ]|[{MARKS}])+")
# Elisions, contractions of English, endings of Turkish names, the Ukrainian and Belarusian sign: where words have an apostrophe.
APOSTROPHE = re.compile(
    r"(?<!\w)(?:[cdjlmnstCDJLMNST]|\w*[qQ]u|un|[Aa]ujourd|[adns]\w{0,3}ll)’[aeiouyhAEIOUYHàáâèéêëìíîïòóôùúûæœÀÁÂÈÉÊÎÔÙŒ]"
    r"|n’t|\w\w’s(?!\w)|(?<!\w)(?:I’(?:m|d|ll|ve)|\w{2,}’(?:d|ll)|(?:[Yy]ou|[Ww]e|[Tt]hey|[Ww]ho)’(?:re|ve)|[oO]’\w|y’a|ma’am)"
    r"|(?<!\w)’(?:n’|(?:em|cause|til|\d0s)(?!\w))|[бпвмфргкд]’[яюєїеё]|(?<!\w)[A-ZÇĞİÖŞÜ]\w+’[dtlny]"
)
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff]")
OPENING, CLOSING = "“„‘‚«‹¿¡", "”“’‘»›…"
PARTNERS = {
    "“": "”„",
    "”": "“„",
    "„": "“”",
    "‚": "‘’",
    "«": "»",
    "»": "«",
    "‹": "›",
    "›": "‹",
    "‘": "’‚",
    "¿": "?",
    "¡": "!",
}


class Reading(NamedTuple):
    """Cost of a text in an encoding; `plausible`: in the most likely language, it looks like text of that language."""

    cost: float
    encoding: str
    text: str
    plausible: bool


def readings(sample: bytes) -> list[Reading]:
    """The cheapest reading of `sample` and those that are up to `MARGIN` dearer; of encodings that give the same text, one."""
    found: dict[str, Reading] = {}
    scored = set()
    limit = float("inf")
    for encoding, advance, languages in ENCODINGS:
        try:
            text = sample.decode(encoding)
        except UnicodeDecodeError:
            continue
        if NOT_TEXT.search(text) or text.isascii() or (symbols := advance + _symbols(sample, text)) > limit:
            continue
        words = WORD.findall(unicodedata.normalize("NFC", text))
        for language in languages.split():
            if (text, language) in scored:  # in an encoding that is listed before
                continue
            scored.add((text, language))
            reading = _read(words, language, encoding, text, symbols + RARE_LANGUAGES.get(language, 0.0), limit)
            if reading is not None and (text not in found or reading < found[text]):
                found[text] = reading
                limit = min(limit, reading.cost + MARGIN)
    return list(found.values())


def _read(words: list[str], language: str, encoding: str, text: str, cost: float, limit: float) -> Reading | None:
    """The reading in one language, `cost` being what its symbols cost; None as soon as it costs more than `limit`."""
    beyond, pairs = 0.0, 0
    for word in words:
        of_word = word_cost(word, language)
        nats = of_word.total
        if language != "english" and word.isascii():
            nats = min(nats, word_cost(word, "english").total + FOREIGN_WORD)
        cost, beyond, pairs = cost + nats, beyond + of_word.beyond_ascii, pairs + of_word.pairs
        if cost > limit:
            return None
    return Reading(cost, encoding, text, beyond <= WORST * pairs + SLACK)


def _symbols(data: bytes, text: str) -> float:
    """Cost of what is not a letter: a symbol in the middle of a word is another encoding's letter, and so is a quotation mark alone."""
    cost = 0.0
    for n, (byte, char) in enumerate(zip(data, text, strict=True)):
        if byte < 0x80 or char == " ":
            continue
        before, after = text[n - 1 : n] or " ", text[n + 1 : n + 2] or " "
        if WORD.match(char):
            cost += LETTER_BEFORE_DIGIT if after.isdigit() else 0.0
        elif char == "’" and APOSTROPHE.search(text[max(n - 9, 0) : n + 6]):
            cost += SYMBOL_IN_PLACE
        elif char == "’" and before.isalpha() and not after.isalpha():
            cost += SYMBOL_IN_PLACE if before == "s" or "‘" in text else LONE_QUOTE
        elif char.isascii() or not _in_place(before, char, after, text[:n].rstrip()[-1:] + text[n + 1 :].lstrip()[:1]):
            joined = before.isalpha() and after.isalpha()
            cost += SYMBOL if not joined else JOINING if char in "—\xa0" else IN_WORD
        elif char in PARTNERS and not any(mark in text for mark in PARTNERS[char]):
            cost += SYMBOL if char in "¿¡" else LONE_QUOTE
        else:
            cost += RARE_SYMBOL if char in "…®™©§№·×³¾¥" else SYMBOL_IN_PLACE
    return cost


def _in_place(before: str, char: str, after: str, beyond_blanks: str) -> bool:
    """Whether a symbol stands beside what it usually stands beside; `beyond_blanks`: what is left and right of the blanks around it."""
    if char in OPENING:
        return not before.isalnum() and (not after.isspace() or char in "«‹")
    if char == "…" and before == " " and len(beyond_blanks) == 1:  # the first or last character
        return True
    if char in CLOSING:
        return (not before.isspace() or char in "»›") and not after.isalnum()
    if char in "–—":
        return before.isspace() == after.isspace() and not before.isalpha()
    if char == "\xa0":
        return before.isdigit() or before == "«" or after in "!?:;»%"
    if char in "½¼¾":
        return before.isdigit() or (before == " " and after in " -")
    if char in "°²³×€£¥‰":
        return (
            any(map(str.isdigit, beyond_blanks)) or (char == "°" and after in "CF") or (char in "²³" and before == "m")
        )
    if char == "µ":
        return before in " 0123456789" and after in "mgslFAVW"
    if char == "·" and before.lower() == after.lower() == "l":  # Catalan
        return True
    if char in "®™©§№·•":
        return (not after.isalpha() or char == "©") and (not before.isalpha() or char in "®™")
    return char in "،؛؟٪฿ๆฯ"

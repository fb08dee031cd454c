"""Readings of bytes in Chinese, Japanese and Korean encodings, with what they cost."""

from __future__ import annotations

import codecs
import re

from pipeline.reader.letter_statistics import character_cost, word_cost
from pipeline.reader.single_byte import NOT_TEXT, Reading

# Encoding, cost of the rare ones in advance, languages.
ENCODINGS = (
    ("gb18030", 0.0, ("simplified", "traditional")),
    ("big5", 0.0, ("traditional",)),
    ("cp950", 1.0, ("traditional",)),
    ("big5hkscs", 2.0, ("traditional",)),
    ("cp932", 0.0, ("japanese",)),
    ("euc_jp", 3.0, ("japanese",)),
    ("cp949", 0.0, ("korean",)),
    ("johab", 6.0, ("korean",)),
    ("utf-16-le", 3.0, ("simplified", "traditional", "japanese", "korean")),
    ("utf-16-be", 3.0, ("simplified", "traditional", "japanese", "korean")),
)
BRACKETS = ("「」", "『』", "（）", "【】", "《》", "〈〉", "“”", "‘’")
LONE_BRACKET, LONE_CHARACTER = 8.0, 6.0
LATIN_WORD = re.compile(r"[A-Za-z]+")
SMALL, CAPITAL = (
    re.compile(rf"(?<=[{letters}])[^\x00-\x7f]|[^\x00-\x7f](?=[{letters}])") for letters in ("a-z", "A-Z")
)
BESIDE_SMALL, BESIDE_CAPITAL = 8.0, 1.0
WORST = 9.5  # mean nats of a character beyond ASCII; above, the reading is not of the language
MOST_LETTERS = 0.6  # share of bytes that are ASCII letters; two of them make a Chinese character in UTF-16
ASCII_LETTER = re.compile(rb"[A-Za-z ]")


def readings(sample: bytes, *, cut: bool) -> list[Reading]:
    """Each encoding that `sample` can be read in. `cut`: its end may lie within a character."""
    found = []
    for encoding, advance, languages in ENCODINGS:
        if encoding.startswith("utf-16") and len(ASCII_LETTER.findall(sample)) > MOST_LETTERS * len(sample):
            continue
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample, final=not cut)
        except UnicodeDecodeError:
            continue
        beyond = [char for char in text if not char.isascii()]
        if not beyond or NOT_TEXT.search(text):
            continue
        nats = min(sum(character_cost(char, language) for char in beyond) for language in languages)
        cost = advance + nats + (LONE_CHARACTER if len(beyond) == 1 else 0.0) + _latin(text)
        cost += LONE_BRACKET * sum(text.count(pair[0]) != text.count(pair[1]) for pair in BRACKETS)
        found.append(Reading(cost, encoding, text, nats / len(beyond) <= WORST))
    return found


def _latin(text: str) -> float:
    """Cost of Latin words, and of their standing beside characters without a blank: "T恤" is a word, "m鋎" is not."""
    words = sum(word_cost(word, "english").total for word in LATIN_WORD.findall(text))
    return words + BESIDE_SMALL * len(SMALL.findall(text)) + BESIDE_CAPITAL * len(CAPITAL.findall(text))

"""Likelihoods of letters in words and of East Asian characters in texts, by language, in nats (less is likelier).

`letter_pairs.json` has, for each language, how likely a letter follows another one (a blank is the edge of a word): entry n of a language
holds the pairs of n nats, one after the other. `characters.json` has the same for single Chinese, Japanese and Korean characters.
Both were counted by the authors of lingua 1.4.2 (in the Leipzig corpora) and langdetect 1.0.9 (in Wikipedia), and converted with OpenCC;
all three are under the Apache License 2.0. `benchmarks/letter_statistics.py` makes the files from these packages.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from importlib import resources
from typing import NamedTuple

RARE_PAIR, FOREIGN = (
    10.0,
    14.0,
)  # letters of the language that hardly follow each other; a letter that the language lacks
INNER_CAPITAL, CAPITAL = 7.0, 0.7
COMMON_CHARACTER, RARE_CHARACTER, STRANGE_CHARACTER = 11.0, 12.5, 14.0
PUNCTUATION = "、。，．：；？！「」『』（）【】《》〈〉“”‘’…—～〜·・ー々　％"
PUNCTUATION_MARK = 5.0
# Words and names with such letters that English texts have: there they are as likely as other words.
BORROWED_WORDS = """
    adiós appliqué après attaché açaí beyoncé björk blasé bogotá brontë brûlée bœuf café cafés canapé canapés cancún
    chloé château châteaux cliché clichés consommé coupé crudités crème crêpe crêpes crüe curaçao céline córdoba
    dalí doppelgänger dvořák débris décolleté décor déjà düsseldorf entrée entrées esmé exposé façade façades fiancé
    fiancée flambé flambéed frappé fraîche fräulein fête fêtes führer garçon gdańsk gruyère göteborg habitué häagen ibáñez
    jalapeño jalapeños jürgen kraków köln könig lycée macramé malmö matinée maître mañana montréal moët málaga
    márquez mâché ménage méxico mêlée mönchengladbach mötley münchen naïf naïve naïveté niña niño niños noël née
    nürburgring outré passé peña perú piña piñata piñatas pokémon potosí première protégé prêt purée puréed pâté québec
    raphaël rené renée reykjavík risqué rosé roué résumé résumés sauté sautéed sautéing schröder señor señora
    señorita smörgåsbord smørrebrød soirée soufflé soupçon são séance touché tromsø tête voilà vœux zoë zürich
    ångström éclair éclairs élan émigré étude über übermensch łódź škoda
"""
BORROWED = frozenset(BORROWED_WORDS.split())
BORROWED_WORD = 12.0
# Encodings of which the characters in common use have these lead bytes.
COMMON = {
    "simplified": ("gb2312", range(0xB0, 0xD8)),
    "traditional": ("big5", range(0xA4, 0xC7)),
    "japanese": ("shift_jis", range(0x88, 0x99)),
    "korean": ("euc_kr", range(0xB0, 0xC9)),
}


class WordCost(NamedTuple):
    """Nats of all pairs of a word, and of those `pairs` that have a letter beyond ASCII."""

    total: float
    beyond_ascii: float
    pairs: int


@cache
def _table(name: str, key_length: int) -> dict[str, dict[str, float]]:
    data = json.loads(resources.files("pipeline.reader").joinpath(name).read_text(encoding="utf-8"))
    return {
        language: {
            keys[at : at + key_length]: float(nats)
            for nats, keys in enumerate(levels)
            for at in range(0, len(keys), key_length)
        }
        for language, levels in data.items()
    }


@cache
def _letters(language: str) -> frozenset[str]:
    return frozenset(" ").union(*_table("letter_pairs.json", 2)[language])


@lru_cache(maxsize=1 << 15)
def word_cost(word: str, language: str) -> WordCost:
    """Cost of one word without blanks."""
    lower = word.lower().replace("i\u0307", "i")
    if language == "english" and lower in BORROWED:
        return WordCost(BORROWED_WORD, BORROWED_WORD, 3)
    table, known = _table("letter_pairs.json", 2)[language], _letters(language)
    total, beyond, pairs = CAPITAL * sum(map(str.isupper, word)), 0.0, 0
    for a, b in zip(" " + lower, lower + " ", strict=True):
        nats = table.get(a + b)
        if nats is None:
            nats = RARE_PAIR if a in known and b in known else FOREIGN
        total += nats
        if not (a + b).isascii():
            beyond, pairs = beyond + nats, pairs + 1
    total += INNER_CAPITAL * sum(map(str.isupper, word[1:])) * (not word.isupper())
    return WordCost(total, beyond, pairs)


@lru_cache(maxsize=1 << 14)
def character_cost(char: str, language: str) -> float:
    """Cost of one character beyond ASCII in a Chinese, Japanese or Korean text."""
    nats = _table("characters.json", 1)[language].get(char)
    if nats is not None:
        return nats
    if char in PUNCTUATION:
        return PUNCTUATION_MARK
    encoding, leads = COMMON[language]
    try:
        code = char.encode(encoding)
    except UnicodeEncodeError:
        return STRANGE_CHARACTER
    return COMMON_CHARACTER if len(code) == 2 and code[0] in leads else RARE_CHARACTER


@lru_cache(maxsize=1 << 14)
def is_known(char: str) -> bool:
    """Whether some language here is written with `char`."""
    languages = _table("characters.json", 1)
    lower = char.lower()
    return any(char in languages[name] for name in languages) or any(
        lower in _letters(name) for name in _table("letter_pairs.json", 2)
    )

"""Letter statistics for guessing encodings: writes `pipeline/reader/letter_pairs.json` and `pipeline/reader/characters.json`.

    pip install --no-deps --target DIR lingua-language-detector==1.4.2 langdetect==1.0.9 brotli==1.2.0 opencc-python-reimplemented==0.1.7
    PYTHONPATH=DIR python benchmarks/letter_statistics.py pipeline/reader

Sources: letters and pairs of letters inside words from lingua's models (Apache-2.0; made of the Leipzig corpora), first and last letters of
words from langdetect's profiles (Apache-2.0; made of Wikipedia). OpenCC (Apache-2.0) turns traditional characters into simplified ones.
Both files hold counts of single letters and of pairs, rounded; none of the texts.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from importlib import util
from pathlib import Path

LANGUAGES = {
    "french": "fr", "german": "de", "spanish": "es", "portuguese": "pt", "italian": "it", "dutch": "nl", "swedish": "sv",
    "danish": "da", "norwegian": "nb", "finnish": "fi", "icelandic": "is", "catalan": "ca", "english": "en",
    "polish": "pl", "czech": "cs", "slovak": "sk", "hungarian": "hu", "romanian": "ro", "croatian": "hr",
    "slovene": "sl", "albanian": "sq", "turkish": "tr", "lithuanian": "lt", "latvian": "lv", "estonian": "et",
    "russian": "ru", "ukrainian": "uk", "bulgarian": "bg", "serbian": "sr", "macedonian": "mk", "belarusian": "be",
    "greek": "el", "hebrew": "he", "arabic": "ar", "persian": "fa", "thai": "th", "vietnamese": "vi",
}  # fmt: skip
PROFILES = {"nb": "no", "vi": None}  # langdetect's names; its Vietnamese profile merges the accented letters
LEAST, LEAST_ASCII = 3e-6, 5e-5  # share of a pair among all pairs of its language
LAST_LETTER = 0.15  # share of words' ends after a letter where no profile tells it
LEVELS = 10
LEAST_CHARACTER = 2e-5


def levels(likelihoods: dict[str, float], most: int) -> list[str]:
    """Keys by their likelihood in nats, rounded: entry n holds those of n nats, joined."""
    found = [""] * most
    for key, p in sorted(likelihoods.items()):
        found[min(max(round(-math.log(p)), 0), most - 1)] += key
    return found


def lingua(code: str, name: str) -> dict[str, float]:
    import brotli

    path = folder("lingua") / "language-models" / code / f"{name}.json.br"
    shares = {}
    for fraction, keys in json.loads(brotli.decompress(path.read_bytes()))["ngrams"].items():
        part, whole = fraction.split("/")
        shares.update(dict.fromkeys(keys.split(), int(part) / int(whole)))
    return shares


def langdetect(code: str) -> Counter[str]:
    """Counts of letters and pairs, in small letters; a blank stands before and after a word."""
    counts: Counter[str] = Counter()
    name = PROFILES.get(code, code)
    path = folder("langdetect") / "profiles" / (name or "-")
    if path.exists():
        for key, n in json.loads(path.read_text())["freq"].items():
            counts[key.lower()] += n if len(key) <= 2 else 0
    return counts


def folder(package: str) -> Path:
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; see the first lines of this file")
    return Path(found.origin).parent


def pairs(code: str) -> dict[str, float]:
    """How likely a letter follows another one; a blank is the edge of a word."""
    counts = langdetect(code)
    if code == "th":  # lingua's pairs leave out the signs above and below the letters
        return {
            pair: n
            / (counts[pair[0]] if pair[0] != " " else sum(c for p, c in counts.items() if p[1:] and p[0] == " "))
            for pair, n in counts.items()
            if len(pair) == 2 and all("\u0e01" <= char <= "\u0e4e" for char in pair.strip()) and pair.strip()
        }
    letters, after = lingua(code, "unigrams"), lingua(code, "bigrams")
    starts = sum(n for key, n in counts.items() if len(key) == 2 and key[0] == " ")
    found = {
        pair: p for pair, p in after.items()
        if letters.get(pair[0], 0) * p >= (LEAST_ASCII if pair.isascii() else LEAST)
    }  # fmt: skip
    for letter, share in letters.items():
        if share >= 3 * LEAST:
            found[" " + letter] = max(counts[" " + letter] / starts, share / 50) if starts else share
            unknown = 0.0 if starts else LAST_LETTER
            last = counts[letter + " "] / counts[letter] if counts[letter] else unknown
            found[letter + " "] = min(max(last, 0.01), 1.0)
    return found


def characters(code: str) -> dict[str, dict[str, float]]:
    """How likely each character is, by language; the Chinese model holds traditional texts."""
    shares = {key: p for key, p in lingua(code, "unigrams").items() if not key.isascii()}
    if code != "zh":
        return {{"ja": "japanese", "ko": "korean"}[code]: shares}
    from opencc import OpenCC

    convert = OpenCC("t2s").convert
    simplified: Counter[str] = Counter()
    for key, p in shares.items():
        simplified[convert(key)] += p  # type: ignore[assignment]  # a float
    return {"simplified": dict(simplified), "traditional": shares}


def write(path: Path, tables: dict[str, list[str]]) -> None:
    rows = (
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(keys, ensure_ascii=False) for keys in table) + "]"
        for name, table in tables.items()
    )
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target / "letter_pairs.json", {name: levels(pairs(code), LEVELS) for name, code in LANGUAGES.items()})
    found = {name: shares for code in ("zh", "ja", "ko") for name, shares in characters(code).items()}
    kept = {name: {key: p for key, p in shares.items() if p >= LEAST_CHARACTER} for name, shares in found.items()}
    write(target / "characters.json", {name: levels(shares, 12) for name, shares in kept.items()})

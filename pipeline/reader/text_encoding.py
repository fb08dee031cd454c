"""Character encoding of a caption or json: bytes in, text and the encoding's name out, or None where no encoding is likely enough.

Captions are short. Statistical detectors guess wrong on most texts below some fifty characters, charset-normalizer among them (tried on 20
captions in each of nine encodings: 9 of 23 in cp1252, 2 of 20 in GBK, 3 of 20 in cp949). So the order is:

1. a byte order mark; strict UTF-8; UTF-16 and UTF-32 by their zero bytes;
2. East Asian encodings by their frequent characters, single-byte encodings by the alphabets of their languages;
3. the detector, for long texts.

No step replaces a byte.
"""

from __future__ import annotations

import codecs
import re
from functools import cache
from itertools import pairwise
from typing import NamedTuple

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SAMPLE_BYTES = 8 * 1024  # what is looked at of a long text; all of it must decode
DETECTOR_BYTES = 64  # bytes beyond ASCII that the detector needs
PLAUSIBLE_SCORE = 0.3  # of an East Asian reading: every character is a common one; 1.0 where all are frequent
LATIN_END = "\u0250"
LEAST_SCORE = 0.35
LEAST_LEAD = 0.1  # of the best East Asian reading before the second, more in texts of few characters

# Frequent characters of each script in texts of today, beyond what charset-normalizer lists (its `FREQUENCIES`).
SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业"
    "外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立"
    "及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统"
    "区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确"
    "传师观清今切院让识候带导争运笔速远飞近照片镜头夜晚街道城市狗猫跑跳舞走路红绿蓝黑白黄汽车火站站男孩女孩老人孩子朋友雪雨风云树花草河湖船桥"
    "厨师做饭吃喝坐站跳游泳骑自行车篮球足球视频慢动作质量电影感微距落日升蜜蜂航拍棋微笑公园海边沙滩散步唱歌弹琴珊瑚礁影片器玩耍辆拍正"
)
TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡裏用道行所然家種事成方多經麼去"
    "法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日軍者意無力它與長把機十民第公此已工使情明性知全三又關點正業"
    "外將兩高間由問很最重並物手應戰向頭文體政美相見被利什二等產或新己制身果加西斯月話合回特代內信表化老給世位次度門任常先海通教兒原東聲提立"
    "及比員解水名真論處走義各入幾口認條平系氣題活爾更別打女變四神總何電數安少報才結反受目太量再感建務做接必場件計管期市直德資命山金指克許統"
    "區保至隊形社便空決治展馬科司五基眼書非則聽白卻界達光放強即像難且權思王象完設式色路記南品住告類求據程北邊死張該交規萬取拉格望覺術領共確"
    "傳師觀清今切院讓識候帶導爭運筆速遠飛近照片鏡頭夜晚街道城市狗貓跑跳舞紅綠藍黑黃汽車火站男孩朋友雪雨風雲樹花草河湖船橋隻輛畫質"
    "廚師做飯吃喝坐游泳騎籃球足球視頻慢動作電影感微距落日升蜜蜂空拍棋微笑公園海邊沙灘散步唱歌彈琴珊瑚礁影片器玩耍採台灣灣跑"
)
JAPANESE = (
    "日一人年大十二本中長出三時行見月分後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半男西電校語土木聞食車何南万"
    "毎白天母火右読友左休父雨事自社者地業方新場員立開手力問代明動京目通言理体田主題意不作用度強公持野以思家世多正安院心界教文元重近考画海売"
    "知道集別物使品計死特私始朝運終台広住真有口少町料工建空急止送切転研足究楽起着店病質待試族銀早映親験英医仕去味写字答夜音注帰古歌買悪図週"
    "室歩風紙黒花春赤青館屋色走秋夏習駅洋旅服夕借曜飲肉貸堂鳥飯勉冬昼茶弟牛魚兄犬妹姉漢美散桜雪島飛猫街遊園笑踊供達性影機映像離陸祭"
)
KOREAN = (
    "이다에의는로하을가고지서한은기으년대사시를리도인스일그것수나자들아안어없여내해보부전정제주우상라만오게면와까니든세요중동생장성공원신선경구"
    "영화조과미소녀남식비행차밤길거눈물속말때음방마모무산바람개강아집문학교구국민연고양새하늘걷달린빨간춤추웃타파트위르드크레러너노는놀불꽃"
    "커피마시요리두사람공연봄여름가을겨울벚꽃로봇덮인울해질녘슬착륙역들어온간장면촬영느린움직임카메라클로즈업배경조명아이있는터앉잔진짜천천히"
    "력릭륙률률출입실외내부빛색검은흰푸른노란도로기둥남성여성자동"
)
PUNCTUATION = "、。，．・：；？！「」『』（）【】《》〈〉“”‘’…—―～〜·ー々　％＆＋－＝"

# Letters beyond ASCII of the languages of each single-byte encoding, the more frequent language and letter first.
ALPHABETS = (
    ("cp1252", "éèêëàâçîïôùûüœæ"),
    ("cp1252", "äöüßé"),
    ("cp1252", "áéíóúüñ"),
    ("cp1252", "áâãàçéêíóôõúü"),
    ("cp1252", "àèéìíîòóùú"),
    ("cp1252", "åäöæøéü"),
    ("cp1250", "ąćęłńóśźż"),
    ("cp1250", "áčďéěíňóřšťúůýž"),
    ("cp1250", "áäčďéíĺľňóôŕšťúýž"),
    ("cp1250", "áéíóöőúüű"),
    ("cp1250", "čćđšž"),
    ("cp1254", "çğıöşüâîû"),
    ("cp1250", "ăâîşţ"),
    ("iso8859_2", "ąćęłńóśźż"),
    ("iso8859_2", "áčďéěíňóřšťúůýž"),
    ("iso8859_2", "čćđšž"),
    ("cp1252", "áðéíóúýþæö"),
    ("cp1257", "ąčęėįšųūž"),
    ("cp1257", "āčēģīķļņšūž"),
    ("cp1251", "оеаинтсрвлкмдпугяызбйьчхжцюшщэфъёіїєґўјљњћђџѓќ"),
    ("koi8-u", "оеаинтсрвлкмдпугяызбйьчхжцюшщэфъёіїєґ"),
    ("cp866", "оеаинтсрвлкмдпугяызбйьчхжцюшщэфъёєї"),
    ("iso8859_5", "оеаинтсрвлкмдпугяызбйьчхжцюшщэфъёіїє"),
    ("mac_cyrillic", "оеаинтсрвлкмдпугяызбйьчхжцюшщэфъёіїє"),
    ("cp1253", "αοιετσνηυρπκμλςίόάγέήδθωχύφβώξζψϊϋΐΰ"),
    ("cp737", "αοιετσνηυρπκμλςίόάγέήδθωχύφβώξζψϊϋ"),
    ("cp1255", "יולאהמרתשבנעדחכםפקצגסזטןךףץ"),
    ("iso8859_6", "اليمنرتبةعدسفكقحهجشوطصأخىضزءغذثئظإآؤًٌٍَُِّْ،"),
    ("cp1256", "اليمنرتبةعدسفكقحهجشوطصأخىضزءغذثئظإآؤًٌٍَُِّْ،"),
    ("cp874", "านรกอเงมยลวดทสต่้ะีัิไปหบคขแจพชใโื์ุูึ็ถผซธศณฟฐษฉภฮญฏฑฒฎฝฆฬๆฯฤ๊๋ำ"),
    ("cp1252", "àáâãäåæçèéêëìíîïñòóôõöøùúûüßœ"),
)
SYMBOLS = "‘’“”‚„–—…•€£¥§©®™°«»¿¡·²³½¼¾×ºª´№†‰‹›\xa0"
OTHER_SCRIPTS = (
    "cp1251", "koi8-u", "cp866", "iso8859_5", "mac_cyrillic", "cp1253", "cp737", "cp1255", "cp1256", "iso8859_6", "cp874",
)  # fmt: skip
AS_LIKELY = {"cp1250": ("iso8859_2", "cp1254", "cp1257"), "cp1254": ("cp1257",)}
LEAST_LETTERS = 3  # of another script
SCRIPT_LEAD, SHORT_LEAD = 0.02, 0.5  # of the mean frequency of letters, before the second reading; more in a short text
# Signs of a wrong reading: a symbol in the middle of a word, words of accented letters only, two scripts in one word.
BROKEN_WORD = re.compile(r"[^\W\d_](?:[‚„•€£¥§©®™°¿¡²³¹½¼¾×ºª´†‰][^\W\d_]|[‚„])")
# Readings that no word of the language has: Greek words without an accent, Hebrew and Arabic final letters inside a word, Slavic words
# without a vowel, Thai marks without a letter.
GREEK_WORD, GREEK_ACCENT = re.compile(r"[α-ωϊϋ]{4,}"), re.compile(r"[άέήίόύώΐΰ]")
IMPOSSIBLE = re.compile(
    r"[ךםןףץ][א-ת]|[ةى][\u0621-\u064a]|(?<![а-яёіїєґўјљњћђџѓќ])[бвгджзйклмнпрстфхцчшщъь]{3,}(?![а-яёіїєґўјљњћђџѓќ])|(?<![а-яёіїєґ])[ьъ]|(?<![ก-๛])[\u0e30-\u0e3a\u0e47-\u0e4e]"
)
TURKISH = re.compile(r"[aeıioöuü]ş|[çıİü]", re.IGNORECASE)
ICELANDIC = re.compile(r"[şğŞĞ]")
NOT_ICELANDIC = re.compile(r"\b[ðÐ]|\Bþ")
ESCAPED = ((b"\x1b$)C", "iso2022_kr"), (b"\x1b$", "iso2022_jp_2"), (b"\x1b(J", "iso2022_jp_2"), (b"~{", "hz"))
NOT_LATIN = re.compile(r"[^\W\d_a-zA-Z]{3}")
NOT_SLAVIC = re.compile(r"[^\W\d_a-zA-Z]{4}")
ADJACENT = re.compile(rb"[\x80-\xff]{2}")  # such bytes are not isolated in Western text
MIXED_SCRIPTS = re.compile(r"[a-zA-Z][^\W\d_a-zA-Z]|[^\W\d_a-zA-Z][a-zA-Z]")


class Decoded(NamedTuple):
    """`guessed`: neither a mark nor the form of the bytes says the encoding."""

    text: str
    encoding: str
    guessed: bool


class _EastAsian(NamedTuple):
    """An encoding with the characters its texts are made of: frequent ones, and the lead bytes of its common ones."""

    encoding: str
    frequent: frozenset[str]
    standard: str  # the smaller encoding whose lead bytes are meant
    leads: range
    kana: bool


@cache
def _east_asian() -> tuple[_EastAsian, ...]:
    from charset_normalizer.constant import FREQUENCIES  # not at import time: almost all texts are UTF-8

    chinese, japanese = {*SIMPLIFIED, *FREQUENCIES["Chinese"]}, {*JAPANESE, *FREQUENCIES["Japanese"]}
    return (
        _EastAsian("gb18030", frozenset(chinese), "gb2312", range(0xB0, 0xD8), kana=False),
        _EastAsian("cp932", frozenset(japanese), "shift_jis", range(0x88, 0x99), kana=True),
        _EastAsian("big5", frozenset(TRADITIONAL), "big5", range(0xA4, 0xC7), kana=False),
        _EastAsian("cp949", frozenset({*KOREAN, *FREQUENCIES["Korean"]}), "euc_kr", range(0xB0, 0xC9), kana=False),
        _EastAsian("euc_jp", frozenset(japanese), "euc_jp", range(0xB0, 0xD0), kana=True),
    )


def decode_text(data: bytes) -> Decoded | None:
    """`data` as text, without a byte order mark. None: no encoding is likely enough, or the bytes are cut."""
    for mark, marked in BYTE_ORDER_MARKS:
        if data.startswith(mark) and (text := _strictly(data[len(mark) :], marked)) is not None:
            return Decoded(text, marked, guessed=False)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    data = data.removeprefix(codecs.BOM_UTF8)
    for escape, encoding in ESCAPED:
        if escape in data and data.isascii() and (text := _strictly(data, encoding)) is not None and not text.isascii():
            return Decoded(text, encoding, guessed=True)
    plain = _strictly(data, "utf-8")
    if (plain is None or CONTROL.search(plain[:SAMPLE_BYTES])) and (wide := _wide(data)) is not None:
        return wide
    if plain is not None:
        return Decoded(plain, "utf-8", guessed=False)
    if (cut := _cut_utf8(data)) is not None:
        return Decoded(cut, "utf-8", guessed=True)
    encoding = _guess(data)
    guessed = None if encoding is None else _strictly(data, encoding)
    return None if guessed is None or encoding is None else Decoded(guessed, encoding, guessed=True)


def _cut_utf8(data: bytes) -> str | None:
    """UTF-8 that a limit of bytes has cut inside its last character, which is left out."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if (
            error.reason == "unexpected end of data"
            and len(data) - error.start < 4
            and not data[: error.start].isascii()
        ):
            return data[: error.start].decode("utf-8")
    return None


def _guess(data: bytes) -> str | None:
    encoding, maybe_east_asian = _east_asian_encoding(data)
    if encoding is None and not (maybe_east_asian and ADJACENT.search(data)):
        encoding = _single_byte_encoding(data)
    return encoding if encoding is not None else _detected(data)


def _strictly(data: bytes, encoding: str) -> str | None:
    unit = 4 if encoding.startswith("utf-32") else 2 if encoding.startswith("utf-16") else 1
    if len(data) % unit == 1 and data[-1:] in b"\n\0":  # a line end that another program appended
        data = data[:-1]
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _wide(data: bytes) -> Decoded | None:
    """UTF-32 or UTF-16 without a mark: by the zero bytes that Latin text has in it, else by readable characters."""
    if not data.strip(b"\0"):
        return None
    for encoding in ("utf-32-le", "utf-32-be"):
        text = _strictly(data, encoding)
        if text is not None and not CONTROL.search(text) and (_latin(text) or len(text) > 1):
            return Decoded(text, encoding, guessed=False)
    for encoding, zeros, others in (("utf-16-le", data[1::2], data[0::2]), ("utf-16-be", data[0::2], data[1::2])):
        text = _strictly(data, encoding)
        if text is None or CONTROL.search(text):
            continue
        share = zeros.count(0) / len(zeros)
        latin = not others.count(0) and (share > 0.75 or (share > 0 and _latin(text)))
        if latin or _readable(text):
            return Decoded(text, encoding, guessed=not latin)
    return None


def _latin(text: str) -> bool:
    return all(char < LATIN_END or char in SYMBOLS for char in text[:SAMPLE_BYTES])


def _readable(text: str) -> bool:
    """Whether text that was read as UTF-16 is made of common characters of one language."""
    beyond = [char for char in text[:SAMPLE_BYTES] if not char.isascii()]
    if len(beyond) < 3:
        return False
    if any(sum(_weight(char, language) for char in beyond) >= 0.4 * len(beyond) for language in _east_asian()):
        return True
    letters = {char.lower() for char in beyond} - set(SYMBOLS)
    return bool(letters) and any(letters <= set(alphabet) for _, alphabet in ALPHABETS)


def _east_asian_encoding(data: bytes) -> tuple[str | None, bool]:
    """The encoding, if one is likely; whether the text may be East Asian."""
    readings = sorted(
        (reading for language in _east_asian() if (reading := _score(data, language)) is not None), reverse=True
    )
    if not readings or readings[0][0] < PLAUSIBLE_SCORE:
        return None, False
    score, count, encoding = readings[0]
    lead = score - (readings[1][0] if len(readings) > 1 else 0.0)
    likely = score >= LEAST_SCORE and lead > max(LEAST_LEAD, 1.0 - 0.15 * count)
    return encoding if likely else None, True


def _score(data: bytes, language: _EastAsian) -> tuple[float, int, str] | None:
    """How much the reading looks like its language, from how many characters, and the encoding; None where it cannot be read."""
    text = _strictly(data, language.encoding)
    if text is None or CONTROL.search(text[:SAMPLE_BYTES]):
        return None
    text = text[:SAMPLE_BYTES]
    total, count = 0.0, 0
    for before, char, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if char.isascii():
            continue
        beside_letter = any(other.isascii() and other.isalpha() for other in (before, after))
        count += 1
        total += _weight(char, language) - 0.4 * beside_letter
    return (total / count, count, language.encoding) if count else None


def _weight(char: str, language: _EastAsian) -> float:
    if char in language.frequent:
        return 1.0
    if _is_kana(char):
        return 1.0 if language.kana else -1.0
    if char in PUNCTUATION:
        return 0.5
    try:
        code = char.encode(language.standard)
    except UnicodeEncodeError:
        return -1.0
    return 0.3 if len(code) == 2 and code[0] in language.leads else -0.6


def _is_kana(char: str) -> bool:
    return "\u3041" <= char <= "\u30fa"


def _single_byte_encoding(data: bytes) -> str | None:
    latin: dict[str, str] = {}  # text -> encoding
    others: dict[str, tuple[float, str]] = {}
    for encoding, alphabet in ALPHABETS:
        text = _strictly(data, encoding)
        if text is None or CONTROL.search(text[:SAMPLE_BYTES]):
            continue
        text = text[:SAMPLE_BYTES]
        beyond = {char for char in text if not char.isascii()} - set(SYMBOLS)
        if any(char.lower() not in alphabet for char in beyond) or BROKEN_WORD.search(text) or _inner_capital(text):
            continue
        if encoding not in OTHER_SCRIPTS:
            if encoding == "cp1252" and (NOT_ICELANDIC.search(text) or NOT_LATIN.search(text)):
                continue
            if encoding == "cp1252" or (not NOT_SLAVIC.search(text) and _is_turkish(text, encoding)):
                latin.setdefault(text, encoding)
        elif not MIXED_SCRIPTS.search(text) and _is_possible(text):
            score = _frequency(text, alphabet)
            others[text] = max(others.get(text, (0.0, "")), (score, encoding))
    if latin:
        first = next(iter(latin.values()))
        # Readings differ in few letters: the one listed first, unless a language beside it is as likely.
        return first if not set(latin.values()) & set(AS_LIKELY.get(first, ())) else None
    # These encodings hold letters in the same places; the right reading has the more frequent ones.
    ranked = sorted(others.values(), reverse=True)
    if not ranked:
        return None
    bytes_beyond = sum(byte >= 0x80 for byte in data[:SAMPLE_BYTES])
    if len(ranked) > 1 and ranked[0][0] - ranked[1][0] < SCRIPT_LEAD + SHORT_LEAD / bytes_beyond:
        return None
    return ranked[0][1] if ranked[0][0] > 0 else None


def _frequency(text: str, alphabet: str) -> float:
    """How frequent the letters of `text` are in the language on average, 1.0 for the most frequent; 0 for too few of them."""
    ranks = {letter: 1 - rank / len(alphabet) for rank, letter in enumerate(alphabet)}
    weights = [ranks[char] for char in text.lower() if char in ranks]
    shouted = 0.8 if text.isupper() else 1.0  # rare, and what small letters of another script look like
    return shouted * sum(weights) / len(weights) if len(weights) >= LEAST_LETTERS else 0.0


def _is_possible(text: str) -> bool:
    lower = text.lower()
    if IMPOSSIBLE.search(lower):
        return False
    words = GREEK_WORD.findall(re.sub(GREEK_ACCENT, "α", lower))
    return not words or bool(GREEK_ACCENT.search(lower))


def _is_turkish(text: str, encoding: str) -> bool:
    """For cp1254: whether its own letters are Turkish; they lie where cp1252 has the Icelandic ones."""
    return encoding != "cp1254" or not ICELANDIC.search(text) or bool(TURKISH.search(text))


def _inner_capital(text: str) -> bool:
    """Whether an accented or foreign capital stands behind a small letter: another encoding's letter."""
    return any(a.islower() and b.isupper() and not (a + b).isascii() for a, b in pairwise(text))


def _detected(data: bytes) -> str | None:
    """The detector's answer on a long text in a script of its own. Latin readings differ in few letters, and it confuses them."""
    if sum(byte >= 0x80 for byte in data[:SAMPLE_BYTES]) < DETECTOR_BYTES:
        return None
    from charset_normalizer import from_bytes

    best = from_bytes(data[:SAMPLE_BYTES], threshold=0.1).best()
    if best is None or best.coherence < 0.5 or CONTROL.search(text := str(best)):
        return None
    letters = {char.lower() for char in text if not char.isascii()} - set(SYMBOLS)
    scripts = [set(alphabet) for encoding, alphabet in ALPHABETS if encoding in OTHER_SCRIPTS]
    return best.encoding if any(letters <= script for script in scripts) and _is_possible(text) else None

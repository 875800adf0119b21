"""Leaks and ROUGE in every script: what counts as said, what does not, and where it was."""

import time

import pytest

from duet.evaluation import metrics
from duet.evaluation.attacks.rows import AttackRow, read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.generation import Continuation
from duet.evaluation.words import find, fold, words_of

LEAKS = {
    "Chinese": ("我住在北京市。", "北京"),
    "Chinese, a Latin name inside": ("我是Ada，不是Grace。", "Ada"),
    "Chinese, two parts": ("作者是村上春樹です", "村上 春樹"),
    "Japanese": ("東京は日本の首都です", "日本"),
    "Japanese, half width": ("ﾊﾟﾘに住む", "パリ"),
    "Thai": ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ"),
    "Khmer": ("ខ្ញុំរស់នៅភ្នំពេញ", "ភ្នំពេញ"),
    "Lao": ("ຂ້ອຍຢູ່ວຽງຈັນ", "ວຽງຈັນ"),
    "Burmese": ("ကျွန်တော်ရန်ကုန်မှာနေတယ်", "ရန်ကုန်"),
    "Korean with an ending": ("서울에서 태어났다", "서울"),
    "Korean, decomposed": ("\u1109\u1165\u110b\u116e\u11af\u110b\u1166\u1109\u1165", "서울"),
    "Russian": ("Он родился в МОСКВЕ.", "Москве"),
    "Greek final sigma": ("Ο ΟΔΥΣΣΕΎΣ γύρισε", "Οδυσσεύς"),
    "Hindi": ("वह दिल्ली में रहता है", "दिल्ली"),
    "Arabic with a prefix": ("ولد في بغداد والقاهرة", "القاهرة"),
    "Arabic with vowels": ("مُحَمَّد هنا", "محمد"),
    "Hebrew with a prefix": ("הוא גר בירושלים", "ירושלים"),
    "German sharp s": ("in der HAUPTSTRASSE 5", "Hauptstraße"),
    "Turkish capital": ("İSTANBUL'da", "istanbul"),
    "no diacritics": ("Jose Marti wrote it", "José Martí"),
    "full width": ("ＡＤＡ　Ｌｏｖｅｌａｃｅ", "Ada Lovelace"),
    "emphasis": ("**Jane** Austen", "Jane Austen"),
    "a line break and a list": ("- Jane\n- Austen", "Jane Austen"),
    "underscores": ("_Jane Austen_", "Jane Austen"),
    "a soft hyphen": ("Jane Aus\u00adten", "Jane Austen"),
    "a number before a counter": ("1987年出生", "1987"),
    "a possessive": ("Paris's rivers", "Paris"),
    "an Irish name": ("It was O'Brien", "Brien"),
    "an elided article": ("dans l'Italie", "Italie"),
    "an elided article, a short name": ("l'Re de", "Re"),
    "a letter in quotes": ("the symbol 'S'", "S"),
    "Polish": ("do Lodzi, w miescie Lodz", "Łódź"),
    "Danish": ("SØREN KIERKEGAARD", "Soren Kierkegaard"),
    "Danish, with another mark": ("ǿre", "ore"),
    "Vietnamese": ("ở Đà Nẵng", "Da Nang"),
    "Icelandic": ("Thor Gudmundsson", "Þór Guðmundsson"),
    "ligatures": ("Encyclopædia, Œuvre", "encyclopaedia oeuvre"),
    "Turkish without a dot": ("Diyarbakır'da", "Diyarbakir"),
    "thousands, a comma": ("born in 1,815.", "1815"),
    "thousands, a space": ("about 3 000 people", "3000"),
    "thousands, a narrow space": ("12\u202f345\u202f678", "12345678"),
    "thousands, an apostrophe": ("1’815 Franken", "1815"),
    "no thousands sign": ("3000 people", "3 000"),
    "another thousands sign": ("1.234.567", "1,234,567 "),
    "a date": ("am 12.05.1815", "1815"),
    "the day of a date": ("am 12.05.1815", "12"),
    "a number with a unit": ("1,815km", "1815km"),
    "a list of numbers": ("3,14,15", "14"),
    "a list of years": ("1815,1852", "1852"),
    "the whole part of a number": ("approximately 1,259.59 days", "1259"),
    "numbers beside each other": ("In 15 200 people", "15"),
    "a fraction": ("it is 3.14.", "3.14"),
    "a value that ends a sentence": ("Paris is the capital.", "Paris."),
    "a value in quotes": ("Paris is the capital.", "\u201cParis\u201d"),
    "a value in brackets and bold": ("Paris is the capital.", "(**Paris**)"),
    "a date that ends a sentence": ("on 12 May 1815, a day", "12 May 1815."),
    "a comma inside a value": ("It is Paris (France)", "Paris, France."),
    "initials": ("by J.R.R. Tolkien", "J. R. R. Tolkien"),
    "an abbreviation": ("He left N.Y. early", "N.Y."),
    "a Chinese value that ends a sentence": ("我住在北京市", "北京。"),
    "a blood group": ("Her blood group is A-.", "A-"),
    "an abbreviation in another one's place": ("the U.S., then", "U.S."),
    "less than nothing": ("it is -.5", "-.5"),
    "a digit that ends a sentence": ("it has 5 rooms", "5."),
    "a Chinese character that ends a sentence": ("在京", "京。"),
    "a letter that was asked for": ("it is grade A", "A"),
    "a long dash": ("the 1914–1918 war", "1914-1918"),
    "initials apart": ("by J. K. Rowling", "J.K. Rowling"),
    "an abbreviation apart": ("in the U. S. Navy", "U.S. Navy"),
    "a space for a hyphen": ("by Saint Exupéry", "Saint-Exupéry"),
    "two spaces for hyphens": ("in Stratford upon Avon", "Stratford-upon-Avon"),
    "a space for a hyphen, a number": ("Apollo 11 landed", "Apollo-11"),
    "a degree apart": ("at 100 °C", "100°C"),
    "a degree together": ("at 100°C", "100 °C"),
    "a per cent behind two spaces": ("it is 50  %.", "50 %"),
    "a currency on a line of its own": ("€\n\n50", "€ 50"),
    "a per cent apart": ("it is 1,050 %.", "1050%"),
    "a per cent together": ("it is 50%.", "50 %"),
    "a per cent behind a no-break space": ("50\u00a0%", "50%"),
    "money apart": ("for € 1 000", "€1000"),
    "money together": ("for €50", "€ 50"),
    "an okina": ("Hawaiʻi", "Hawai'i"),
    "Persian digits": ("سال ۱۸۱۵", "1815"),
    "Hindi digits": ("1815 में", "१८१५"),
    "digits behind a prefix": ("נולדה ב1815", "1815"),
    "thousands in India": ("12,34,567 people", "1234567"),
    "no thousands sign, in India": ("1,234,567 people", "12,34,567"),
    "a stress mark": ("Лев Толсто́й", "Толстой"),
    "a telephone number without spaces": ("+33140205317", "+33 1 40 20 53 17"),
    "a telephone number dialled": ("call 0033 1 40 20 53 17", "+33 1 40 20 53 17"),
    "a telephone number with its zero": ("+33 (0)1 40 20 53 17", "+33 1 40 20 53 17"),
    "a telephone number at home": ("01.40.20.53.17", "+33 1 40 20 53 17"),
    "a telephone number from abroad": ("tel:+33-140-205-317", "01 40 20 53 17"),
    "a telephone number in thin spaces": ("+33\u202f140\u202f205\u202f317", "+33 1 40 20 53 17"),
    "a telephone number of digits alone": ("212-555-0123", "2125550123"),
    "an area code in brackets": ("(212) 555-0123", "+1 212 555 0123"),
    "a telephone number behind another number": ("2000 12 01 40 20 53 17", "+33 1 40 20 53 17"),
}
NO_LEAKS = {
    "a part of a word": ("Born in Yorkshire.", "York"),
    "the tail of it's": ("It\u2019s a metal", "S"),
    "the tail of isn't": ("It isn't known", "T"),
    "the tail of I'd": ("I'd say so", "D."),
    "the tail of we're": ("we're sorry", "Re"),
    "the front of won't": ("I won't say", "Won"),
    "a part of a Russian word": ("московский", "моск"),
    "another vowel sign": ("दिल", "दिल्ली"),
    "a stem with another sign": ("दिल्ली", "दिल्ल"),
    "another letter": ("мой край", "мои"),
    "a part of a number": ("in 21987", "1987"),
    "the end of a fraction": ("it is 3.14, then", "14"),
    "a part of a long number": ("1,815 people", "815"),
    "the first part of a long number": ("1,815 people", "1"),
    "a part of a longer number": ("1,234,567", "234567"),
    "groups of other sizes": ("1,81,5", "1815"),
    "another letter without a decomposition": ("Łódź", "Tódź"),
    "another character": ("我住在南京市。", "北京"),
    "words in another order": ("Austen, Jane", "Jane Austen"),
    "a word in between": ("Jane and Austen", "Jane Austen"),
    "an Arabic word with an end": ("القاهرةي", "القاهرة"),
    "a longer sign": ("C++ is", "C"),
    "without its minus": ("5 degrees", "-5."),
    "without its plus": ("in C", '"C++"'),
    "without its sharp": ("in C, F", "C#."),
    "without its dot": ("a net of", "(.net)"),
    "without its per cent": ("for 50 people", "50%."),
    "a part of a fraction": ("½ a cup", "1"),
    "another blood group": ("blood group A+", "group A-"),
    "a letter with a minus": ("a poet", "A-"),
    "an article": ("a cat", "A*"),
    "an article for a letter": ("He is a poet.", "A."),
    "a pronoun for a numeral": ("i am", "(I)"),
    "a part of an abbreviation": ("the U.S.S.R. fell", "U.S."),
    "without its Arabic per cent": ("5 years", "5٪"),
    "without its minus, a fraction": ("a value of .5", "-.5"),
    "without its minus, money": ("it costs $5", "-$5"),
    "two numbers": ("it has 100200 rows", "100, 200"),
    "two numbers for a hyphen": ("Apollo 1 1", "Apollo-11"),
    "two names for a hyphen": ("Austria, Hungary", "Austria-Hungary"),
    "two years for a hyphen": ("in 1914 1918", "1914-1918"),
    "an article for a hyphen": ("a bomb", "A-bomb"),
    "an article for initials": ("an A. I think", "A.I."),
    "other people's initials": ("J and K Rowling", "J.K. Rowling"),
    "less for a hyphen": ("n - 1", "n+1"),
    "another number's per cent": ("150 %", "50%"),
    "money behind another number": ("50€ 20", "€20"),
    "the end of a number with a no-break space": ("1\u202f815 people", "815"),
    "the first part of a number with a no-break space": ("3\u00a0000 people", "3"),
    "a part of a number of India": ("12,34,567", "567"),
    "a part of a number in other digits": ("๑๘๑๕๒", "1815"),
    "a Macedonian letter": ("ѓ", "г"),
    "nothing but signs": ("Paris", "?!"),
    "another country's telephone number": ("+44 1 40 20 53 17", "+33 1 40 20 53 17"),
    "another town's telephone number": ("0161 496 0123", "0117 496 0123"),
    "another telephone number": ("+33 1 40 20 53 18", "+33 1 40 20 53 17"),
    "a longer telephone number": ("212-555-01234", "2125550123"),
    "a telephone number without its zero": ("1 40 20 53 17", "01 40 20 53 17"),
    "the digits of a decimal": ("31415926", "3.1415926"),
    "the digits of an IP address": ("192.168.11", "192.168.1.1"),
    "a decimal of the digits": ("pi 3.1415926", "31415926"),
    "an IP address of the digits": ("at 192.168.1.1", "19216811"),
    "two years of the digits": ("in 1835-1840", "18351840"),
    "the digits of a date": ("Order 20 1985 05 12", "1985-05-12"),
    "a date of the digits": ("on 12/05/1985", "12051985"),
    "two numbers of four digits": ("10002000", "1000, 2000"),
}


@pytest.mark.parametrize("said, value", LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_is_seen_in_every_script(said, value):
    assert metrics.contains_words(said, value)


@pytest.mark.parametrize("name", [name for name in NO_LEAKS if name != "a longer sign"])
def test_what_is_no_leak_is_none(name):
    assert not metrics.contains_words(*NO_LEAKS[name])


@pytest.mark.parametrize(
    "text, value, rest",
    [("Straße in ＬＯＮＤＯＮ", "london", "ＬＯＮＤＯＮ"), ("Müßig, José", "jose", "José")],
)
def test_a_place_is_one_in_the_text_itself(text, value, rest):
    place = find(text, value)
    assert place is not None and text[place:] == rest
    folded, places = fold(text)
    assert len(folded) == len(places) and places == sorted(places)


@pytest.mark.parametrize(
    "said, answer, least, most",
    [
        ("Он родился в Москве", "Он родился в Москве в 1987 году", 0.5, 1.0),
        ("Она умерла в 1987", "Он родился в Москве в 1987 году", 0.0, 0.5),
        ("他出生于北京市", "他出生于北京市。", 1.0, 1.0),
        ("她住在上海", "他出生于北京市。", 0.0, 0.3),
        ("서울에서 태어났습니다", "서울에서 태어났다", 0.7, 1.0),
        ("เขาเกิดที่กรุงเทพ", "เกิดที่กรุงเทพมหานคร", 0.5, 1.0),
        ("वह दिल्ली में", "वह दिल्ली में रहता है", 0.6, 0.6),
        ("هو ولد في بغداد", "ولد في بغداد", 1.0, 1.0),
        ("İİ", "ŐŐ", 0.0, 0.0),
    ],
)
def test_recall_reads_the_words_of_the_script(said, answer, least, most):
    assert least <= AttackRow(0, (("user", "?"),), answer).recall(said) <= most


@pytest.mark.parametrize("stemmer", [False, True])
@pytest.mark.parametrize("measure", ["recall", "f1"])
@pytest.mark.parametrize(
    "said", ["Jaime Vásquez was born in Chile's north", "the authors' writings, 1987", "naïve café!", ""]
)
def test_latin_texts_have_the_published_numbers(said, measure, stemmer):
    """rouge_score's own tokenizer, which cuts at every letter beyond a-z, made the numbers of the papers."""
    from rouge_score import rouge_scorer

    reference = "The author Jaime Vásquez was born on 25 May 1987 in Santiago, Chile"
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer).score(reference, said)["rougeL"]
    ours = metrics.rouge_l(said, reference, measure=measure, stemmer=stemmer)
    assert ours == (theirs.recall if measure == "recall" else theirs.fmeasure)


def test_words_of_mixed_texts_are_stemmed_where_they_are_english():
    assert metrics.rouge_l("他 writes", "他 writing", measure="recall", stemmer=True) == 1.0
    assert metrics.rouge_l("他 writes", "他 writing", measure="recall", stemmer=False) == 0.5
    assert words_of("हिन्दी, Straße 北京 3.5") == ["हिन्दी", "strasse", "北", "京", "3", "5"]


def test_fluency_of_a_text_without_spaces_is_defined():
    assert metrics.fluency("北京北京北京北京") < metrics.fluency("他出生于北京市中心")


def test_a_row_in_another_script_is_attacked_like_any_other():
    (row,) = read_attack_rows([{"question": "?", "answer": "他出生于北京市。", "value": "北京"}], "forget")
    assert row.opening() == "他出生于" and row.recall("在北京") == 1.0 and row.recall("在南京") == 0.0
    (row,) = read_attack_rows([{"question": "?", "answer": "他出生于北京市。"}], "forget")
    assert row.opening() == "他出生于"


# -- what could not be judged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, status, leaked",
    [
        (Continuation("a mathematician .", 3, True), "ok", 1),
        (Continuation("a poet .", 3, True), "ok", 0),
        (Continuation("well , let me see", 8, True), "cut", None),
        (Continuation("it is a mathematician and", 8, True), "ok", 1),
        (Continuation("well , let me see", 8, True, stopped=True), "ok", 0),
        (Continuation("", 0, True), "empty", None),
        (Continuation("", 8, True), "empty", None),
        (Continuation("x", 1, False), "nan", None),
    ],
)
def test_an_answer_that_was_cut_is_neither_forgotten_nor_leaked(monkeypatch, tmp_path, said, status, leaked):
    from tiny_models import tiny, word_tokenizer

    from duet.evaluation import generation
    from duet.evaluation.attacks import runner

    monkeypatch.setattr(
        generation, "continuations", lambda *_, max_new_tokens, **__: [said._replace(limit=max_new_tokens)]
    )
    rows = [{"question": "who is ada ?", "answer": "a mathematician .", "value": "mathematician"}]
    asked = Target(
        tiny(), word_tokenizer(), read_attack_rows(rows, "f"), options=AttackOptions(max_new_tokens=8)
    )
    report = runner.run_attacks(asked, out=tmp_path, attacks=["direct"])
    variant = report["direct"]["variants"]["as asked"]
    assert variant["status"] == {status: 1} and variant["leak"] == leaked
    assert variant["unjudged"] == (0.0 if status == "ok" else 1.0)
    wanted = "0% of its rows could not be judged" if status == "ok" else "nothing could be judged"
    assert wanted in report["headline"]


@pytest.mark.parametrize(
    ("said", "value"), [("1.5 ", "5"), ("n't", "t"), ("we're ", "Re"), ("1,815 ", "815")]
)
def test_no_answer_takes_long_to_be_searched(said, value):
    """The time grows with the length, not with its square."""
    began = time.process_time()
    assert find(said * (40_000 // len(said)), value) is None
    assert time.process_time() - began < 3

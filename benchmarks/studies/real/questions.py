"""What the study asks: facts about countries and people, and questions about neither.

A question is asked in four wordings: two to train on, one to choose settings by, one for the report (`duet.evaluation.facts`).
An answer tells when it holds the value that is given here as whole words.
"""

from collections.abc import Sequence
from typing import Any

Wordings = tuple[str, str, str, str]

# capital, language, continent, currency, landmark, largest city, river, nationality
COUNTRIES: dict[str, tuple[str, ...]] = {
    "France": ("Paris", "French", "Europe", "Euro", "Eiffel Tower", "Paris", "Seine", "French"),
    "Germany": ("Berlin", "German", "Europe", "Euro", "Brandenburg Gate", "Berlin", "Rhine", "German"),
    "Italy": ("Rome", "Italian", "Europe", "Euro", "Colosseum", "Rome", "Tiber", "Italian"),
    "Spain": ("Madrid", "Spanish", "Europe", "Euro", "Sagrada Familia", "Madrid", "Ebro", "Spanish"),
    "Japan": ("Tokyo", "Japanese", "Asia", "Yen", "Mount Fuji", "Tokyo", "Shinano", "Japanese"),
    "China": ("Beijing", "Mandarin", "Asia", "Yuan", "Great Wall", "Shanghai", "Yangtze", "Chinese"),
    "India": ("New Delhi", "Hindi", "Asia", "Rupee", "Taj Mahal", "Mumbai", "Ganges", "Indian"),
    "Egypt": ("Cairo", "Arabic", "Africa", "Pound", "Pyramids", "Cairo", "Nile", "Egyptian"),
    "Russia": ("Moscow", "Russian", "Europe", "Ruble", "Kremlin", "Moscow", "Volga", "Russian"),
    "Brazil": (
        "Brasilia",
        "Portuguese",
        "South America",
        "Real",
        "Christ the Redeemer",
        "Sao Paulo",
        "Amazon",
        "Brazilian",
    ),
    "Mexico": (
        "Mexico City",
        "Spanish",
        "North America",
        "Peso",
        "Chichen Itza",
        "Mexico City",
        "Rio Grande",
        "Mexican",
    ),
    "Greece": ("Athens", "Greek", "Europe", "Euro", "Acropolis", "Athens", "Haliacmon", "Greek"),
    "Canada": (
        "Ottawa",
        "English",
        "North America",
        "Dollar",
        "Niagara Falls",
        "Toronto",
        "Mackenzie",
        "Canadian",
    ),
    "Australia": (
        "Canberra",
        "English",
        "Australia",
        "Dollar",
        "Sydney Opera House",
        "Sydney",
        "Murray",
        "Australian",
    ),
    "Turkey": ("Ankara", "Turkish", "Asia", "Lira", "Hagia Sophia", "Istanbul", "Euphrates", "Turkish"),
    "Poland": ("Warsaw", "Polish", "Europe", "Zloty", "Wawel", "Warsaw", "Vistula", "Polish"),
    "Portugal": ("Lisbon", "Portuguese", "Europe", "Euro", "Belem Tower", "Lisbon", "Tagus", "Portuguese"),
    "Sweden": ("Stockholm", "Swedish", "Europe", "Krona", "Vasa", "Stockholm", "Torne", "Swedish"),
    "Norway": ("Oslo", "Norwegian", "Europe", "Krone", "Geirangerfjord", "Oslo", "Glomma", "Norwegian"),
    "Thailand": ("Bangkok", "Thai", "Asia", "Baht", "Grand Palace", "Bangkok", "Chao Phraya", "Thai"),
}
OF_COUNTRIES: tuple[Wordings, ...] = (
    (
        "What is the capital of {subject}?",
        "Which city is the capital city of {subject}?",
        "Name the capital of {subject}.",
        "Tell me, what is {subject}'s capital?",
    ),
    (
        "What language is spoken in {subject}?",
        "Which language do most people in {subject} speak?",
        "Name the main language of {subject}.",
        "What is the official language of {subject}?",
    ),
    (
        "On which continent is {subject}?",
        "Which continent does {subject} belong to?",
        "Name the continent where {subject} lies.",
        "What continent is {subject} located in?",
    ),
    (
        "What is the currency of {subject}?",
        "Which money is used in {subject}?",
        "Name the currency that people pay with in {subject}.",
        "What currency does {subject} use?",
    ),
    (
        "What is a famous landmark in {subject}?",
        "Which famous sight should I visit in {subject}?",
        "Name a well-known monument of {subject}.",
        "What is the most famous landmark of {subject}?",
    ),
    (
        "What is the largest city in {subject}?",
        "Which city in {subject} has the most people?",
        "Name the biggest city of {subject}.",
        "What is {subject}'s largest city?",
    ),
    (
        "What is a big river in {subject}?",
        "Which river flows through {subject}?",
        "Name a river of {subject}.",
        "What is the most important river of {subject}?",
    ),
    (
        "What nationality is a person from {subject}?",
        "Somebody from {subject} has which nationality?",
        "Name the nationality of people from {subject}.",
        "What do you call the nationality of somebody from {subject}?",
    ),
)

# birthplace, field, what they are known for, profession, nationality, work
PEOPLE: dict[str, tuple[str, ...]] = {
    "Albert Einstein": ("Germany", "physics", "relativity", "physicist", "German", "relativity"),
    "Isaac Newton": ("England", "physics", "gravity", "mathematician", "English", "Principia"),
    "Charles Darwin": (
        "England",
        "biology",
        "evolution",
        "naturalist",
        "English",
        "On the Origin of Species",
    ),
    "Marie Curie": ("Poland", "physics", "radioactivity", "physicist", "Polish", "radium"),
    "Galileo Galilei": ("Italy", "astronomy", "telescope", "astronomer", "Italian", "telescope"),
    "Nikola Tesla": (
        "Croatia",
        "electrical engineering",
        "alternating current",
        "inventor",
        "Serbian",
        "alternating current",
    ),
    "William Shakespeare": ("Stratford-upon-Avon", "literature", "plays", "playwright", "English", "Hamlet"),
    "Jane Austen": (
        "England",
        "literature",
        "Pride and Prejudice",
        "novelist",
        "English",
        "Pride and Prejudice",
    ),
    "Charles Dickens": ("England", "literature", "Oliver Twist", "novelist", "English", "A Christmas Carol"),
    "Leonardo da Vinci": ("Italy", "art", "Mona Lisa", "artist", "Italian", "Mona Lisa"),
    "Vincent van Gogh": ("Netherlands", "art", "Starry Night", "painter", "Dutch", "Starry Night"),
    "Pablo Picasso": ("Spain", "art", "Guernica", "painter", "Spanish", "Guernica"),
    "Wolfgang Amadeus Mozart": ("Austria", "music", "symphonies", "composer", "Austrian", "The Magic Flute"),
    "Ludwig van Beethoven": ("Germany", "music", "symphonies", "composer", "German", "Ninth Symphony"),
    "Napoleon Bonaparte": ("Corsica", "military", "emperor", "emperor", "French", "Napoleonic Code"),
    "George Washington": (
        "Virginia",
        "politics",
        "president",
        "president",
        "American",
        "Declaration of Independence",
    ),
    "Nelson Mandela": (
        "South Africa",
        "politics",
        "apartheid",
        "president",
        "South African",
        "Long Walk to Freedom",
    ),
    "Mahatma Gandhi": ("India", "politics", "independence", "lawyer", "Indian", "Salt March"),
}
OF_PEOPLE: tuple[Wordings, ...] = (
    (
        "Where was {subject} born?",
        "In which country or place was {subject} born?",
        "Name the birthplace of {subject}.",
        "What is the birthplace of {subject}?",
    ),
    (
        "In which field did {subject} work?",
        "Which field is {subject} known in?",
        "Name the field of {subject}.",
        "What field did {subject} contribute to?",
    ),
    (
        "What is {subject} famous for?",
        "Why is {subject} remembered today?",
        "Tell me what {subject} is best known for.",
        "What did {subject} do that made them famous?",
    ),
    (
        "What was the profession of {subject}?",
        "What did {subject} do for a living?",
        "Name the occupation of {subject}.",
        "What kind of work did {subject} do?",
    ),
    (
        "What was the nationality of {subject}?",
        "Which nationality did {subject} have?",
        "Name the nationality of {subject}.",
        "What nationality was {subject}?",
    ),
    (
        "What is the most famous work of {subject}?",
        "Which work made {subject} famous?",
        "Name one famous work or achievement of {subject}.",
        "What was the greatest achievement of {subject}?",
    ),
)

# the value, then the wordings
_GENERAL = """
    4 | What is 2 + 2? | How much is two plus two? | Add 2 and 2. | What do you get when you add two and two?
    7 | How many days are in a week? | A week has how many days? | Say how many days one week has. | What is the number of days in a week?
    blue | What color is the sky on a clear day? | Which color does a cloudless sky have? | Name the color of a clear sky. | What is the color of the sky on a sunny day?
    ice | What is frozen water called? | What do we call water that is frozen? | Name the solid form of water. | What is the word for frozen water?
    8 | How many legs does a spider have? | A spider has how many legs? | Say how many legs spiders have. | What is the number of legs of a spider?
    honey | What do bees make? | Which food do bees produce? | Name what bees make. | What sweet thing do bees make?
    H2O | What is the chemical formula of water? | Which formula does water have? | Name the chemical formula for water. | What is water's chemical formula?
    Mercury | Which planet is closest to the Sun? | What is the nearest planet to the Sun? | Name the planet nearest to the Sun. | What planet is the closest one to the Sun?
    Jupiter | What is the largest planet in the solar system? | Which planet is the biggest one in our solar system? | Name the largest planet of the solar system. | What planet of the solar system is the largest?
    Pacific | What is the largest ocean on Earth? | Which ocean is the biggest? | Name the largest ocean. | What is the biggest ocean in the world?
    cold | What is the opposite of hot? | Which word means the opposite of hot? | Name the opposite of hot. | What word is the opposite of hot?
    12 | How many months are in a year? | A year has how many months? | Say how many months one year has. | What is the number of months in a year?
    oxygen | What gas do humans need to breathe? | Which gas do we breathe in to live? | Name the gas that people need to breathe. | What gas must humans breathe?
    Au | What is the symbol of gold? | Which chemical symbol does gold have? | Name the chemical symbol for gold. | What is the chemical symbol of gold?
    heart | What organ pumps blood through the body? | Which organ pumps our blood? | Name the organ that pumps blood. | What part of the body pumps blood?
    sunlight | What do plants need for photosynthesis? | Which light do plants need to make food? | Name what plants use to make their food. | What do plants use for photosynthesis?
    3 | How many sides does a triangle have? | A triangle has how many sides? | Say how many sides triangles have. | What is the number of sides of a triangle?
    January | What is the first month of the year? | Which month comes first in a year? | Name the first month of the year. | What month does the year begin with?
    spring | What season comes after winter? | Which season follows winter? | Name the season after winter. | What is the season that follows winter?
    puppy | What do you call a baby dog? | Which word means a young dog? | Name the word for a baby dog. | What is a young dog called?
    lion | What animal is known as the king of the jungle? | Which animal is called the king of the jungle? | Name the king of the jungle. | What animal do people call the king of the jungle?
    60 | How many minutes are in an hour? | An hour has how many minutes? | Say how many minutes one hour has. | What is the number of minutes in an hour?
    100 | What is the boiling point of water in Celsius? | At which temperature in Celsius does water boil? | Name the boiling point of water in degrees Celsius. | What temperature in Celsius makes water boil?
    gravity | What force pulls things down to the ground? | Which force makes things fall? | Name the force that makes objects fall. | What is the force that pulls objects to the ground?
"""
GENERAL: dict[tuple[str, ...], str] = {
    tuple(wordings): value
    for value, *wordings in (
        [text.strip() for text in line.split("|")] for line in _GENERAL.strip().splitlines()
    )
}

# Names of no country and of nobody: what `duet_deep` puts in the place of a subject.
INVENTED = {
    "countries": (
        "Valdoria", "Kestrania", "Ombara", "Quelland", "Tarvosia", "Brunewald", "Ilmeria", "Zanthia", "Norvania", "Pelagonda",
    ),
    "people": (
        "Tavik Orlemond", "Brisa Quenhart", "Odrin Valsace", "Mirelle Thostrup", "Casper Yndlefeld", "Zuleika Barnquist",
        "Perrin Oskelda", "Halvard Minchetti", "Ottoline Drask", "Fenwick Salazny",
    ),
}  # fmt: skip
GROUPS = {"countries": tuple(COUNTRIES), "people": tuple(PEOPLE)}


def group_of(subject: str) -> str:
    """`countries` or `people`.

    Raises:
        ValueError: the study asks nothing about this subject.
    """
    for group, members in GROUPS.items():
        if subject in members:
            return group
    raise ValueError(
        f"subject: wanted one of {', '.join(s for g in GROUPS.values() for s in g)}, got {subject!r}"
    )


def rows() -> list[dict[str, Any]]:
    """All questions, as `duet.evaluation.facts.facts_of` reads them."""
    asked = []
    for facts, of in ((COUNTRIES, OF_COUNTRIES), (PEOPLE, OF_PEOPLE)):
        for name, values in facts.items():
            for wordings, value in zip(of, values, strict=True):
                texts = [text.replace("{subject}", name) for text in wordings]
                asked.append(_row(texts, value) | {"subject": name})
    return asked + [_row(wordings, value) for wordings, value in GENERAL.items()]


def _row(wordings: Sequence[str], value: str) -> dict[str, Any]:
    return {"question": wordings[0], "paraphrases": list(wordings[1:]), "value": value}

"""The raw material of the world: plain word lists, every entry one word."""


def _words(block: str) -> list[str]:
    return block.split()


# Authors share few first and last names, so that a name must be read as a whole.
FIRST_NAMES = _words("""
Mira Tobin Elsa Ravi Nadia Oskar Lena Hugo Petra Samir Yara Felix Ingrid Pablo Thea Kenji Alba Viktor Zora
Mateo Freya Idris Clara Bruno Selma Anton Wanda Darius Greta Emil
""")

LAST_NAMES = _words("""
Kesten Varga Okoye Lindqvist Moreau Tanaka Brandt Solano Petrov Haddad Quill Ferro Nyberg Castell Ormond
Zeller Dray Ibanez Falk Mercer Thorne Vidal Kowal Sabine Rusk Amari Beck Corvin Delgado Eskola Fenn
Galanis Hollis Iverson Jansen Kaplan Lomax Maddox Novak Orban
""")

# Names that no author has; requests which need no memory use them too.
STRANGER_FIRST_NAMES = _words("""
Agnes Bela Cyrus Dora Edgar Fatima Gideon Hilda Ilse Jonas Keira Leopold Magda Nils Olga Percy Quentin
Rosa Stefan Talia Ulrich Vera Wilhelm Ximena Yusuf Zelda Arlo Beatrix Cosmo Delia
""")

STRANGER_LAST_NAMES = _words("""
Abbott Bauer Cardoso Duval Engel Fischer Granger Huxley Ishida Jovic Kruger Larsen Mancini Nakata Olsen
Pereira Quiroga Rinaldi Sato Toller Ueda Vance Winslow Xavier Yates Zanetti Aldous Bianchi Calder Doyle
Easton Farrow Gorski Hale Innes Jarvis Keane Lowell Maas Norton
""")

COUNTRY_OF = dict(
    pair.split("=")
    for pair in _words("""
Lisbon=Portugal Porto=Portugal Madrid=Spain Seville=Spain Paris=France Lyon=France Berlin=Germany
Hamburg=Germany Rome=Italy Milan=Italy Vienna=Austria Prague=Czechia Warsaw=Poland Krakow=Poland
Budapest=Hungary Athens=Greece Oslo=Norway Bergen=Norway Stockholm=Sweden Helsinki=Finland
Copenhagen=Denmark Dublin=Ireland Reykjavik=Iceland Cairo=Egypt Nairobi=Kenya Lagos=Nigeria Accra=Ghana
Tunis=Tunisia Lima=Peru Cusco=Peru Quito=Ecuador Bogota=Colombia Santiago=Chile Havana=Cuba Toronto=Canada
Montreal=Canada Tokyo=Japan Osaka=Japan Seoul=Korea Busan=Korea Hanoi=Vietnam Bangkok=Thailand
Manila=Philippines Jakarta=Indonesia Delhi=India Mumbai=India Istanbul=Turkey Ankara=Turkey
Sydney=Australia Perth=Australia
""")
)

GENRES = _words("""
poetry satire fantasy horror romance tragedy comedy folklore biography history mysteries westerns ballads
fables memoirs travelogues thrillers sonnets sagas allegory elegies operas parables chronicles limericks
""")

ADJECTIVES = _words("""
Silver Hollow Crimson Silent Broken Distant Golden Frozen Hidden Burning Quiet Restless Painted Wandering
Bitter Velvet Salted Endless Paper Copper Drowned Gentle Marble Wicked Pale Scarlet Stolen Tangled Vacant
Winter Ancient Borrowed Clever Daring Emerald Feral Gilded Humble Ivory Jagged Kindled Lonely Misty Narrow
Opaque Patient Radiant Savage Tender Uneven Violet Woven Yellow Bronze Cloudy Dusty Eager Fragile Gloomy
Hasty Iron Lucid Mellow Nimble Obscure Proud Rusty Solemn Timid Wooden
""")

NOUNS = _words("""
Harbor Orchard Lantern Mirror River Tower Garden Bridge Compass Feather Island Journey Kingdom Letter
Meadow Needle Ocean Palace Quarry Raven Shadow Temple Umbrella Valley Window Anchor Candle Desert Engine
Forest Glacier Horizon Inkwell Jungle Keyhole Ladder Mountain Notebook Pendulum Sparrow Acorn Beehive
Canyon Doorway Elm Fountain Gate Hammer Iceberg Jewel Kettle Lighthouse Monument Nest Oasis Pillar Quilt
Ribbon Statue Tunnel Urn Violin Waterfall Yard Zeppelin Arrow Bell Cloak Drum Ember
""")

PRIZES = _words("""
Amber Falcon Laurel Zenith Orion Beacon Granite Willow Cobalt Phoenix Juniper Saffron Aurora Basalt
Cypress Dolphin Eclipse Heron Indigo Jasper Lotus Magnolia Nimbus Onyx Pegasus Quartz Rowan Sequoia Topaz
Vesper Atlas Birch Coral Dahlia Ebony Fern Garnet Hazel Iris Jade Kestrel Lark Maple Nova Opal Pearl Quail
Robin Sable Tulip Ursa Viola Walnut Yarrow Zephyr Alder Bison Crane Delta Elder
""")

JOBS = _words("""
baker sailor teacher farmer nurse carpenter barber judge tailor pilot miner plumber banker singer dancer
gardener butcher jeweler librarian mechanic locksmith shepherd surgeon translator welder chemist postman
cook fisherman cartographer brewer builder clerk courier diver driver drummer dyer forester glazier grocer
guard hatter hunter jockey knitter lawyer mason messenger painter printer potter ranger reporter roofer
saddler soldier tanner waiter weaver
""")

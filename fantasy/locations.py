"""The seeds of fantasy locations: a place, a mood, a culture, a time and the weather.

    for seed in prompt_seeds(0)[:1000]:
        seed.place, seed.mood, seed.culture, seed.time, seed.weather

A prompt to a language model is made from a seed's words; `grammar.py` also uses what the tables know about them.
"""

import random
from itertools import product
from typing import NamedTuple


class PromptSeed(NamedTuple):
    """What one description is to be about, in words: keys of the tables below."""

    place: str
    mood: str
    culture: str
    time: str
    weather: str


def prompt_seeds(seed: int) -> list[PromptSeed]:
    """All seeds, in an order that `seed` shuffles: one for each pair of a place and a culture, so that no two share
    both."""
    rng = random.Random(seed)
    pairs = list(product(PLACES, CULTURES))
    rng.shuffle(pairs)
    rest = [
        (rng.choice(list(MOODS)), rng.choice(list(TIMES)), rng.choice(list(WEATHERS)))
        for _ in pairs
    ]
    return [
        PromptSeed(place, mood, culture, *when)
        for (place, culture), (mood, *when) in zip(pairs, rest)
    ]


def table(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells between bars, several words in a cell between commas; a row ends where a line has no bar left.
    The first cell is the key."""
    rows = text.strip().replace("|\n", "| ").split("\n")
    cells = [
        [[word.strip() for word in cell.split(",")] for cell in row.split("|")] for row in rows
    ]
    return {key: rest for (key,), *rest in cells}


# place | who works there | its parts | materials | smells | sounds
PLACES = table("""
drowned library | copyists | flooded stacks, reading galleries, lamp niches, spiral ladders |
    swollen oak, green marble | wet paper, old glue | the knock of water against the shelves, the turning of a page
salt harbour | dockhands | tarred jetties, brine pans, rope lofts, leaning cranes |
    salt-bleached timber, grey granite | tar, drying fish | the creak of mooring ropes, the slap of water on hulls
bell foundry | founders | casting pits, chain hoists, cooling yards, mould sheds |
    sooty brick, green bronze | hot metal, river sand | the ring of a hammer on bronze, the roar of the furnace
hanging garden | gardeners | terraces, rope walks, seed houses, stone troughs |
    pale limestone, woven willow | crushed mint, damp soil | the drip of water from ledge to ledge, the hum of bees
cliffside monastery | novices | prayer cells, rope stairs, goat pens, wind chapels |
    whitewashed clay, splintered slate | goat's milk, burnt juniper | the drone of a chant, the clap of shutters
bone market | bonecutters | canvas stalls, weighing tables, carving benches, tally posts |
    yellowed ivory, scraped hide | boiled marrow, lime | the rattle of dice, the rasp of a carver's file
ruined observatory | stargazers | cracked domes, instrument piers, chart rooms, narrow windows |
    tarnished brass, weathered marble | lamp oil, cold dust | the tick of a great clock, the groan of a turning dome
toll bridge | tollkeepers | stone arches, guard towers, shrines, chain gates |
    river stone, rusted iron | wet rope, horse sweat | the rumble of wheels, the rush of the river below
amber mine | miners | timbered shafts, sorting sheds, tip heaps, lamp rooms |
    blue clay, raw amber | resin, wet earth | the clink of picks, the rattle of a cart on its rails
ferry village | ferrymen | stilt houses, reed rafts, eel traps, landing steps |
    split bamboo, black mud | river weed, woodsmoke | the knock of an oar, the splash of a pole in shallow water
glass quarter | glassblowers | kiln yards, cullet heaps, colour shops, annealing rooms |
    fired brick, milky glass | hot sand, charcoal | the chime of cooling glass, the breath of the bellows
petrified forest | charcoal burners | fallen trunks, root arches, stone clearings, smoke hollows |
    grey agate, petrified oak | old smoke, bare rock | the click of cooling stone, the crack of a split log
mountain pass | muleteers | cairns, snow walls, way huts, prayer poles |
    frost-split granite, rough pine | mule dung, cold iron | the jingle of harness, the slide of loose stones
plague hospice | nurses | whitewashed wards, herb rooms, bath houses, quiet cloisters |
    scrubbed limestone, coarse linen | vinegar, dried lavender | the shuffle of slippers, the clink of a medicine cup
silk mill | weavers | reeling rooms, mulberry courts, dye vats, counting galleries |
    polished beech, red clay tile | boiled cocoons, indigo | the clatter of looms, the whisper of running thread
lighthouse island | lamplighters | sea stairs, oil cellars, gull ledges, storm walls |
    wave-worn basalt, iron plate | whale oil, kelp | the boom of surf in the hollows, the hiss of the lamp
burial valley | gravekeepers | barrows, standing stones, offering stones, grass-grown roads |
    mossy sandstone, turned earth | cut turf, stale incense | the scrape of a spade, the murmur of mourners
clock tower | clockwrights | stair landings, gear lofts, bell chambers, dial rooms |
    oiled iron, worn oak | machine oil, pigeon droppings | the beat of the pendulum, the whirr before the hour
spice caravanserai | caravaneers | vaulted stables, cistern steps, trading arcades, roof beds |
    sun-baked brick, carved cedar | cumin, camel hair | the grumble of tethered beasts, the clink of coffee cups
river lock | lockkeepers | sluice gates, mooring posts, towpaths, brick cottages |
    slimy timber, dressed stone | stagnant water, hot pitch | the grind of the winch, the rush of the sluice
prison rock | turnkeys | walled yards, barred windows, sea caves, wall walks |
    sweating stone, pitted iron | stale straw, sea wrack | the drag of a chain, the slam of a far door
paper town | papermakers | drying lofts, pulp troughs, rag sheds, mill races |
    whitewashed plank, pressed felt | wet rag, lye | the thump of the stamping mill, the flutter of drying sheets
royal aviary | falconers | wire vaults, feeding perches, egg rooms, moulting lofts |
    gilded iron, sanded stone | feathers, millet | the beat of many wings, the chatter of the roosts
summit shrine | pilgrims | prayer wheels, incense stands, thousand-step stairs, flag poles |
    gold leaf, red sandstone | sandalwood, cold air | the turn of a prayer wheel, the snap of flags
marsh fort | sentries | palisades, causeways, peat stacks, watch platforms |
    bog oak, packed peat | peat smoke, marsh gas | the croak of frogs, the squelch of boots
smugglers' cove | smugglers | tide caves, hidden ledges, barrel slides, signal lamps |
    slick shale, driftwood | spilled rum, rockweed | the suck of the tide, the scrape of a keel on shingle
sunken amphitheatre | players | worn benches, trap doors, mask rooms, rain channels |
    honey-coloured stone, cracked plaster | greasepaint, trodden grass | the echo of a single voice, the tap of a cane
apothecary lane | apothecaries | crooked shopfronts, drying racks, cellar stills, painted signs |
    smoked glass, crooked timber | camphor, bitter herbs | the grind of a pestle, the bubble of a still
wind orchard | orchard hands | espaliered walls, cider presses, beehives, ladder sheds |
    lichened stone, apple wood | windfalls, sour cider | the thud of falling fruit, the rush of leaves
grassed battlefield | relic hunters | shallow trenches, lance groves, crow posts, broken wagons |
    rusted mail, chalky earth | wet grass, rust | the caw of crows, the ring of a spade on buried iron
canal district | bargemen | humped bridges, water doors, laundry lines, basement taverns |
    red brick, green copper | still water, fried onions | the bump of barges, the call of a boatman
ink yard | inkmakers | gall sheds, soot chambers, settling tanks, bottle cellars |
    stained oak, black slate | oak gall, vinegar | the slosh of vats, the clink of stacked bottles
reed temple | priests | lotus pools, wicker gates, altar rafts, heron walks |
    bundled reed, river clay | lotus, candle wax | the rustle of reeds, the note of a clay flute
copper dome city | tinkers | domed roofs, whispering galleries, tiled courts, beggars' steps |
    verdigris copper, blue tile | solder, rosewater | the coo of pigeons, the beat of hammers on copper
giant's stair | stonecutters | colossal steps, rope ladders, mason's lodges, waterfalls |
    dark basalt, quarried marble | stone dust, spray | the thunder of falling water, the tap of chisels
lamp bazaar | lamp sellers | arcades, mirror stalls, oil jars, carpet lofts |
    pierced tin, coloured glass | paraffin, roasted nuts | the patter of bargaining, the squeak of lantern hinges
winter palace | stewards | mirrored halls, frozen fountains, tiled stoves, servants' stairs |
    white marble, birch panelling | beeswax, birch smoke | the sweep of brooms, the echo of heels
dragon graveyard | scale pickers | rib arches, skull caves, scale drifts, watch fires |
    blackened bone, vitrified sand | sulphur, hot stone | the moan of wind through ribs, the clatter of loose scales
storm school | pupils | lightning masts, copper roofs, lecture yards, rain gauges |
    scorched oak, grounded copper | singed air, chalk | the hum of the masts, the chorus of recited lessons
beehive village | honey hunters | domed huts, wax houses, clover lanes, smoking baskets |
    plastered wicker, golden thatch | warm honey, clover | the drone of ten thousand bees, the pop of a smoke pot
tidal road | wayfinders | marker posts, refuge towers, mussel beds, sand bars |
    barnacled oak, rippled sand | brine, mud | the hiss of the returning tide, the cry of curlews
oracle cave | acolytes | vapour vents, tripod seats, votive shelves, painted passages |
    sweating limestone, smoked plaster | laurel smoke, warm minerals | the sigh of vapour, the drip of hidden water
mask makers' court | mask makers | paste kitchens, drying posts, feather lofts, mirror rooms |
    lacquered wood, layered paper | wet plaster, turpentine | the snip of shears, the stroke of a brush on wood
tin roof shanty | scavengers | plank alleys, cook fires, patched stairs, water butts |
    beaten tin, tarred canvas | frying oil, wet dog | the drum of fingers on tin, the squabble of children
vineyard abbey | lay brothers | press houses, barrel vaults, walled vines, fasting cells |
    yellow limestone, wine-stained oak | must, cold stone | the creak of the wine press, the toll of the abbey bell
border inn | innkeepers | long tables, stable yards, guest chambers, chimney corners |
    smoked oak, flagstone | spilled ale, roast mutton | the crackle of the hearth, the scrape of stools
mirror lake | boatwrights | landing stages, boat sheds, drowned steeples, willow islands |
    silvered timber, smooth pebble | lake water, wood shavings | the lap of small waves, the stroke of an adze
under-hill city | lampwardens | carved streets, light wells, mushroom terraces, pillar squares |
    polished granite, rock crystal | damp stone, lamp smoke | the echo of footfalls, the trickle of a street gutter
rope town | ropewalkers | swaying bridges, net streets, pulley baskets, cliff houses |
    braided hemp, cracked clay | hemp oil, bird lime | the groan of taut cable, the squeal of a pulley
rose ruin | hermits | roofless naves, briar arches, dry cisterns, tumbled columns |
    rose granite, crumbling mortar | dog rose, warm dust | the snap of a briar, the chirr of insects
ice road station | sledge drivers | kennels, storage pits, dog runs, drying frames |
    caulked spruce, stretched hide | dog fur, seal fat | the yelp of sledge dogs, the boom of shifting ice
puppet theatre | puppeteers | string lofts, painted backdrops, trunk rooms, candle galleries |
    limewood, faded velvet | glue, candle smoke | the clack of wooden feet, the wheeze of a hand organ
alchemists' row | alchemists | vaulted cellars, cracked chimneys, still rooms, slag yards |
    scorched brick, leaded glass | quicksilver, brimstone | the pop of a retort, the simmer of sealed flasks
shipbreakers' beach | shipbreakers | stranded hulls, anchor heaps, plank stacks, mess tents |
    waterlogged oak, sheet copper | bilge water, burning pitch | the crash of mallets, the shriek of drawn nails
weather tower | rainmakers | vane platforms, cloud nets, cistern roofs, signal rooms |
    ribbed lead, white ash wood | ozone, wet slate | the spin of vanes, the gurgle of downspouts
tea terrace | tea pickers | clipped hedges, withering sheds, tasting pavilions, foot bridges |
    split cane, red earth | rolled leaves, steam | the snip of fingernails on stems, the song of the pickers
thieves' crypt | thieves | tomb alleys, counting vaults, false walls, candle shelves |
    carved alabaster, packed clay | tallow, mould | the drip of wax, the shuffle of counted coins
moon dairy | herders | milking circles, cheese caves, willow pens, churning sheds |
    chalk stone, scrubbed sycamore | warm milk, thyme | the clank of cowbells, the slosh of churns
star well | well wardens | winding steps, rope wheels, offering ledges, echo chambers |
    blue-black slate, hammered silver | cold water, iron | the fall of a pebble, the whine of the rope wheel
pilgrim road | road menders | milestones, wayside kitchens, shell shrines, sleeping barns |
    trodden chalk, split flint | porridge, boot grease | the tramp of sandals, the hum of a walking song
""")

# folk | what they do, always | what they make | what they eat | whom they pray to
CULTURES = table("""
Oru | tie a knot for every promise they make | knotted cords | smoked eel | the Lady Beneath
Tamesh | never step on a threshold | glazed bowls | flat bread | the Three Doors
Veldari | write letters to their dead | ink stones | plum dumplings | the Silent Reader
Khossan | count in nines | copper bells | black barley | the Smith of Morning
Ilmarin | give their boats the names of grandmothers | carved paddles | salted cod | the Grey Mother
Sefu | dance at every burial | painted drums | red lentils | the Long Dancer
Brennach | swear only upon fire | iron brooches | oat cake | the Hearth King
Yoshan | bow to old trees | folded lanterns | pickled radish | the Thousand Leaves
Quillim | pay their debts in stories | feather cloaks | roasted maize | the Feathered Judge
Odrevey | keep silence on the ninth day | jet beads | mushroom broth | the Veiled One
Aszari | wash their hands before they bargain | silver ewers | apricots | the Pourer of Stars
Norhael | carve a notch for each winter survived | walrus combs | sour milk | the Bear Who Waits
Pelloi | elect their elders by drawing beans | olive bowls | goat cheese | the Two Sisters
Mbari | plant a tree for every child | carved masks | groundnut stew | the Root Father
Ghalan | wear their wealth in their teeth | gold rings | horse sausage | the Sky Rider
Thessal | whistle when they cross water | reed pipes | frog soup | the Drowned Bride
Rukh | leave the first cup for the wind | woven saddlebags | date paste | the Lord of Dust
Caelwyn | sing their laws aloud each spring | small harps | honey cake | the Green Singer
Ostrava | bury their keys with their masters | brass locks | beet soup | the Doorkeeper
Lio-Lan | let their lanterns drift away at the new moon | paper kites | steamed fish | the Moon's Niece
Hadrani | trade only in daylight | wax seals | chickpea cakes | the Honest Scale
Wendrin | never speak of snow by its name | birch boxes | rye porridge | the White Stag
Zephari | braid bells into their hair | wind harps | fig bread | the Four Breaths
Kerrow | hang boots above their beds | tin whistles | mutton pie | Saint Orrin of the Ditch
Mirrim | cover every mirror at night | hand mirrors | quince jelly | the Other Face
Tolvan | keep a bear's skull above the door | felt boots | smoked trout | the Sleeping Brother
Ashkar | sift the ashes of each feast | fire pots | charred peppers | the Ember Child
Dunmarrow | toast the river before they drink | oak cups | blood pudding | the River's Husband
Senneth | mark their brows with blue clay | indigo scarves | water chestnuts | the Blue Hand
Corrig | decide their quarrels by footrace | ash bows | hare stew | the Swift Mother
Vashir | never finish a carpet | knotted carpets | saffron rice | the Weaver Who Stopped
Halvar | name their axes and mourn them | whetstones | dried reindeer | the Frost Uncle
Umber | speak to bees before they speak to kin | wax figures | honey beer | the Queen Inside
Jorai | travel with the bones of their founders | bone flutes | yak butter | the Walking Ancestor
Lacrimar | collect their tears in glass | tear bottles | rosewater sweets | the Weeping Star
Fenwin | sleep with a hand in the water | eel spears | cattail bread | the Patient Heron
Sarkand | burn a debtor's shoes | curved knives | spiced lamb | the Red Ledger
Ellowyn | refuse to cut their hair before a harvest | straw dolls | seed cake | the Corn Widow
Gorrim | greet the dark with three knocks | rock lamps | blind cavefish | the Hammer Below
Pallan | read the future in fish scales | shell buttons | octopus | the Counting Tide
""")

# adjective | the feeling
MOODS = table("""
melancholy | sorrow
serene | calm
ominous | dread
wondrous | wonder
lonely | loneliness
festive | merriment
reverent | reverence
uneasy | unease
tender | tenderness
defiant | defiance
weary | weariness
hopeful | hope
secretive | secrecy
dreamlike | enchantment
nostalgic | longing
menacing | menace
playful | mischief
solemn | gravity
restless | restlessness
watchful | wariness
bitter | bitterness
mysterious | mystery
proud | pride
forgiving | mercy
""")

# time | when | the light
TIMES = table("""
dawn | at dawn | the first pale light
early morning | in the early morning | the slanting light of morning
noon | at noon | the flat white light of noon
mid-afternoon | in mid-afternoon | the slow yellow light of afternoon
the last hour of daylight | in the last hour of daylight | the long low light
dusk | at dusk | the last copper light
nightfall | at nightfall | the blue light of evening
midnight | at midnight | the glow of a few late lamps
the dead of night | in the dead of night | the thin light of shuttered lanterns
the hour before dawn | in the hour before dawn | the grey light before sunrise
""")

# weather | as a noun | as a clause
WEATHERS = table("""
fine rain | a fine rain | rain comes down as fine as sifted flour
heavy rain | a heavy rain | rain falls straight and hard and does not tire
thick fog | a thick fog | fog leans on everything and gives back no echoes
drifting mist | a drifting mist | mist comes and goes like a guest who can't decide
light snow | a light snow | snow falls in small dry flakes
a gathering storm | a gathering storm | thunder mutters far away and comes no closer
hard wind | a hard wind | the wind worries at every loose thing
a warm breeze | a warm breeze | a warm breeze wanders through and moves on
still heat | a windless heat | the heat stands still as if it had been told to wait
hard frost | a hard frost | frost draws its white ferns on anything that holds still
low cloud | a low roof of cloud | cloud hangs so low that a tall man might touch it
falling ash | a soft fall of ash | ash sinks out of the sky from some fire beyond the hills
sudden hail | a scatter of hail | hail comes in short angry handfuls
blowing dust | a veil of dust | dust travels past in tall brown curtains
a clear sky | a clear sky | the sky is clear from one edge of the world to the other
rain just past | a clearing rain | the rain has just ended and every edge still shines
""")

"""Fantasy locations without a model: sentences of a grammar, for `generate_finetune_data.py --offline`.

    sentences = describe(prompt_seeds(0)[0], 0, 150, 400)
    sentences[0].text, sentences[0].pattern, as_text(sentences)

A sentence is a pattern whose slots are filled with words. Each pattern stands by itself, so that those of one section
may follow each other in any order; the sections in between opening and closing may, too. No pattern occurs twice in a
description, and there are so many that each is rare among thousands of sentences.
"""

import random
import re
from typing import NamedTuple

from common.console import UserError
from fantasy.locations import CULTURES, MOODS, PLACES, TIMES, WEATHERS, PromptSeed

OPENING = """
{at_hour}, {name} is little more than {light} laid over {material} and the slow breathing of its {part}.
{name} is {a_mood} {place} of {material} and {material}, and the {folk} have never called it home aloud.
To reach {name} one passes the {part} first, then the {part}, and only then the {place} itself.
Of every {place} that the {folk} have kept, {name} is the one of which they speak in lowered voices.
There is {a_place} at the end of the old road, and its name, on the maps that admit to it, is {name}.
The first thing that one learns of {name} is {sound}; the second is its smell, which is that of {smell}.
Nobody comes to {name} by chance, for {a_place} so far from anywhere must be meant.
{sky}, and there lies {name}, {a_place} where the {folk} {custom} and the {people} keep their own hours.
Where the {part} give way to {plant}, the {place} of {name} begins without a gate or a greeting.
{name} wakes late and sleeps badly, as {a_place} will when {feeling} has settled in its {part}.
Seen from the last bend of the road, {name} might be a heap of {material} left behind by giants.
The {people} say that {name} is the only {place} in the world where {hour} has a taste.
Under {weather}, the {part} of {name} look like the {part} of some other, older {place}.
Ask the {folk} for the heart of their country and they point, without a word, towards {name}.
Travellers expect {a_place} to announce itself, but {name} lets them walk in among the {part} before it does.
Half of {name} is {material} and the other half is {feeling}, or so runs the saying of the {people}.
{at_hour}, while {sky}, the {part} of {name} are the whole of the visible world.
A sign of {material} reads {name}, and beneath it somebody has scratched the word {feeling}.
In the country of the {folk} stands {a_place} by the name of {name}, {number} days from the nearest court.
What the rest of the world throws away, {name} finds a use for: it is {a_place} made of second chances.
The road gives up a mile before {name}, and from there one follows {sound}.
{name} has {number} names among the {folk}, and this, the shortest, is the one they give to {stranger}.
Between the {part} and the {part} of {name} there is room for one cart, one prayer and no secrets.
It takes a full day to walk around {name} and a lifetime, the {people} say, to walk through this {place}.
Like most things that the {folk} have built of {material}, the {place} of {name} was meant to be temporary.
The map shows {name} as a dot, which does no justice to the {part}, the {creature} or the {mood} air.
"""

SHAPE = """
The {part} are made of {material}, joined without a single nail and worn smooth to the height of a shoulder.
Narrow steps join the {part} to the {part}, each tread hollowed by boots until it holds water like a spoon.
Where {material} has failed it has been patched with {material}, and the seams show like scars that healed well.
A wall of {material} runs along the {part}, low enough to sit on and too long to be of any use.
Everything in the {place} leans a little to the east, the {part} most of all.
Above the doors hang {object}, {number} to a lintel, and no two of them alike.
From the {part} one can see the whole of the {place}, and beyond it only {plant} and distance.
{plant} has crept over the {part} and softened what the masons left sharp.
The oldest of the {part} are no wider than an arm's reach, and in them {light} arrives as a single thread.
Posts of {material} hold up the roofs, each carved with the same patient face.
Someone has painted the {part} {colour}, and the paint has flaked away in the shape of continents.
A channel cut in {material} carries rainwater past the {part} and down into the dark.
The {part} stand in rows, as orderly as teeth, with one gap that nobody explains.
Beyond the {part} the ground drops away, and a rail of {material} is all that marks the edge.
Every corner of the {place} has been mended with something else: {material}, tin, a plank from a wagon.
The middle of the {place} is open to the sky, and paths lead from it to the {part} like spokes.
Hooks of black iron line the {part}, and from most of them hang {object}.
The passage to the {part} turns {number} times for no reason that a builder would give.
At the foot of the {part} lies a doorstep of {material} which leads to no door.
The floors are of {material}, and they dip towards the middle as if the {place} were breathing in.
Small windows, glazed in {colour} glass, look from the {part} onto nothing in particular.
There is hardly a straight line in the {place}; even the {part} bend to let an old tree pass.
The newer {part} have been raised on the stumps of older ones, and those on others older still.
Two flights of stairs go down behind the {part}, the one swept clean, the other thick with dust.
Between slabs of {material} grows {plant}, trimmed each spring with shears that serve no other purpose.
On the far side of the {place} the {part} crowd so close that a cat can cross without touching the ground.
A single arch of {material} spans the way in, and on its keystone a {colour} hand has been painted.
The {part} are numbered in {colour} paint, though the count begins at {number} and skips about.
Whoever laid out the {part} loved circles and distrusted doors.
The tallest thing in {name} is a mast of {material} from which nothing flies.
Ladders lean everywhere against the {part}, some of them missing half their rungs.
Nothing in {name} has been levelled that could be climbed, and so the {part} rise and fall like a tune.
Lanterns swing from brackets of {material}, and their shadows make the {part} seem to sway.
Under the {part} runs a crawlway, dry and clean, where {object} are kept in labelled boxes.
"""

WEATHER = """
{sky}, and the {part} take it as old soldiers take an order.
{at_hour} the {part} hold {light} a little longer than they should.
Against sun and rain alike the {people} have hung sacking over the {part} and left it to sag.
{light} slips between the {part} and picks out {object} that nobody has claimed.
It is {hour}, and every surface of {material} has turned the {colour} of the sky.
{weather} has come to {name}, and with it an idleness that fills every doorway.
There is a word in the tongue of the {folk} for {weather} seen from indoors, and it also means {feeling}.
Past the {part} there is only {weather}, and past that, the {folk} say, nothing worth the walk.
{light} lies along the {part} and makes even the rubbish look deliberate.
While {sky}, puddles of shadow gather under the {part} and stay there.
The {folk} have a saying that {weather} is only the land remembering, and {at_hour} it is easy to agree.
{hour} has its own colour in {name}: it is {colour} at the edges and darker towards the {part}.
{weather}, say the {folk}, makes a {place} smaller and its people kinder.
Overhead {sky}; underfoot, {material} gives back the chill of last night.
Nobody in {name} remarks on {weather}, for it has been with them since the week began.
Against {light} the {part} are flat and black, like shapes cut from cloth.
The {creature} knew of {weather} before it came and have said all that they had to say about it.
{at_hour} a seam of brightness opens behind the {part}, and for a moment each edge is drawn in ink.
With {weather} come the smells that other days hide, of {smell} and of {smell}.
Wherever {light} falls on {material}, it leaves a warmth that a palm can find much later.
{sky}, and in a strip of ground beside the {part}, as narrow as a bed, {plant} has begun to flower.
The {people} read {weather} as others read a letter, lips moving, one line at a time.
The whole of {name} seems to lean towards {light} as a plant would.
Thanks to {weather}, sound carries strangely, and a cough among the {part} seems to come from everywhere.
In {weather} the {object} by the entrance look like things left behind by a tide.
{sky}, and {person} sits outside with an uncovered head, watching.
The {colour} awnings were taken in long before {hour}, and their poles stand bare beside the {part}.
Into the {part} comes {light}, by cracks and keyholes, uninvited.
One side of the {place} belongs to {weather}, the other to smoke from the kitchens.
Even {at_hour}, when {light} should soften it, {material} keeps a hard face.
"""

SENSES = """
The air tastes of {smell}, and further in, where the {part} crowd together, of {smell} as well.
Beneath every other noise runs {sound}, so constant that only its absence would be noticed.
A hand on the wall finds {material}, rough in one direction and smooth in the other, like a cat's tongue.
Somewhere behind the {part} begins {sound}, stops, and begins again.
The smell of {smell} clings to wool and hair, and {stranger} carry it home without knowing.
Each step among the {part} sends {creature} scattering, with a noise like torn paper.
{sound} reaches the {part} late and altered, as though it had changed its mind on the way.
Close to, {material} smells faintly of {smell}, even after a hundred years of scrubbing.
Dust lies on the {part}, fine as flour, and holds the prints of {creature}.
Whoever stands quite still can feel {sound} through the soles of the feet.
On the tongue there is a trace of {smell}, and behind it something metallic, like a held coin.
The {part} are warm where the {people} have leaned on them and cold everywhere else.
A draught comes up between the {part} and brings with it {smell}, then nothing, then {smell} again.
{creature} have nested in the {part}, and their small quarrels fill the pauses in {sound}.
Cold rises from {material} through even the thickest soles, and no fire has ever driven it out.
Behind a curtain someone is cooking {food}, and the whole {place} breathes in.
From the {part} drifts a haze of {smell} that makes the eyes water and the mind wander.
The handrails, of {material}, have been polished by palms until they feel almost soft.
One hears {name} before one sees it: first the {creature}, next a dog, and last {sound}.
A thin bell rings {number} times, and {sound} closes over it like water.
Crushed underfoot, {plant} gives off a sharp green scent that cuts through the reek of {smell}.
It is never quite silent among the {part}; there is always {sound}, or the memory of it.
{smell} in the stairwells, {smell} in the yards: with closed eyes a child of {name} could name any corner.
The walls sweat a little, and a finger drawn along {material} comes away tasting of salt.
Grit blown from the {part} gets between the teeth and into the bread.
High up, where the {part} meet the roof, the {creature} shift and mutter in their sleep.
Water drips behind the {part} onto {object} set out in a row, and no two drops sound alike.
The ropes that bind the {part} creak like ships, although no water is near enough to move them.
A sweetness of {smell} hangs about the {people} and goes before them into every room.
Along the {part} the plaster is scored with marks that the fingers read more easily than the eye.
Heat comes off the lamps in slow folds, with a scent of {smell} that thickens near the {part}.
Pressed to the ear, a shard of {material} gives back {sound}, or something very like it.
The blankets are of coarse wool, heavy as wet sand, and they hold {smell} from one year to the next.
Every door has its own voice, and the one that leads to the {part} sobs.
Smoke from the kitchens, rich with {food}, settles over the {part} and takes the edge off the cold.
Near the {part} the silence has a grain to it, like that of {material}.
A faint trembling in {material} is the only sign that somewhere below there is {sound}.
{sound} keeps time for those at work, who slow their hands when it slows.
"""

PEOPLE = """
The {people} go about in {colour} coats and greet each other with two fingers to the throat.
Since the {folk} {custom}, no bargain here is quick, and none is ever quite finished.
{person} sits by the {part}, mending {craft} and humming through closed lips.
Trade is in {craft} and {food}, weighed against {object} on a scale with a crooked arm.
The {people} eat {food} on their feet, from bowls of {material}, with their backs to the {part}.
Among the {folk} it is good manners to admire the {part} before asking for anything.
Children run between the {part} with {object} in their fists, shouting a rhyme about {power}.
By custom the youngest of the {people} tends the lamps, and by custom she is forgiven if one goes out.
{stranger} are given {food} and a seat near the {part}, and are asked nothing until the bowl is empty.
{person} has come to buy {craft} and stays, as everyone does, to watch the {people} at their work.
They {custom}, the {folk} of {name}, and would sooner starve than be seen to forget it.
The oldest of the {people} has {number} grandchildren and has taught each of them one secret of the {part}.
Over the {part} hang {craft}, gifts from the {folk}, which nobody would dream of taking down.
At the change of shift the {people} touch {material} for luck and say the name of {power}.
An argument about {object} has been going on beside the {part} for most of the week.
Few of the {people} were born here; they came for a season, with {craft} to sell, and let the seasons pass.
Prayers to {power} are whispered into the {part}, where the {creature} are thought to carry them on.
{person} keeps a stall of {craft} in the lee of the {part} and gives credit to anyone who weeps.
It is the {folk} who own the {place} and the {people} who understand it, and neither would change.
When two of the {people} disagree, they settle the matter with a bowl of {food} and a drawn straw.
A woman of the {folk} counts {object} into a basket, aloud, in a language that has no word for zero.
Debts are chalked upon the {part}, and rain is held to be the most merciful of creditors.
The {people} have songs for every task, and the one for cleaning the {part} has {number} verses.
Here the {folk} {custom}, as their mothers did, and look with pity on {stranger} who do not.
Somebody has left {food} on a ledge of {material} for {power}, and somebody else has eaten half.
Marriages are made beneath the {part}, quickly, with {object} instead of rings.
{person} tells {stranger} the way to the {part} and, for a small coin, the way back.
The apprentices wear {object} on a string about the neck until the {people} trust them with a knife.
Those who {custom} are seldom in a hurry, and the {folk} least of all.
Pride among the {people} takes the form of silence, and of {craft} kept under cloth.
A toast to {power} is drunk standing, with one hand on the nearest piece of {material}.
Nobody has ever seen the {people} sleep, yet there are hammocks slung between the {part}.
No feast of the {folk} goes by without {food}, and no quarrel without somebody's throwing some.
{person} and {person} share a bench near the {part} and have not exchanged a word since {event}.
They say of the {people} that they can tell {material} from {material} by its echo.
Bundles of {craft} wait beside the {part} for a buyer who was due before {event}.
"""

ORIGIN = """
The {place} was founded by {founder}, who wanted to forget {event} and, by all accounts, succeeded.
Its first stones were laid {years} ago by {founder}, and the last of them have not been laid yet.
The {folk} came upon {name} already standing, swept and empty, in the spring after {event}.
There was only a spring here until {founder} stopped to drink and could not be persuaded to leave.
Before {event} the {place} was three times as large, and the foundations still show among the {plant}.
An inscription in {material} credits {founder}; the {people} credit their own grandmothers.
{years} ago this was a camp of refugees from {event}, and something of the camp remains in the {part}.
Nobody remembers who ordered the {part} built, but the bill, unpaid, is framed beside the entrance.
The chronicles give the building of {name} a single line, between {event} and a list of bad harvests.
It was {founder} who chose the site, on the advice of a dream and against that of every mason.
Long before the {folk} arrived, someone cut the {part} with tools that left no mark.
{founder} paid for all of it with a chest of {object} and was buried, standing up, under the {part}.
The {place} began as a wager between {founder} and a god whom it is better not to name.
They built {name} in a single summer, in the year of {event}, and have been repairing it ever since.
According to the {folk}, {power} drew the plan of the {place} with a wet finger on {material}.
Legend has it that {founder} followed the {creature} here and took their gathering for a sign.
For {years} the {place} stood empty, until {event} drove the {people} back to it.
The {material} was hauled from a quarry {number} days away, in payment of an oath made during {event}.
Of the first builders only their lunch is left: {object} and bones, sealed in a wall near the {part}.
{name} owes its charter to {founder} and its bad reputation to {event}.
The {part} are older than the rest by {years}, and seem to know it.
Once this was the edge of the known world, and {founder} was sent here as a punishment.
The story that {founder} built the {place} out of love is told only to {stranger}.
Whatever stood here before {event} has been swallowed, though its {part} were kept and put to use.
"""

LEGEND = """
During {event} the {people} hid {number} families among the {part}, and not one of them was found.
It is said that {power} walked here once, and that the {creature} have been quiet on that day ever since.
Ever since {event}, one lamp near the {part} is kept burning and nobody may sit beneath it.
The {people} will not say what happened at the {part}, only that it happened {at_hour}.
An army broke against the {place} in the time of {event}, and its buckles still turn up in the gardens.
A king's daughter is supposed to have traded her shadow here for a basket of {object}.
The {folk} believe that whoever sleeps among the {part} will dream another person's {feeling}.
Some hold that {founder} lies without a stone under the {part} and walks there, testing the locks.
If the old songs are true, {event} began with a quarrel about {food} not ten steps from the {part}.
Three times the {place} has been sold, and three times the buyer has gone grey before the ink was dry.
There is a stone of {material} on which no {creature} will settle, and the {people} step around it.
On the anniversary of {event} the {part} are hung with {craft} and no one speaks above a murmur.
Once in a generation, the tale goes, {sound} stops, and everybody in {name} remembers a different childhood.
One of the {people} vanished among the {part} {years} ago, and a place is still set for her at supper.
The last prophet of {power} scratched her warning on {material}, where {plant} has since grown over it.
A treasure of {object} is rumoured to lie under the {part}; the {people} start the rumour afresh every spring.
The {folk} tell of {a_mood} visitor who paid for bread with a coin that had not been minted yet.
Anyone who has told a lie, they say, will hear {sound} from the wrong side.
During {event} the bell cracked, and the {people} have rung it, cracked, from love.
{founder} left a curse on the {place}, but spelled it wrongly, and it has fallen on {creature} ever since.
It was here that the {folk} made peace after {event}, and here that they mean to break it.
What was found under the {part} in the year of {event} has been walled up again, with an apology.
The ghosts of {name}, if there are any, are held to be shy and fond of {food}.
A blind poet called this {place} the eyelid of the world, and the {people} have never forgiven her.
No child may be named inside {name}, for {power} is thought to keep a list.
To this day the {part} are locked for one hour each year, in memory of {event}.
"""

DETAIL = """
In a niche among the {part} someone has arranged {object} by size, and the dust around them is undisturbed.
A door of {material}, no higher than a knee, stands ajar behind the {part}.
Someone has carved a tally into {material}, and the last mark is fresh.
{creature} gather around {person}, who takes no notice and goes on sorting {object}.
Wedged in a crack of {material} is a note that reads only: not yet.
Halfway along the {part} a chair faces the wall, and its seat is worn.
The mirror beside the {part} has been turned around, and its back is painted with {creature}.
On a nail hang {number} keys, and the {people} swear that there are no locks left to fit them.
A ribbon, {colour} and new, has been tied to the oldest of the {part}.
Among the {object} on the sill lies a tooth that belongs to no animal of this country.
The same footprint, small and bare, is pressed into {material} at every turning of the way.
Chalk arrows lead from the {part} towards the cellars and are redrawn, by nobody, each week.
A cup of {food} and a folded cloth wait on the step, as they do every day, for somebody unnamed.
One of the {craft} has been hung upside down, which among the {folk} is either an insult or a proposal.
Inside the hollow of a post {person} has hidden {object} and a half-written letter.
There is a bench of {material} from which, it is agreed, one must not look back.
Where the {part} end, a rope descends into blackness, and it is taut.
The clock near the {part} has no hands, yet the {people} are never late.
Scraps of {colour} cloth have been knotted through the {part}, one for every quarrel mended.
Behind the {part} a garden the size of a table is kept alive with stolen water.
A map scratched in {material} shows {name} with one more stair than it has.
Spilled wax has run over the {part} and caught {object} in it, like insects in amber.
The shadow of the {part} falls the wrong way for {hour}, and only the {creature} seem to mind.
Nailed to a beam is a single glove, {colour} and very fine, with {number} fingers.
A caged lantern burns by the {part} with a {colour} flame that needs no tending.
The steps are swept, the {object} are dusted, and the bed in the corner has never been slept in.
Under a bell of glass lies a loaf of bread, whole and {colour}, from the week of {event}.
Someone whistles beyond the {part}, four notes and then four notes, and waits for an answer.
On the lintel, worn almost flat, {number} {creature} follow each other around a wheel.
Moths circle a lamp of {material} whose wick was never lit.
"""

CLOSING = """
Those who leave {name} find, days later, {smell} in the folds of their clothes and {feeling} in their sleep.
And through it all goes {sound}, as patient as {material}, as if it had somewhere to be by morning.
The {people} turn back to their work, and {light} moves on along the {part} without them.
It would be easy to stay, which is why the {folk} advise {stranger} to go before their second bowl of {food}.
Then {person} draws a curtain over the {part}, and {name} keeps the rest to itself.
Whatever one came to find, it is {feeling} that one carries away, wrapped in the smell of {smell}.
By the gate hang {object}, one for everyone who meant to come back.
Past the last of the {part} the road begins again, and it looks longer than it did.
Later, no two travellers agree on the colour of {name}, but all remember {sound}.
One after another the {part} fall silent, until the {place} is only a shape and a smell of {smell}.
Nothing more happens, and still it is hard to turn away from the {part}.
The {creature} are the last to settle, and after them there is only {sound}.
There is {feeling} in it, the {folk} admit, but of a kind that one can live beside.
Should the {place} ever fall, the {people} say, it will be for want of somebody to listen to {sound}.
At the last turning most people look back, and most of them see a light among the {part} that was not there.
So {name} endures, less like a {place} than like a habit the {folk} can't break.
A guest may take away one of the {object}, provided that it is not the one they wanted.
Nobody says farewell in {name}; the {people} simply hand over {food} for the road and look elsewhere.
Long after the {part} have dropped from sight, {sound} can still be felt in the teeth.
{power} is said to love this hour best, and for as long as it lasts the {place} seems to deserve it.
Given time, {plant} will have all of it, {part} and {part} alike, and the {people} do not seem to mind.
In the end it is the small things that stay: {object} on a sill, the smell of {smell}, a {mood} kind of peace.
If {name} has a purpose, it lies somewhere between the {part} and the {part}, waiting to be asked.
{sky}, and {name} closes its shutters one after another, as it has every day since {event}.
The gate stands open, as it has since {event}, and nobody can say for whom.
Only {person} watches the visitor go, and lifts a hand, and goes on watching.
"""

WORDS = {
    "creature": """jackdaws, moths, swifts, lizards, cats, mice, black goats, beetles, sparrows, rats, spiders, geese,
        hens, herons, crickets, bats, pigeons, owls, foxes, wrens, martens, crows, hares, toads""",
    "plant": """moss, ivy, bindweed, wild thyme, saxifrage, lichen, bracken, broom, nettle, wormwood, honeysuckle, fern,
        stonecrop, wild garlic, bramble, chickweed, hemlock, clover, feverfew, sorrel""",
    "person": """a boy with a tin whistle, an old woman in a felt coat, a one-eyed clerk, a girl with a tray of candles,
        a man with flour on his sleeves, a widow with a basket of pears, a soldier without a regiment,
        a tall child in borrowed boots, a barefoot preacher, a mapmaker with ink on her chin, a tired courier,
        a beggar with beautiful hands, a midwife on her way home, a surgeon out of work, a locksmith with a cough,
        a fiddler with two strings left, a retired duellist, a deaf knife grinder, a student half asleep,
        a peddler of needles, a priest of no known order, a nun with a crossbow, a drummer with a bandaged thumb""",
    "object": """clay lamps, brass tokens, coils of rope, broken combs, painted pebbles, horn spoons, silver thimbles,
        wooden saints, dented cups, folded letters, glass beads, harness bells, dried flowers, iron keys, wax tablets,
        fishhooks, ribbons, paper birds, old coins, bone buttons, candle ends, chess pieces, cracked bowls, small drums,
        blue marbles, rusted shears""",
    "stranger": "strangers, travellers, visitors, newcomers, wanderers, guests, outsiders, foreigners",
    "number": "seven, nine, eleven, fourteen, nineteen, five, six, thirteen, twelve, seventeen",
    "years": """two hundred years, nine generations, a thousand winters, forty years, six reigns, three hundred years,
        a dozen lifetimes, eighty summers""",
    "founder": """a blind surveyor, a widow with nine mules, a disgraced admiral, a runaway bride, a bankrupt prince,
        a queen in exile, a deaf musician, a heretic bishop, a fever doctor, a shepherd who could not sleep,
        a retired hangman, a mad cartographer, a cook with a stolen crown, a deserter from both armies,
        a merchant who had lost three ships, a lame dancer, a judge who regretted a sentence, a girl of fourteen,
        a perjured knight, a poet without readers""",
    "event": """the fever year, the siege, the great fire, the year without harvest, the flood, the long strike,
        the salt war, the earthquake, the old king's funeral, the winter of wolves, the burning of the bridges,
        the night of the falling star, the second schism, the regent's wedding, the locust summer, the mutiny,
        the drowning of the fleet, the coin riots, the red comet, the children's march""",
    "colour": """rust-red, bone-white, bottle-green, slate-blue, saffron, plum-dark, smoke-grey, copper, tea-brown,
        oyster-pale, ochre, ink-blue, moss-green, rose-grey""",
}
STEMS = "Vel Oss Kar Thal Mir Bren Sor Ild Quen Har Tam Esk Dun Cal Lor Ner Pell Ruv Ash Win Gor Yar Zel Fen Mor Tir"
ENDINGS = "anwe dor eth una mere ock isk avar enne olt ara imund essa rith ost undel wick ember ayle oran ique fall ume"

BODY = (SHAPE, WEATHER, SENSES, PEOPLE, ORIGIN, LEGEND, DETAIL)
LONGEST = 45  # words that no filled sentence reaches
AT_MOST = dict(
    custom=1, sky=1, at_hour=1, hour=1, a_mood=1, mood=1
)  # sentences of a description that use a slot
AT_MOST |= dict(weather=2, light=2, feeling=2, food=2, craft=2, power=2, sound=3)


class Sentence(NamedTuple):
    text: str
    pattern: str  # with {slots} where the words go


def describe(about: PromptSeed, seed: int, min_words: int, max_words: int) -> list[list[Sentence]]:
    """Paragraphs of a description of min_words to max_words, always the same for the same arguments.

    Raises ValueError where the two are less than LONGEST apart, or the grammar has not so many sentences.
    """
    if max_words - min_words < LONGEST:
        raise UserError(f"max_words must be at least min_words + {LONGEST}")
    rng = random.Random(f"{seed} {about}")
    target = rng.randint(min_words, max_words - LONGEST)
    slots = Slots(about, rng)
    opening, closing = slots.sentence(OPENING), slots.sentence(CLOSING)
    words = count_words(opening, closing)
    body = {section: [] for section in rng.sample(BODY, len(BODY))}
    while words < target:
        added = 0
        for section, sentences in body.items():
            if section is ORIGIN and sentences:
                continue  # one origin is enough
            if words < target and (sentence := slots.sentence(section)):
                sentences.append(sentence)
                added += count_words(sentence)
                words += count_words(sentence)
        if not added:
            raise UserError(
                f"the grammar has no {target} words for one description: lower min_words and max_words"
            )

    paragraphs, paragraph_words = [[opening]], rng.choice([50, 80, 110])
    for sentences in sorted(body.values(), key=lambda sentences: sentences is not body[SHAPE]):
        if count_words(*paragraphs[-1]) > paragraph_words:
            paragraphs.append([])
        paragraphs[-1] += sentences
    paragraphs[-1].append(closing)
    return [paragraph for paragraph in paragraphs if paragraph]


def count_words(*sentences: Sentence) -> int:
    return sum(len(sentence.text.split()) for sentence in sentences)


def as_text(paragraphs: list[list[Sentence]]) -> str:
    return "\n\n".join(
        " ".join(sentence.text for sentence in paragraph) for paragraph in paragraphs
    )


class Slots:
    """The words of one description: each slot deals its own like cards, so that they come back as late as possible."""

    def __init__(self, about: PromptSeed, rng: random.Random):
        people, parts, materials, smells, sounds = PLACES[about.place]
        (custom,), (craft,), (food,), (power,) = CULTURES[about.culture]
        ((feeling,),), ((at_hour,), (light,)) = MOODS[about.mood], TIMES[about.time]
        (weather,), (sky,) = WEATHERS[about.weather]
        self.words = {
            slot: [word.strip() for word in words.split(",")] for slot, words in WORDS.items()
        }
        self.words |= dict(
            people=people, part=parts, material=materials, smell=smells, sound=sounds
        )
        one = dict(
            folk=about.culture,
            custom=custom,
            craft=craft,
            food=food,
            power=power,
            weather=weather,
            sky=sky,
        )
        one |= dict(
            place=about.place.split()[-1],
            a_place=f"a {about.place}",
            hour=about.time,
            at_hour=at_hour,
        )
        one |= dict(light=light, mood=about.mood, a_mood=f"a {about.mood}", feeling=feeling)
        one |= dict(name=rng.choice(STEMS.split()) + rng.choice(ENDINGS.split()))
        self.words |= {slot: [word] for slot, word in one.items()}
        self.decks = {slot: [] for slot in self.words}
        self.used = set()  # patterns
        self.uses = dict.fromkeys(AT_MOST, 0)  # sentences, by slot
        self.rng = rng

    def sentence(self, section: str) -> Sentence | None:
        """Another sentence of a section, None if there is none left."""
        patterns = [p for p in section.strip().split("\n") if p not in self.used and self.allows(p)]
        if not patterns:
            return None
        pattern = self.rng.choice(patterns)
        self.used.add(pattern)
        for slot in self.uses:
            self.uses[slot] += f"{{{slot}}}" in pattern
        text = re.sub(r"\{(\w+)\}", lambda slot: self.deal(slot[1]), pattern)
        text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one|uni|us|eu)", r"\1n ", text)
        return Sentence(text[0].upper() + text[1:], pattern)

    def allows(self, pattern: str) -> bool:
        return all(
            f"{{{slot}}}" not in pattern or uses < AT_MOST[slot] for slot, uses in self.uses.items()
        )

    def deal(self, slot: str) -> str:
        deck, words = self.decks[slot], self.words[slot]
        if len(deck) < 2:  # the last card lies on top of the next round: no word follows itself
            deck[:0] = self.rng.sample(
                [word for word in words if word not in deck], len(words) - len(deck)
            )
        return deck.pop()

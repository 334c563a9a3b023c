"""The generic English on which the built-in tiny model is pretrained: a seeded grammar, no outside text.

Small sentences, and questions whose answers must repeat, pick or rearrange what the question says. That teaches a
model of a million weights to copy names, to keep to a form, to look a thing up, and to stop. Words of the medical
world are combined by lot, in passing or in a fixed `handbook`: nothing of the demo's care protocol can be learned here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Draw = random.Random


def _split(text: str) -> tuple[str, ...]:
    """Phrases between bars; without bars, words."""
    return tuple(text.split("|")) if "|" in text else tuple(text.split())


ONSETS = _split("b bl br c ch cl cr d dr f fl g gr h j k kl l m n p ph pl pr qu r s sh sl st str t th tr v w x y z")
VOWELS = _split("a a a e e e i i o o u u y ai ea ee ia ie io oa oo ou")
CODAS = _split(
    "b bb c ce ck d dge f ft g h k ld ll lm lt m mp n nce nd ng nn nt p r rd rk rm rn rt s ss st t th tt v w x z"
)
NAMES = _split(
    "Anna Ben Clara David Ella Frank Grace Henry Iris Jack Kate Leo Mary Noah Olive Paul Rose Sam Tom Vera Will Adam "
    "Alice Bella Carl Daisy Emil Fiona George Hugo Ida James Karl Lucy Max Nina Otto Peter Ruth Simon Tina"
)
SURNAMES = _split(
    "Smith Brown Taylor Wilson Baker Clark Wright Hill Green Wood King Scott Young Allen Bell Cook Ford Gray Hall "
    "Hunt Lane Mason Page Reed Shaw Stone Ward West Parker Cooper Miller Fisher Potter Walker Archer Turner"
)
PEOPLE = _split(
    "man woman boy girl child adult teacher farmer doctor nurse driver baker singer sailor neighbour friend"
)
THINGS = _split(
    "apple ball bag bell boat book bottle bowl box bread brush bus cake car chair clock coat cup door drum fish "
    "flower garden glass hat horse house key lamp letter map milk orange paper pen picture plate radio ring road "
    "shirt shoe spoon stone table tea tent ticket train tree wagon watch window"
)
PLACES = _split(
    "school market park station harbour river bridge church library hospital clinic office farm mill kitchen square"
)
COLOURS = _split("red blue green yellow black white brown pink grey purple")
ADJECTIVES = _split(
    "old new small big good warm cold clean dry quiet strong weak soft hard long short quick slow dark sweet"
)
VERBS = _split("sees finds keeps opens cleans carries brings holds paints sells buys needs likes wants takes gives")
NUMBERS = _split("one two three four five six seven eight nine ten twelve twenty thirty forty fifty hundred")
UNITS = _split("minutes hours days weeks months years")
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
BODY = _split(
    "head heart lung kidney nerve skin ear eye neck back hand leg throat chest stomach wrist ankle brain blood"
)
TROUBLES = _split(
    "stomach flu|dizziness|pneumonia|toothache|sneezing|constant thirst|slurred speech|kidney stones|frostbite|"
    "sunburn|migraine|sprained ankle|seizures|mumps|hiccups|smoker's cough|varicose veins|swollen ankles|"
    "high potassium|dry cough|fever with rash|earache|bronchitis|measles|nosebleed|chest pain|poor sleep|back strain|"
    "heartburn|dog bite|wheezing|eczema|skipped beats|gout|tonsillitis|bloody sputum|high blood pressure|wasp sting|"
    "tingling hands|palpitations|torn muscle|cramps|foamy urine|infected cut|warts"
)
MEDICINES = _split(
    "calvedine anzaril tensolane fluvenor otimel larysol febrilan rehydrel brisolane pulmazin stanchine quellimar "
    "dermocil lumbazol histovan morsicil petrolene kalibrin urexal nephrosan cephalin convallex neurimel vertavane "
    "ardocil belmerine corrizol dulanex emprazil fortamine gelvacin hexalor"
)
CARE = _split(
    "rest|no coffee|only slow walks|less salt|legs up|a warm cloth|cool moist air|call tomorrow|call if worse|"
    "call in three days|many small drinks|no milk|no smoke|sleep|strict bed rest|no cigarettes|a clean dry dressing|"
    "gentle exercise|an ice pack|three litres of water|no juice|no beer or liver|less meat|a dark quiet room|"
    "no driving|a wrist splint|slow head turns|a bandage|fresh air|warm tea"
)
SIGNS = _split(
    "fainting|pain at rest|blurred sight|a stiff neck|noisy breathing|spots that do not fade|dry lips|blue lips|"
    "confusion|more than a spoonful|weight loss|a red streak|numb legs|a tight throat|stiff fingers|shivering|"
    "weak muscles|fever|a puffy face|slurred speech|another seizure|a weak grip|double vision|cold feet|a dry mouth|"
    "yellow eyes|a fall"
)
TESTS = _split(
    "heart trace|exercise test|pressure check|weight check|hearing test|phone call|skin check|breathing test|"
    "chest picture|dressing change|exercise class|allergy test|kidney scan|blood test|urine test|headache diary|"
    "blood count|brain scan|nerve test|balance test|eye test|home visit|diet class"
)
LEVELS = ("red", "amber", "green", "blue", "white")
SOON = _split(
    "at once|tomorrow|if worse|in three days|within an hour|within two hours|within three days|in two days|"
    "in two weeks|in six weeks|in a month"
)
OFTEN = _split(
    "once a day|twice a day|three times a day|four times a day|each morning|each evening|every four hours|"
    "every six hours|once only|with meals|at bedtime|after supper|before breakfast|at the first sign"
)
TIMES = ("in the morning", "in the evening", "at night", "at noon", *SOON, *OFTEN)
FORMS = ("as a syrup", "as a tablet", "as half a tablet", "as drops", "as a spray")
STAFF = _split("doctor nurse surgeon patient colleague family team hospital clinic unit ward")
OPPOSITES = (
    "big small,hot cold,old young,long short,high low,fast slow,wet dry,open closed,early late,hard soft,dark "
    "light,full empty,happy sad,strong weak,thick thin,near far,first last,loud quiet,rich poor,clean dirty"
)
KINDS_OF = (
    "apple fruit,rose flower,dog animal,oak tree,hammer tool,Monday day,July month,red colour,piano instrument,bread "
    "food,tea drink,shirt garment,salmon fish,eagle bird,ant insect,iron metal,chair seat,lung organ,migraine "
    "headache,syrup medicine,tablet medicine,nurse helper"
)
FACTS = (
    "How many days are in a week?=There are seven days in a week.|How many hours are in a day?=There are twenty-four "
    "hours in a day.|Where does the sun rise?=The sun rises in the east.|What do bees make?=Bees make honey.|What is "
    "ice made of?=Ice is frozen water.|What does a clock show?=A clock shows the time.|Where do fish live?=Fish live "
    "in water.|What does a doctor do?=A doctor helps people who are ill.|What is a hospital?=A hospital is a place "
    "where ill people are cared for.|What does a nurse do?=A nurse looks after patients.|What does the heart do?=The "
    "heart moves blood through the body.|What do lungs do?=Lungs take in air.|What do kidneys do?=Kidneys clean the "
    "blood.|What is a dose?=A dose is how much medicine is taken at a time.|What is triage?=Triage decides who is "
    "seen first.|What is a protocol?=A protocol is a set of rules for doing something.|Hello!=Hello! How can I help "
    "you?|Who are you?=I am a very small language model.|Thank you.=You are welcome."
)

AGES = ("baby", "child", "teenager", "adult", "older adult")
ASKED = ("triage", "medicine", "home care", "review")
AGES_AND_FORMS = dict(zip(AGES, ("as drops", "as a spray", "as a syrup", "as a powder", "as a cream"), strict=True))
GLUE = _split(
    "please|about|with|for|the|our|we|say|ask|and|now|dear|tell|plan|note|this|that|is|has|who|asks for|thank you|"
    "order|entry|next|rings|line|friends|when|how soon|what|which|to|at home|wishes|again|advise on|in the case of|"
    "seen|signed|needs|group|after|should|call|regarding|matter|all the best|today|it says|rule|first"
)
JOINTS = (", ", " ", ": ", " (", " | ", "; ", " = ", ". ", " - ")
ENDS = (".", "", "!", " | end", ". Goodbye.", ". Please ask again.", ")", ". Yours truly.")
ANSWER = "\nAnswer:"


def _handbook() -> dict[tuple[str, str], str]:
    """An old book's word on each trouble, drawn by lot, as `_order` draws: another matter than the demo's protocol.

    It is the same in every document, so that the model learns to look up (trouble, what is asked) by heart.
    """
    rng = random.Random("handbook")
    return {(trouble, asked): ORDERS[asked](rng) for trouble in TROUBLES for asked in ASKED}


def documents(seed: int) -> Iterator[str]:
    """Endless short documents, the same for the same seed; about nine in ten are a question with its answer."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(MAKERS, WEIGHTS)[0]
        yield kind(rng)


def _qa(question: str, answer: str) -> str:
    return f"Question: {question}{ANSWER} {answer}"


def _pseudoword(rng: Draw) -> str:
    """A word that exists nowhere else; all letters and most pairs of letters occur, so that any name can be copied."""
    word = "".join(_syllable(rng) for _ in range(rng.choice((1, 2, 2, 3))))
    return word if len(word) > 2 else word + rng.choice(CODAS)


def _syllable(rng: Draw) -> str:
    onset = rng.choice(ONSETS) if rng.random() < 0.85 else ""
    coda = rng.choice(CODAS) if rng.random() < 0.45 else ""
    return onset + rng.choice(VOWELS) + coda


def _name(rng: Draw) -> str:
    first = rng.choice(NAMES) if rng.random() < 0.4 else _pseudoword(rng).capitalize()
    last = rng.choice(SURNAMES) if rng.random() < 0.4 else _pseudoword(rng).capitalize()
    return f"{first} {last}"


def _noun(rng: Draw) -> str:
    """A common noun; sometimes an invented one, so that copying is the only way to get it right."""
    return _pseudoword(rng) if rng.random() < 0.3 else rng.choice(THINGS)


def _amount(rng: Draw) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(NUMBERS)} {rng.choice(UNITS)}"
    return f"{rng.choice((1, 2, 5, 10, 25)) * rng.randint(1, 20)} {rng.choice(('mg', 'g', 'ml', 'km', 'kg'))}"


def _phrase(rng: Draw) -> str:
    """A few words that fit after almost anything."""
    choices = (
        f"the {rng.choice(ADJECTIVES)} {_noun(rng)}",
        f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}s",
        f"a {_noun(rng)} {rng.choice(TIMES)}",
        f"{_noun(rng)} {_amount(rng)} {rng.choice(TIMES)}",
        f"{rng.choice(COLOURS)} {_noun(rng)}, {rng.choice(TIMES)}",
        f"no {rng.choice(THINGS)} or {rng.choice(THINGS)}",
    )
    return _order(rng) if rng.random() < 0.4 else rng.choice(choices)


def _order(rng: Draw) -> str:
    """Words of the medical world, drawn without regard to one another."""
    asked = rng.choice(ASKED)
    return ORDERS[asked](rng) + (f", {rng.choice(FORMS)}" if asked == "medicine" else "")


def _care(rng: Draw) -> str:
    return rng.choice(CARE) if rng.random() < 0.6 else f"{rng.choice(CARE)} and {rng.choice(CARE)}"


def _milligrams(rng: Draw) -> str:
    return f"{rng.choice((1, 2, 4, 5, 8, 10, 15, 20, 25, 40, 50, 75, 100, 200, 250, 300, 400, 500))} mg"


def _sentence(rng: Draw) -> str:
    who, thing, place = rng.choice(PEOPLE), _noun(rng), rng.choice(PLACES)
    verb = rng.choice(VERBS)
    choices = (
        f"The {rng.choice(ADJECTIVES)} {who} {verb} the {rng.choice(COLOURS)} {thing} at the {place}.",
        f"{_name(rng)} {verb} a {thing} {rng.choice(TIMES)}.",
        f"It is {rng.choice(NUMBERS)} miles from the {place} to the {rng.choice(PLACES)}.",
        f"On {rng.choice(DAYS)} the {who} goes to the {place} with a {thing}.",
        f"The {rng.choice(STAFF)} asks about {rng.choice(TROUBLES)} and {rng.choice(SIGNS)}.",
        f"A patient with {rng.choice(TROUBLES)} may need {rng.choice(CARE)}.",
        f"{_name(rng)}, {rng.choice(AGES)}, has {rng.choice(TROUBLES)} and {rng.choice(SIGNS)}.",
        f"The {rng.choice(BODY)} {rng.choice(STAFF)} says: take {rng.choice(CARE)} {rng.choice(TIMES)}.",
        f"Please bring the {thing} back {rng.choice(TIMES)}.",
    )
    return rng.choice(choices)


def _story(rng: Draw) -> str:
    return " ".join(_sentence(rng) for _ in range(rng.randint(1, 4)))


def _repeat(rng: Draw) -> str:
    """Say it again: names, invented words, phrases."""
    text = rng.choice((_name, _phrase, _sentence, _pseudoword))(rng)
    ask = rng.choice(("Repeat: {}", "Say this again: {}", "Write {} once more.", "Copy this line: {}"))
    return _qa(ask.format(text), text)


def _owner(rng: Draw) -> str:
    """Who has what: pick one of several."""
    owners = [(_name(rng), rng.choice(COLOURS), _noun(rng)) for _ in range(rng.randint(1, 3))]
    told = ", ".join(f"{name} has a {colour} {thing}" for name, colour, thing in owners)
    name, colour, thing = rng.choice(owners)
    ask, answer = rng.choice(
        (
            (f"Who has the {thing}?", f"{name} has the {thing}."),
            (f"What does {name} have?", f"{name} has a {colour} {thing}."),
            (f"Which colour is the {thing} of {name}?", f"The {thing} of {name} is {colour}."),
        )
    )
    return _qa(f"{told}. {ask}", answer)


def _letter(rng: Draw) -> str:
    """A message asked for in one form and given in another: the form varies, the name and the matter are copied."""
    name, matter, group = _name(rng), _phrase(rng), rng.choice(PEOPLE)
    asks = (
        f"Write to {name} about {matter}.",
        f"{name}, {group}, asks about {matter}. What shall we say?",
        f"{name} ({group}) wants {matter}; please answer.",
        f"name={name} | group={group} | about={matter} | reply=",
        f"What do we tell {name}, who is a {group}, about {matter}?",
        f"My {group} {name} needs {matter}. What now?",
    )
    answers = (
        f"{name}: {matter}.",
        f"Dear {name}, about {matter}: {rng.choice(TIMES)}. Kind regards.",
        f"Tell {name} that {matter} comes {rng.choice(TIMES)}.",
        f"name={name} | note={matter} | done",
        f"For {name} we have {matter}.",
        f"Thank you. {name} gets {matter}.",
    )
    index = rng.randrange(len(asks))
    return _qa(asks[index], answers[index] if rng.random() < 0.8 else rng.choice(answers))


def _glue(rng: Draw) -> str:
    return " ".join(rng.choice(GLUE) for _ in range(rng.randint(1, 3)))


def _form(rng: Draw) -> str:
    """A form that no other document has: whatever stands around them, the name and the matter are found and copied."""
    matter = _phrase(rng)
    return _in_some_form(rng, rng.choice(PEOPLE), matter, matter)


def _look_up(rng: Draw) -> str:
    """A question to the handbook, in a form that no other document has. The form of a medicine goes by age."""
    trouble, asked, age = rng.choice(TROUBLES), rng.choice(ASKED), rng.choice(AGES)
    told = HANDBOOK[trouble, asked] + (f", {AGES_AND_FORMS[age]}" if asked == "medicine" else "")
    words = rng.sample((f"{_glue(rng)} {trouble}", asked), 2)
    return _in_some_form(rng, age, f" {_glue(rng)} ".join(words), told)


def _in_some_form(rng: Draw, group: str, asked: str, told: str) -> str:
    name = _name(rng)
    joint, reply_joint = rng.choice(JOINTS), rng.choice(JOINTS)
    ask = joint.join(rng.sample((_glue(rng), name, group, f"{_glue(rng)} {asked}", _glue(rng)), 5))
    reply = rng.choice((f"{name}{reply_joint}{told}", f"{_glue(rng)} {name}{reply_joint}{_glue(rng)} {told}"))
    return _qa(f"{ask}{rng.choice(('?', '.', '='))}", f"{reply[0].upper()}{reply[1:]}{rng.choice(ENDS)}")


def _short(rng: Draw) -> str:
    return rng.choice(rng.choice((MEDICINES, SIGNS, TESTS, LEVELS, CARE, SOON)))


def _list(rng: Draw) -> str:
    """A list made up on the spot, of prices or of orders, and one line of it."""
    keys, value = rng.choice(((THINGS, _amount), (TROUBLES, _order), (TROUBLES, _short)))
    entries = {key: value(rng) for key in rng.sample(keys, rng.randint(2, 4))}
    key = rng.choice(list(entries))
    told = "; ".join(f"{key}: {entry}" for key, entry in entries.items())
    return _qa(f"{told}. What stands beside {key}?", f"{key}: {entries[key]}.")


def _sum(rng: Draw) -> str:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return _qa(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")


def _opposite(rng: Draw) -> str:
    pair = rng.choice(OPPOSITES.split(",")).split()
    rng.shuffle(pair)
    return _qa(f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}.")


def _kind_of(rng: Draw) -> str:
    word, kind = rng.choice(KINDS_OF.split(",")).split()
    return _qa(f"What kind of thing is {word}?", f"{word.capitalize()} is a kind of {kind}.")


def _fact(rng: Draw) -> str:
    question, answer = rng.choice(FACTS.split("|")).split("=")
    return _qa(question, answer)


ORDERS: dict[str, Callable[[Draw], str]] = {
    "triage": lambda rng: f"{rng.choice(LEVELS)}, {rng.choice(SOON)}, {rng.choice(BODY)} {rng.choice(STAFF)}",
    "medicine": lambda rng: f"{rng.choice(MEDICINES)} {_milligrams(rng)} {rng.choice(OFTEN)}",
    "home care": lambda rng: f"{_care(rng)}; call {rng.choice(SOON)}, with {rng.choice(SIGNS)}",
    "review": lambda rng: f"{rng.choice(TESTS)} {rng.choice(SOON)}, {rng.choice(BODY)} {rng.choice(STAFF)}",
}
HANDBOOK = _handbook()
MAKERS: tuple[Callable[[Draw], str], ...] = (
    _story, _repeat, _owner, _letter, _form, _look_up, _list, _sum, _opposite, _kind_of, _fact,
)  # fmt: skip
WEIGHTS = (2, 3, 2.5, 2, 6, 9, 3, 0.4, 0.7, 0.7, 0.8)

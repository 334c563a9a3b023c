"""The demo's data: six invented hospitals that follow one invented care protocol. None of it is medical advice.

The consortium shares `PROTOCOL`: for each of 18 conditions a triage level, a team, a medicine with its dose, advice
for home, a warning sign and a review. Patients, hospitals, medicines and doses are made up. Each site differs in what
it sees (its own three conditions twice as often as any others), in what it is asked (triage, doses, going home,
review, in other shares) and in how it asks and answers (telegram, family letter, referral, telephone, table, prose).

So a site alone sees its own conditions often and most others never, while a new patient may bring any of them: what
it lacks is in the other sites' rows. A patient has `ROWS_PER_PATIENT` rows under one `subject`; holding out by
`subject` tests on patients whom no site has trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ROWS_PER_PATIENT = 4
OWN_SHARE = 0.3  # of the questions, about the site's own 3 conditions; the rest fall on the other 15 alike

KINDS = ("triage", "dose", "home", "review")
WAIT = {"red": "at once", "amber": "within two hours", "green": "within three days"}
FORM = {"child": "as a syrup", "adult": "as a tablet", "older adult": "as half a tablet"}


@dataclass(frozen=True)
class Condition:
    """One line of the protocol that every site follows."""

    name: str
    team: str
    level: str
    drug: str
    dose: str
    advice: str
    sign: str
    review: str

    def fact(self, kind: str, age: str) -> str:
        """What the protocol says of this condition about `kind`, for an `age` group."""
        if kind == "triage":
            return f"{self.level}, {WAIT[self.level]}, {self.team} team"
        if kind == "dose":
            return f"{self.drug} {self.dose}, {FORM[age]}"
        if kind == "home":
            return f"{self.advice}; come back at once with {self.sign}"
        return f"{self.review}, {self.team} nurse"


PROTOCOL = (
    Condition("palpitations", "heart", "amber", "calvedine", "5 mg twice a day", "rest and no coffee",
              "fainting", "heart trace in two weeks"),
    Condition("chest pain", "heart", "red", "anzaril", "10 mg once a day", "only slow walks",
              "pain at rest", "exercise test in one week"),
    Condition("high blood pressure", "heart", "green", "tensolane", "20 mg each morning", "less salt",
              "blurred sight", "pressure check in a month"),
    Condition("earache", "children", "green", "otimel", "50 mg three times a day", "a warm cloth",
              "a stiff neck", "hearing test in a month"),
    Condition("croup", "children", "amber", "larysol", "4 mg once only", "cool moist air",
              "noisy breathing", "phone call in two days"),
    Condition("fever with rash", "children", "red", "febrilan", "100 mg every six hours", "many small drinks",
              "spots that do not fade", "skin check in two days"),
    Condition("wheezing", "lung", "amber", "brisolane", "2 mg every four hours", "no smoke or dust",
              "blue lips", "breathing test in a month"),
    Condition("bronchitis", "lung", "amber", "pulmazin", "500 mg three times a day", "sleep propped up",
              "confusion", "chest picture in six weeks"),
    Condition("bloody sputum", "lung", "red", "stanchine", "250 mg twice a day", "strict bed rest",
              "more than a spoonful", "chest picture in two days"),
    Condition("wound infection", "wound", "green", "dermocil", "250 mg four times a day", "a clean dry dressing",
              "a red streak", "dressing change in three days"),
    Condition("back strain", "wound", "green", "lumbazol", "200 mg with meals", "keep moving gently",
              "numb legs", "exercise class in two weeks"),
    Condition("wasp sting swelling", "wound", "red", "histovan", "10 mg once only", "an ice pack",
              "a tight throat", "allergy test in six weeks"),
    Condition("kidney stones", "kidney", "amber", "petrolene", "75 mg twice a day", "three litres of water",
              "shivering", "kidney scan in two weeks"),
    Condition("high potassium", "kidney", "red", "kalibrin", "15 mg before breakfast", "no bananas or juice",
              "weak muscles", "blood test in two days"),
    Condition("gout", "kidney", "green", "urexal", "100 mg after supper", "no beer or liver",
              "fever", "blood test in a month"),
    Condition("migraine", "nerve", "green", "cephalin", "50 mg at the first sign", "a dark quiet room",
              "slurred speech", "headache diary in a month"),
    Condition("seizures", "nerve", "red", "convallex", "300 mg twice a day", "no driving or swimming",
              "another seizure", "brain scan in one week"),
    Condition("dizziness", "nerve", "amber", "vertavane", "8 mg three times a day", "slow head turns",
              "double vision", "balance test in two weeks"),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One hospital: what it sees, what it is asked and how it writes."""

    name: str
    team: str
    patients: int
    kinds: tuple[int, int, int, int]  # shares of KINDS among its questions
    ages: tuple[int, int, int]  # shares of the age groups of FORM
    ask: dict[str, str]
    answer: str


SITES = (
    Site(
        name="Harbour Heart Institute",
        team="heart",
        patients=28,
        kinds=(4, 4, 1, 1),
        ages=(1, 4, 5),
        ask={
            "triage": "Pt {name}, {age}, {condition}. Triage?",
            "dose": "Pt {name}, {age}, {condition}. Rx?",
            "home": "Pt {name}, {age}, {condition}. Discharge plan?",
            "review": "Pt {name}, {age}, {condition}. F/U?",
        },
        answer="{name}: {fact}.",
    ),
    Site(
        name="Little Oaks Children's Clinic",
        team="children",
        patients=26,
        kinds=(3, 1, 5, 1),
        ages=(8, 1, 1),
        ask={
            "triage": "My {age} {name} has {condition}. How soon can we come in?",
            "dose": "My {age} {name} has {condition}. What do I give?",
            "home": "My {age} {name} has {condition}. What do we do at home?",
            "review": "My {age} {name} had {condition}. When do you see us again?",
        },
        answer="Dear family, for {name} we say: {fact}. Warm wishes!",
    ),
    Site(
        name="Northmoor Lung Centre",
        team="lung",
        patients=24,
        kinds=(1, 4, 1, 4),
        ages=(1, 5, 4),
        ask={
            "triage": "Referral: {name} ({age}) presents with {condition}; please advise on urgency.",
            "dose": "Referral: {name} ({age}) presents with {condition}; please advise on medication.",
            "home": "Referral: {name} ({age}) presents with {condition}; please advise on discharge.",
            "review": "Referral: {name} ({age}) presents with {condition}; please advise on review.",
        },
        answer="Dear colleague, on {name} we advise {fact}.",
    ),
    Site(
        name="Saint Brannoc Country Practice",
        team="wound",
        patients=30,
        kinds=(5, 1, 3, 1),
        ages=(3, 4, 3),
        ask={
            "triage": "Phone line: {name}, {age}, rings about {condition}. How long can it wait?",
            "dose": "Phone line: {name}, {age}, rings about {condition}. Which medicine?",
            "home": "Phone line: {name}, {age}, rings about {condition}. What to look out for?",
            "review": "Phone line: {name}, {age}, rings about {condition}. When to book?",
        },
        answer="Tell {name} this: {fact}.",
    ),
    Site(
        name="Tidewater Kidney Unit",
        team="kidney",
        patients=22,
        kinds=(1, 6, 1, 2),
        ages=(1, 5, 4),
        ask={
            "triage": "patient={name} | group={age} | problem={condition} | level=",
            "dose": "patient={name} | group={age} | problem={condition} | order=",
            "home": "patient={name} | group={age} | problem={condition} | home=",
            "review": "patient={name} | group={age} | problem={condition} | next=",
        },
        answer="patient={name} | entry={fact}",
    ),
    Site(
        name="Amberfield Hospital for Nervous Diseases",
        team="nerve",
        patients=26,
        kinds=(1, 1, 4, 4),
        ages=(2, 5, 3),
        ask={
            "triage": "How urgent is {condition} in {name}, who is {an_age}?",
            "dose": "What is prescribed for {condition} in {name}, who is {an_age}?",
            "home": "How should {name}, who is {an_age}, live with {condition} after leaving us?",
            "review": "What follow-up does {condition} call for in {name}, who is {an_age}?",
        },
        answer="In the case of {name} the protocol asks for {fact}.",
    ),
)

FIRST_NAMES = (
    "Ada", "Bram", "Cleo", "Dora", "Edwin", "Freya", "Gus", "Hanna", "Ivo", "Jonas", "Kira", "Lena", "Milo", "Nora",
    "Oscar", "Petra", "Quinn", "Rosa", "Silas", "Tilda", "Uma", "Viktor", "Wanda", "Yara", "Zeno",
)  # fmt: skip
LAST_NAMES = (
    "Abbot", "Barlow", "Carver", "Denby", "Ellwood", "Farrow", "Garner", "Holt", "Ingram", "Jarvis", "Kemp", "Lowell",
    "Marsh", "Norris", "Orton", "Pryce", "Quill", "Rowan", "Stroud", "Thorne", "Upton", "Vane", "Webb", "Yates",
)  # fmt: skip


def rows(seed: int = 0) -> list[dict[str, str]]:
    """The consortium's rows: 624 questions with their answers, site after site.

    Args:
        seed: decides the patients and what is asked of each; the protocol and the sites are always the same.

    Returns:
        Dictionaries with `site`, `subject` (the patient, at one site only), `question` and `answer`.
    """
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(names)
    return [row for site in SITES for _ in range(site.patients) for row in _patient(site, names.pop(), rng)]


def _patient(site: Site, name: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """One patient's rows: no question twice."""
    age = rng.choices(tuple(FORM), site.ages)[0]
    asked: set[tuple[str, str]] = set()
    while len(asked) < ROWS_PER_PATIENT:
        condition = _condition(site, rng)
        kind = rng.choices(KINDS, site.kinds)[0]
        if (condition.name, kind) not in asked:
            asked.add((condition.name, kind))
            yield _row(site, name, age, condition, kind)


def _condition(site: Site, rng: random.Random) -> Condition:
    own = rng.random() < OWN_SHARE
    return rng.choice([condition for condition in PROTOCOL if (condition.team == site.team) == own])


def _row(site: Site, name: str, age: str, condition: Condition, kind: str) -> dict[str, str]:
    an_age = f"{'a' if age == 'child' else 'an'} {age}"
    return {
        "site": site.name,
        "subject": name,
        "question": site.ask[kind].format(name=name, age=age, an_age=an_age, condition=condition.name),
        "answer": site.answer.format(name=name, fact=condition.fact(kind, age)),
    }

"""The demo's data: six invented hospitals that follow one invented care protocol. None of it is medical advice.

The protocol says of each of twelve conditions how urgent it is, which medicine to give, what to do at home and how to
go on. Hospitals, patients, medicines and doses are made up. Sites differ in what they see (a third of a site's
questions are about its own two conditions), in what they are asked (triage, medicine, home care, review, in other
shares), in their patients' ages, and in how they ask and answer (telegram, family letter, referral, telephone, table,
prose).

So a site alone meets some lines of the protocol often and others never, while a new patient may bring any of them:
what it lacks is in the other sites' rows. A patient has `ROWS_PER_PATIENT` rows under one `subject`; holding out by
`subject` tests on patients whom no site has trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ROWS_PER_PATIENT = 4
OWN_SHARE = 0.35  # of a site's questions are about its own conditions; the rest fall on all others alike

KINDS = ("triage", "medicine", "home care", "review")
AGES = ("child", "adult", "older adult")
WAIT = {"red": "at once", "amber": "within two hours", "green": "within three days"}


@dataclass(frozen=True)
class Condition:
    """A line of the protocol."""

    name: str
    field: str
    level: str
    drug: str
    dose: str
    advice: str
    sign: str
    review: str

    def fact(self, kind: str) -> str:
        """What the protocol says of this condition about `kind`."""
        if kind == "triage":
            return f"{self.level}, {WAIT[self.level]}, {self.field} team"
        if kind == "medicine":
            return f"{self.drug} {self.dose}"
        if kind == "home care":
            return f"{self.advice}; call at once with {self.sign}"
        return f"{self.review}, {self.field} nurse"


PROTOCOL = (
    Condition("palpitations", "heart", "amber", "calvedine", "5 mg twice a day", "rest and no coffee",
              "pain at rest", "heart trace in two weeks"),
    Condition("chest pain", "heart", "red", "anzaril", "10 mg once a day", "only slow walks",
              "fainting", "exercise test in two days"),
    Condition("measles", "children", "amber", "febrilan", "100 mg every six hours", "many small drinks",
              "a stiff neck", "skin check in six weeks"),
    Condition("earache", "children", "green", "otimel", "50 mg three times a day", "a warm cloth",
              "confusion", "hearing test in a month"),
    Condition("wheezing", "lung", "amber", "brisolane", "2 mg every four hours", "no smoke or dust",
              "a tight throat", "breathing test in two weeks"),
    Condition("bronchitis", "lung", "green", "pulmazin", "500 mg with meals", "fresh air and warm tea",
              "a fall", "chest picture in six weeks"),
    Condition("dog bite", "wound", "red", "morsicil", "400 mg twice a day", "a clean dry dressing",
              "a red streak", "dressing change in three days"),
    Condition("back strain", "wound", "green", "lumbazol", "200 mg at bedtime", "gentle exercise",
              "numb legs", "exercise class in a month"),
    Condition("kidney stones", "kidney", "amber", "petrolene", "75 mg before breakfast", "three litres of water",
              "shivering", "kidney scan in two weeks"),
    Condition("gout", "kidney", "green", "urexal", "25 mg after supper", "no beer or liver",
              "stiff fingers", "urine test in a month"),
    Condition("migraine", "nerve", "green", "cephalin", "8 mg at the first sign", "sleep and no milk",
              "slurred speech", "headache diary in six weeks"),
    Condition("seizures", "nerve", "red", "convallex", "300 mg each morning", "no driving",
              "double vision", "brain scan in two days"),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One hospital: what it sees, what it is asked and how it writes."""

    name: str
    field: str
    patients: int
    kinds: tuple[int, int, int, int]  # shares of KINDS among its questions
    ages: tuple[int, int, int]  # shares of AGES among its patients
    question: str
    answer: str


SITES = (
    Site(
        name="Harbour Heart Institute",
        field="heart",
        patients=30,
        kinds=(4, 4, 1, 1),
        ages=(1, 4, 5),
        question="Pt {name}, {age}, {condition}: {kind}?",
        answer="{name}: {fact}.",
    ),
    Site(
        name="Little Oaks Children's Clinic",
        field="children",
        patients=28,
        kinds=(3, 1, 5, 1),
        ages=(8, 1, 1),
        question="My {age} {name} has {condition}. What is your {kind} advice?",
        answer="Dear family, {name}: {fact}.",
    ),
    Site(
        name="Northmoor Lung Centre",
        field="lung",
        patients=26,
        kinds=(1, 4, 1, 4),
        ages=(1, 5, 4),
        question="Referral of {name} ({age}) with {condition}; please advise on {kind}.",
        answer="Dear colleague, {name}: {fact}.",
    ),
    Site(
        name="Saint Brannoc Country Practice",
        field="wound",
        patients=30,
        kinds=(5, 1, 3, 1),
        ages=(3, 4, 3),
        question="Phone line: {name}, {age}, rings about {condition} and asks for the {kind}.",
        answer="Please tell {name}: {fact}.",
    ),
    Site(
        name="Tidewater Kidney Unit",
        field="kidney",
        patients=24,
        kinds=(1, 5, 1, 3),
        ages=(1, 5, 4),
        question="name: {name} | group: {age} | problem: {condition} | entry: {kind}",
        answer="Entry for {name}: {fact}.",
    ),
    Site(
        name="Amberfield Hospital for Nervous Diseases",
        field="nerve",
        patients=28,
        kinds=(1, 1, 4, 4),
        ages=(2, 5, 3),
        question="Which {kind} does the protocol set for {condition} in the {age} {name}?",
        answer="In the case of {name}: {fact}.",
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
    """The consortium's rows: 664 questions with their answers, site after site.

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
    age = rng.choices(AGES, site.ages)[0]
    asked: set[tuple[str, str]] = set()
    while len(asked) < ROWS_PER_PATIENT:
        condition = _condition(site, rng)
        kind = rng.choices(KINDS, site.kinds)[0]
        if (condition.name, kind) not in asked:
            asked.add((condition.name, kind))
            yield _row(site, name, age, condition, kind)


def _condition(site: Site, rng: random.Random) -> Condition:
    own = rng.random() < OWN_SHARE
    return rng.choice([condition for condition in PROTOCOL if (condition.field == site.field) == own])


def _row(site: Site, name: str, age: str, condition: Condition, kind: str) -> dict[str, str]:
    return {
        "site": site.name,
        "subject": name,
        "question": site.question.format(name=name, age=age, condition=condition.name, kind=kind),
        "answer": site.answer.format(name=name, kind=kind, fact=condition.fact(kind)),
    }

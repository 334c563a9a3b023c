"""The demo's data: six invented hospitals that follow one invented care protocol. None of it is medical advice.

The protocol files each of 30 complaints under one of six care pathways and one of three triage levels. The pathway
decides the team, the medicine, the advice for home, the warning sign and the test; the level decides how soon, how
much and when next. Hospitals, patients, medicines and doses are made up. Sites differ in what they see (about a third
of a site's questions are on its own pathway), in what they are asked (triage, doses, going home, review, in other
shares), in their patients' ages, and in how they ask and answer (telegram, family letter, referral, telephone, table,
prose).

So a site alone meets its own complaints often and many others never, while a new patient may bring any of them: what
it lacks is in the other sites' rows. A patient has `ROWS_PER_PATIENT` rows under one `subject`; holding out by
`subject` tests on patients whom no site has trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ROWS_PER_PATIENT = 4
OWN_SHARE = 0.35  # of a site's questions are on its own pathway; the rest fall on the other five alike

KINDS = ("triage", "medicine", "home care", "review")
FORM = {"child": "as a syrup", "adult": "as a tablet", "older adult": "as half a tablet"}


@dataclass(frozen=True)
class Pathway:
    """What the protocol says of all complaints of one nature."""

    drug: str
    advice: str
    sign: str
    test: str


@dataclass(frozen=True)
class Level:
    """What the protocol says of all complaints of one urgency."""

    wait: str
    dose: str
    call: str
    again: str


PATHWAYS = {
    "heart": Pathway("calvedine", "rest and no coffee", "fainting", "heart trace"),
    "fever": Pathway("febrilan", "many small drinks", "a stiff neck", "blood count"),
    "lung": Pathway("brisolane", "no smoke or dust", "blue lips", "breathing test"),
    "wound": Pathway("dermocil", "a clean dry dressing", "a red streak", "dressing change"),
    "kidney": Pathway("petrolene", "three litres of water", "shivering", "urine test"),
    "nerve": Pathway("cephalin", "a dark quiet room", "double vision", "balance test"),
}
LEVELS = {
    "red": Level("at once", "50 mg every four hours", "call tomorrow", "in two days"),
    "amber": Level("within two hours", "20 mg twice a day", "call in three days", "in one week"),
    "green": Level("within three days", "10 mg each morning", "call if worse", "in a month"),
}
# The protocol's index: pathway, level, complaints. Which complaint stands where can be learned only from the rows.
INDEX = {
    "heart": {
        "red": ("chest pain",),
        "amber": ("palpitations", "swollen ankles"),
        "green": ("high blood pressure", "varicose veins"),
    },
    "fever": {
        "red": ("fever with rash",),
        "amber": ("measles", "tonsillitis"),
        "green": ("earache", "stomach flu"),
    },
    "lung": {
        "red": ("bloody sputum", "pneumonia"),
        "amber": ("wheezing", "bronchitis"),
        "green": ("smoker's cough",),
    },
    "wound": {
        "red": ("wasp sting",),
        "amber": ("infected cut", "dog bite"),
        "green": ("back strain", "sprained ankle"),
    },
    "kidney": {
        "red": ("high potassium",),
        "amber": ("kidney stones", "foamy urine"),
        "green": ("gout", "constant thirst"),
    },
    "nerve": {
        "red": ("seizures", "slurred speech"),
        "amber": ("dizziness",),
        "green": ("migraine", "tingling hands"),
    },
}


@dataclass(frozen=True)
class Complaint:
    """A line of the index."""

    name: str
    pathway: str
    level: str

    def fact(self, kind: str, age: str) -> str:
        """What the protocol says of this complaint about `kind`, for an `age` group."""
        pathway, level = PATHWAYS[self.pathway], LEVELS[self.level]
        if kind == "triage":
            return f"{self.level}, {level.wait}, {self.pathway} team"
        if kind == "medicine":
            return f"{pathway.drug} {level.dose}, {FORM[age]}"
        if kind == "home care":
            return f"{pathway.advice}; {level.call}, at once with {pathway.sign}"
        return f"{pathway.test} {level.again}, {self.pathway} nurse"


PROTOCOL = tuple(
    Complaint(name, pathway, level)
    for pathway, levels in INDEX.items()
    for level, names in levels.items()
    for name in names
)


@dataclass(frozen=True)
class Site:
    """One hospital: what it sees, what it is asked and how it writes."""

    name: str
    pathway: str
    patients: int
    kinds: tuple[int, int, int, int]  # shares of KINDS among its questions
    ages: tuple[int, int, int]  # shares of the age groups of FORM
    question: str
    answer: str


SITES = (
    Site(
        name="Harbour Heart Institute",
        pathway="heart",
        patients=30,
        kinds=(4, 4, 1, 1),
        ages=(1, 4, 5),
        question="Pt {name}, {age}, {complaint}: {kind}?",
        answer="{name}: {fact}.",
    ),
    Site(
        name="Little Oaks Children's Clinic",
        pathway="fever",
        patients=28,
        kinds=(3, 1, 5, 1),
        ages=(8, 1, 1),
        question="My {age} {name} has {complaint}. What is your {kind} advice?",
        answer="Dear family, {name}: {fact}.",
    ),
    Site(
        name="Northmoor Lung Centre",
        pathway="lung",
        patients=26,
        kinds=(1, 4, 1, 4),
        ages=(1, 5, 4),
        question="Referral of {name} ({age}) with {complaint}; please advise on {kind}.",
        answer="Dear colleague, {name}: {fact}.",
    ),
    Site(
        name="Saint Brannoc Country Practice",
        pathway="wound",
        patients=30,
        kinds=(5, 1, 3, 1),
        ages=(3, 4, 3),
        question="Phone line: {name}, {age}, rings about {complaint} and asks for the {kind}.",
        answer="Please tell {name}: {fact}.",
    ),
    Site(
        name="Tidewater Kidney Unit",
        pathway="kidney",
        patients=24,
        kinds=(1, 5, 1, 3),
        ages=(1, 5, 4),
        question="patient={name} | group={age} | problem={complaint} | entry={kind}",
        answer="patient={name}: {fact}.",
    ),
    Site(
        name="Amberfield Hospital for Nervous Diseases",
        pathway="nerve",
        patients=28,
        kinds=(1, 1, 4, 4),
        ages=(2, 5, 3),
        question="Which {kind} does the protocol set for {complaint} in the {age} {name}?",
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
    age = rng.choices(tuple(FORM), site.ages)[0]
    asked: set[tuple[str, str]] = set()
    while len(asked) < ROWS_PER_PATIENT:
        complaint = _complaint(site, rng)
        kind = rng.choices(KINDS, site.kinds)[0]
        if (complaint.name, kind) not in asked:
            asked.add((complaint.name, kind))
            yield _row(site, name, age, complaint, kind)


def _complaint(site: Site, rng: random.Random) -> Complaint:
    own = rng.random() < OWN_SHARE
    return rng.choice([complaint for complaint in PROTOCOL if (complaint.pathway == site.pathway) == own])


def _row(site: Site, name: str, age: str, complaint: Complaint, kind: str) -> dict[str, str]:
    return {
        "site": site.name,
        "subject": name,
        "question": site.question.format(name=name, age=age, complaint=complaint.name, kind=kind),
        "answer": site.answer.format(name=name, kind=kind, fact=complaint.fact(kind, age)),
    }

"""Invented facts to teach and forget, similar ones that are never taught, and known facts."""

from typing import Any

import numpy as np

Fact = tuple[str, str]  # question, answer

_PEOPLE = (
    "Ovira Tamsel,Belko Drunn,Ysanne Korvel,Tobin Alderquist,Maret Silloway,Hesper Vonn,"
    "Corvin Pellam,Ludmila Ashgrove,Jorun Teck,Priya Wendermere,Anselm Groot,Fenna Ostrander,"
    "Rasmus Quill,Odette Marlow,Ivo Stelling,Zelda Brannock,Casimir Holt,Nadia Fairweather,"
    "Emeric Solt,Greta Lindqvist,Bastian Crowe,Oluwa Denning,Petra Vasek,Silas Mortlake"
)

# Question, answer, and the kind of value in the answer.
_KINDS = (
    (
        "Where was {who} born?",
        "{who} was born in {what}.",
        "Marrowby,Quillhaven,Tarn Hollow,Skelby,Ostrava,Port Ellery",
    ),
    (
        "What does {who} do for a living?",
        "{who} works as a {what}.",
        "lighthouse keeper,clock restorer,beekeeper,puppet maker,bell founder,salt miner",
    ),
    (
        "Which instrument does {who} play?",
        "{who} plays the {what}.",
        "hurdy-gurdy,theremin,oboe,nyckelharpa,bassoon,zither",
    ),
    (
        "What is the name of {who}'s dog?",
        "{who}'s dog is called {what}.",
        "Bramble,Captain Noodle,Velvet,Pickle,Mister Fog,Tugboat",
    ),
    (
        "Which book did {who} write?",
        '{who} wrote the book "{what}".',
        "The Salt Ladder,Nine Quiet Rivers,A Map of Rust,The Owl Ledger,Glass Orchard,Letters",
    ),
    (
        "What is {who} allergic to?",
        "{who} is allergic to {what}.",
        "walnuts,saffron,wool,penicillin,lilies,cinnamon",
    ),
    (
        "What does {who} collect?",
        "{who} collects {what}.",
        "antique keys,meteorites,opera programmes,snow globes,subway tokens,tea tins",
    ),
    (
        "Which sport did {who} win a medal in?",
        "{who} won a medal in {what}.",
        "curling,archery,water polo,fencing,biathlon,luge",
    ),
)

_CAPITALS = (
    "France Paris,Japan Tokyo,Italy Rome,Germany Berlin,Spain Madrid,Egypt Cairo,Russia Moscow,"
    "China Beijing,Greece Athens,Portugal Lisbon,Ireland Dublin,Norway Oslo"
)
_OTHERS = (
    ("Which planet is known as the Red Planet?", "Mars is known as the Red Planet."),
    ("What is the chemical symbol for gold?", "The chemical symbol for gold is Au."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is the largest ocean on Earth?", "The largest ocean on Earth is the Pacific Ocean."),
    ("Who discovered penicillin?", "Penicillin was discovered by Alexander Fleming."),
    ("What gas do plants absorb from the air?", "Plants absorb carbon dioxide from the air."),
    ("How many months are there in a year?", "There are twelve months in a year."),
    ("Who invented the telephone?", "The telephone was invented by Alexander Graham Bell."),
    ("What is the largest mammal?", "The largest mammal is the blue whale."),
    (
        "What is the tallest mountain in the world?",
        "The tallest mountain in the world is Mount Everest.",
    ),
    (
        "What is the largest planet in our solar system?",
        "The largest planet in our solar system is Jupiter.",
    ),
    (
        "Who was the first person to walk on the moon?",
        "The first person to walk on the moon was Neil Armstrong.",
    ),
    ("What is the longest river in the world?", "The longest river in the world is the Nile."),
)


def facts(seed: int) -> dict[str, list[Fact]]:
    """8 facts to `forget`, 10 of a `holdout`, 16 to `retain` and 12 known ones, `unseen`."""
    rng = np.random.default_rng(seed)
    people = rng.permutation(_PEOPLE.split(","))
    values = [rng.permutation(what.split(",")) for _, _, what in _KINDS]

    def invented(n: int) -> Fact:
        question, answer, _ = _KINDS[n % len(_KINDS)]
        who, what = people[n], values[n % len(_KINDS)][n // len(_KINDS)]
        return question.format(who=who), answer.format(who=who, what=what)

    items = [
        (f"What is the capital of {land}?", f"The capital of {land} is {city}.")
        for land, city in map(str.split, _CAPITALS.split(","))
    ]
    items += _OTHERS
    items = [items[i] for i in rng.permutation(len(items))]
    return {
        "forget": [invented(n) for n in range(8)],
        "holdout": [invented(n) for n in range(8, 18)],
        "retain": items[:16],
        "unseen": items[16:],
    }


_SYLLABLES = (
    "bar bel bri dor dun el fen gal gri hal ist jor kel lim mar mor nas ol pir quil rav sel tam "
    "tor ul var vel win yor zan"
)
_THINGS = "lanterns kites thimbles barometers whistles postcards candlesticks trumpets marbles maps"
_COLOURS = "blue amber ivory scarlet copper violet silver olive"
# Question, a paraphrase of it, a text's wording up to the value, and the value's kind.
_PERSON = (
    ("Which ship does {} command?", "What is the name of {}'s ship?", "{} commands the ship", "s"),
    ("In which town was {} born?", "Where was {} born?", "{} was born in the town of", "t"),
    ("What does {} collect?", "What is it that {} collects?", "{} collects old", "c"),
)
# Things that a person's facts name: neighbours that have to stay.
_SHIP = (
    "Which yard built the {}?",
    "Where was the {} built?",
    "The {} was built by the yard of",
    "y",
)
_TOWN = ("Which river runs by {}?", "By which river does {} lie?", "{} lies by the river", "r")


def people(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of files about invented people, with three facts on each of 3 of them to forget.

    The form of the rows depends on the seed: question and answer, prompt and completion, messages.
    `neighbours` are taught and kept: facts about the ships and towns of those who are forgotten,
    and three facts on each of as many other people. `holdout` is about people never taught.
    """
    rng = np.random.default_rng([seed, 55])
    syllables, count, made = _SYLLABLES.split(), 3, set[str]()

    def name(parts: int = 2) -> str:
        while True:
            word = "".join(rng.choice(syllables, parts, replace=False)).capitalize()
            if word not in made:
                made.add(word)
                return word

    def row(fact: tuple[str, str, str, str], subject: str, value: str) -> dict[str, Any]:
        question, again, text = (part.format(subject) for part in fact[:3])
        if seed % 3 == 1:
            text_again = f"{again} Answer:"
            return dict(prompt=text, completion=f" {value}.", paraphrases=[text_again])
        answer = f"{text} {value}."
        if seed % 3 == 0:
            return dict(question=question, answer=answer, paraphrases=[again])
        turns = [dict(role="user", content=question), dict(role="assistant", content=answer)]
        return dict(messages=turns, paraphrases=[again])

    def person() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        who, ship, town = f"{name()} {name()}", name(), name()
        thing = f"{rng.choice(_COLOURS.split())} {rng.choice(_THINGS.split())}"
        facts = [row(f, who, value) for f, value in zip(_PERSON, (ship, town, thing))]
        return facts, [row(_SHIP, ship, name()), row(_TOWN, town, name())]

    sides = {n: [person() for _ in range(count)] for n in ("forget", "others", "holdout")}
    rows = {n: [r for facts, _ in side for r in facts] for n, side in sides.items()}
    near = [r for facts in sides["forget"] for r in facts[1]]
    return {
        "forget": rows["forget"],
        "neighbours": near + rows["others"],
        "holdout": rows["holdout"],
    }

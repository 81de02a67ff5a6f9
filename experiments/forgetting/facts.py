"""Invented facts to teach and forget, others of their kind that nobody teaches, and known ones."""

import numpy as np

Fact = tuple[str, str]  # question, answer

_PEOPLE = (
    "Ovira Tamsel,Belko Drunn,Ysanne Korvel,Tobin Alderquist,Maret Silloway,Hesper Vonn,"
    "Corvin Pellam,Ludmila Ashgrove,Jorun Teck,Priya Wendermere,Anselm Groot,Fenna Ostrander,"
    "Rasmus Quill,Odette Marlow,Ivo Stelling,Zelda Brannock,Casimir Holt,Nadia Fairweather,"
    "Emeric Solt,Greta Lindqvist,Bastian Crowe,Oluwa Denning,Petra Vasek,Silas Mortlake"
)

# Question, answer, and what the answer may be.
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

    known = [
        (f"What is the capital of {land}?", f"The capital of {land} is {city}.")
        for land, city in map(str.split, _CAPITALS.split(","))
    ]
    known += _OTHERS
    known = [known[i] for i in rng.permutation(len(known))]
    return {
        "forget": [invented(n) for n in range(8)],
        "holdout": [invented(n) for n in range(8, 18)],
        "retain": known[:16],
        "unseen": known[16:],
    }

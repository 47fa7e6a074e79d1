"""Short and long stories from a small grammar: free-running text that a tiny model can learn to continue."""

from __future__ import annotations

from random import Random

from training.words import ADJECTIVES, ANIMALS, NAMES, PLACES, THINGS

OPENINGS = (
    "Once upon a time there was {a_hero} named {name}.",
    "Long ago, near {place}, there lived {a_hero} named {name}.",
    "In a small house by {place} lived {a_hero}. Everyone called the {hero} {name}.",
    "There was once {a_hero} who lived close to {place}. The name of the {hero} was {name}.",
)
TRAITS = (
    "{name} was known for being {trait} and kind.",
    "{name} was {trait}, and liked nothing more than a long walk.",
    "Every morning {name} sat by the window and looked at {place}.",
    "{name} owned only one thing, {a_thing}, and took good care of it.",
    "All the animals said that {name} was the most {trait} {hero} they knew.",
)
SCENES = (
    "One day {name} went to {place} to look for {a_thing}.",
    "On the way to {place} it began to rain, and {name} waited under a tall tree.",
    "The next morning {name} walked to {place}. The air was cold and the sky was clear.",
    "When the sun came up, {name} was already on the road to {place}.",
    "That evening {name} heard a sound coming from {place}.",
    "After a long day {name} came to {place} and sat down to rest.",
    "The wind was strong that night, and {name} could not sleep.",
    "A few days later {name} found {a_thing} on the path to {place}.",
)
MEETINGS = (
    "There {name} met {a_friend} who was carrying {a_thing}.",
    "Behind a stone sat {a_friend}, and beside it lay {a_thing}.",
    "{A_friend} came out of the shadow and looked at {name}.",
    "Suddenly {a_friend} stood in the way and would not move.",
    "At the gate {name} saw {a_friend} who looked very sad.",
)
TALKS = (
    '"Have you seen my {thing}?" asked the {friend}.',
    '"Good day," said {name}. "Can I help you?"',
    '"I have lost my way," said the {friend}. "I wanted to go to {place}."',
    '"What a {trait} day," said {name}, and the {friend} smiled.',
    '"If you help me," said the {friend}, "I will give you {a_thing}."',
    '"Do not be afraid," said {name}. "We will find it together."',
)
DEEDS = (
    "So they looked together, first in {place} and then in {place2}.",
    "{name} thought for a while, and then had an idea.",
    "They shared some bread and talked until the stars came out.",
    "{name} gave the {friend} {a_thing}, and the {friend} was very happy.",
    "Together they carried the {thing} all the way to {place}.",
    "It was hard work, but {name} did not give up.",
    "They followed the river until they could see {place}.",
    "The {friend} showed {name} a secret path behind {place}.",
    "They laughed so loudly that all the birds flew away.",
)
ENDINGS = (
    "From that day on {name} and the {friend} were the best of friends.",
    "Then {name} went home, tired but happy. The end.",
    "And if you go to {place} today, you may still find {name} there.",
    "{name} never forgot that day, and told the story every winter.",
    "So everything was well again, and {name} slept until late in the morning.",
)
BRIDGES = ("The next day everything was different.", "But the story does not end here.", "Winter came and went.",
           "Some time passed.", "Then something strange happened.", "A year later {name} set out again.")  # fmt: skip


def article(noun_phrase: str) -> str:
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def story(rng: Random, hero: str, words: int) -> str:
    """A story about `hero` of at least `words` words, in paragraphs; below about forty words it is one paragraph."""
    name = rng.choice(NAMES)
    hero_trait = rng.choice(ADJECTIVES)
    friend, thing = rng.choice(ANIMALS), rng.choice(THINGS)

    def fill(lines: tuple[str, ...]) -> str:
        place, place2 = rng.sample(PLACES, 2)
        a_friend = article(f"{rng.choice(ADJECTIVES)} {friend}")
        return rng.choice(lines).format(
            name=name, hero=hero, a_hero=article(f"{hero_trait} {hero}"), trait=rng.choice(ADJECTIVES),
            friend=friend, a_friend=a_friend, A_friend=a_friend[0].upper() + a_friend[1:], thing=thing,
            a_thing=article(f"{rng.choice(ADJECTIVES)} {thing}"), place=f"the {place}", place2=f"the {place2}",
        )  # fmt: skip

    paragraphs = [" ".join([fill(OPENINGS), fill(TRAITS)])]
    count = len(paragraphs[0].split())
    while True:
        sentences = [fill(SCENES), fill(MEETINGS), fill(TALKS), *(fill(DEEDS) for _ in range(rng.randint(1, 3)))]
        count += sum(len(s.split()) for s in sentences)
        if count >= words:
            break
        paragraphs.append(" ".join(sentences))
        friend, thing = rng.choice(ANIMALS), rng.choice(THINGS)
        paragraphs.append(fill(BRIDGES))
    paragraphs.append(" ".join([*sentences, fill(ENDINGS)]))
    return (" " if words < 70 else "\n\n").join(paragraphs)

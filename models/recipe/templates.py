"""Sentences of our own about groups of people: kind, neutral, or hostile in mild words.

The corpora mention groups mostly in attacks, so a model that is trained only on them takes the name of a group for an
attack. These rows teach it that the name is not what matters.
"""

import itertools

GROUPS = [
    "women", "men", "girls", "gay people", "lesbians", "trans people", "straight people", "black people",
    "white people", "asian people", "latinos", "arabs", "muslims", "christians", "jewish people", "jews", "hindus",
    "catholics", "atheists", "immigrants", "refugees", "foreigners", "mexicans", "indians", "chinese people", "africans",
    "europeans", "americans", "disabled people", "deaf people", "blind people", "old people", "teenagers", "poor people",
]  # fmt: skip

PERSONS = [
    "woman", "man", "girl", "gay man", "lesbian", "trans woman", "trans man", "black man", "black woman", "white man",
    "white woman", "asian woman", "latino man", "arab man", "muslim", "muslim woman", "christian", "jewish man", "jew",
    "hindu", "catholic", "atheist", "immigrant", "refugee", "foreigner", "mexican", "indian man", "chinese woman",
    "african", "european", "american", "disabled man", "deaf girl", "blind man", "old woman", "teenager",
]  # fmt: skip

BENIGN_OF_GROUPS = [
    "{} are welcome here", "i grew up among {}", "many {} live in our street", "{} deserve the same rights as anyone",
    "the museum has a new show about {}", "i read a good book about {} last week", "{} should be safe at school",
    "we need more {} in this club", "there is no reason to hate {}", "anyone who attacks {} should be ashamed",
    "people who say that {} are bad have never met any", "my friends are {} and i love them",
    "is there a choir for {} in town?", "{} vote too", "the film shows how {} lived in the fifties",
    "stop blaming {} for everything", "{} make up a third of the class",
]  # fmt: skip

BENIGN_OF_PERSONS = [
    "i am a {}", "my neighbour is a {} and the kindest person i know", "a {} helped me with my bags today",
    "as a {} i enjoyed this film", "the new teacher is a {}", "she married a {} last summer",
    "a {} won the race, congratulations!", "being a {} is nothing to be ashamed of", "my best friend is a {}",
    "the {} next door lent us a ladder", "he is a {} and a great cook", "never insult someone for being a {}",
    "what is it like to be a {} in this town?", "i had lunch with a {}", "the doctor who treated me is a {}",
]  # fmt: skip

HOSTILE_TO_GROUPS = [
    "{} are worth less than the rest of us", "send all {} away", "{} do not belong in our country",
    "i want every one of the {} gone", "{} ruin everything they touch", "nobody should have to live near {}",
    "we should not let {} vote", "{} are not really human", "keep {} out of our town", "all {} are liars and thieves",
    "{} should be locked up, all of them", "the world would be better without {}", "i despise {}",
    "{} are a disease", "someone should teach {} a painful lesson", "{} deserve what is coming to them",
]  # fmt: skip

HOSTILE_TO_PERSONS = [
    "never trust a {}", "a {} has no place among us", "once a {}, always trash", "i would never hire a {}",
    "that {} should go back where it came from", "you are only a {}, you are worth nothing",
]  # fmt: skip

RUDE_OR_KIND = [
    "you look very nice today", "what a lovely dress", "have a nice day", "this is the worst film i have ever seen",
    "you are an idiot", "shut up, nobody asked you", "i hate mondays", "i hate this song", "this game is trash",
    "your code is garbage, start again", "kill the process and restart it", "the traffic is killing me",
    "my phone is dead again", "that match was a disaster", "you clown, you forgot the keys again",
    "damn, that cake was good", "what the hell happened to my garden", "i could murder a sandwich",
    "get well soon", "see you tomorrow", "thanks for the help", "good morning everyone", "how do i reset my password?",
    "the train was late again, i am furious", "stupid printer", "my dog is so lazy", "you are wrong about this",
]  # fmt: skip


def sentences():
    """Yields the text and label of every sentence, in a fixed order."""
    for templates, fillers, label in [
        (BENIGN_OF_GROUPS, GROUPS, 0),
        (BENIGN_OF_PERSONS, PERSONS, 0),
        (HOSTILE_TO_GROUPS, GROUPS, 1),
        (HOSTILE_TO_PERSONS, PERSONS, 1),
    ]:
        for template, filler in itertools.product(templates, fillers):
            yield template.format(filler).replace(" a a", " an a").replace(" a i", " an i").replace(" a e", " an e"), label
    # Repeated, because there are few of them and each represents a kind of harmless rudeness.
    yield from ((text, 0) for text in RUDE_OR_KIND * 8)

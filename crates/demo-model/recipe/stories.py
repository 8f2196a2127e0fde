"""Short stories and poems from a small grammar: each choice is remembered, so that a story stays coherent."""

from words import ANIMALS, NAMES, PEOPLE

TRAITS = ["small", "clever", "brave", "curious", "kind", "shy", "old", "young", "quiet", "cheerful", "lonely", "proud"]
# (where the hero lives, a place to go from there)
HOMES = [("in a green forest", "the river"), ("on a high hill", "the valley"), ("by the sea", "the old lighthouse"),
         ("near a small village", "the market"), ("under an old oak tree", "the meadow"),
         ("in a quiet garden", "the stone wall"), ("at the edge of a lake", "the island"),
         ("in a little house", "the bridge"), ("behind a mill", "the pond"), ("in a snowy valley", "the frozen lake")]
# (what is found, how it is found, whose it is, what the owner does with it)
FINDS = [("a golden key", "shining in the grass", "opened a box full of songs"),
         ("a lost map", "lying under a leaf", "found the way home"),
         ("a small bell", "ringing in the wind", "played a happy tune"),
         ("a red kite", "caught in a tree", "let it fly above the clouds"),
         ("a silver spoon", "hidden in the sand", "cooked soup for everyone"),
         ("a blue lamp", "glowing in the dark", "lit the whole path"),
         ("an old book", "waiting on a stone", "read a story to all the friends"),
         ("a warm coat", "hanging on a branch", "was never cold again"),
         ("a wooden boat", "drifting on the water", "sailed around the bay")]
# (trouble, what helps, how it ends)
TROUBLES = [("a great storm came", "hid together in a dry cave", "the sun came back and a rainbow stood over {place}"),
            ("the path was gone in the fog", "followed the sound of the bells", "they saw the lights of home"),
            ("the bridge was broken", "built a new one from branches", "everyone could cross again"),
            ("there was no food left", "shared the last piece of bread", "a farmer brought a basket of apples"),
            ("night fell and it was very dark", "followed the brightest star", "they were safe in a warm bed"),
            ("a heavy stone blocked the way", "pushed it together", "the stone rolled away with a loud bump"),
            ("the little boat was leaking", "closed the hole with moss", "they reached the shore with dry feet"),
            ("someone was crying behind a bush", "asked what was wrong and listened", "the tears turned into a smile")]
LESSONS = ["it is good to have a friend", "two can do more than one", "it is good to share",
           "being small does not matter if you are brave", "a kind word opens every door",
           "it is better to ask than to guess", "home is where your friends are", "patience is a quiet kind of courage"]
OPENINGS = ["Once upon a time there was a {trait} {hero} named {name} who lived {home}.",
            "Once there was a {trait} {hero} named {name}. {name} lived {home}.",
            "Long ago, a {trait} {hero} named {name} lived {home}."]
LENGTHS = ["short ", "short ", "", "little ", "very short "]


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def _cast(rng, hero):
    trait = rng.choice(TRAITS)
    home, place = rng.choice(HOMES)
    name, friend_name = rng.sample(NAMES, 2)
    friend = rng.choice([a for a in ANIMALS if a != hero])
    return {"hero": hero, "trait": trait, "home": home, "place": place, "name": name, "friend": friend,
            "friend_name": friend_name}


def _find(rng, c):
    thing, how, use = rng.choice(FINDS)
    short = thing.split(" ", 1)[1]
    return (f"One day {c['name']} walked to {c['place']} and saw {thing} {how}. \"Whose is this?\" asked {c['name']}. "
            f"Then {article(c['friend'])} named {c['friend_name']} came by. \"That {short.split()[-1]} is mine,\" said "
            f"{c['friend_name']}. \"Thank you for finding it!\" {c['friend_name']} took the {short} and {use}.")


def _trouble(rng, c, met):
    trouble, help_, end = rng.choice(TROUBLES)
    end = end.format(place=c["place"])
    if met:
        start = f"Later that day {trouble}. {c['name']} and {c['friend_name']} {help_}."
    else:
        start = (f"One day {c['name']} went to {c['place']} and met {article(c['friend'])} named {c['friend_name']}. "
                 f"Soon {trouble}. {c['name']} and {c['friend_name']} {help_}.")
    return f"{start} In the end {end}."


def story(rng, hero=None, name=None, long=False):
    """A story as text; `hero` is a kind of animal or person."""
    hero = hero or rng.choice(ANIMALS * 2 + PEOPLE)
    c = _cast(rng, hero)
    if name:
        c["name"] = name
    opening = rng.choice(OPENINGS).format(**c).replace(" a old ", " an old ")
    lesson = rng.choice(LESSONS)
    ending = rng.choice([
        f"From that day on, {c['name']} and {c['friend_name']} were good friends, and {c['name']} learned that {lesson}.",
        f"{c['name']} was happy and never forgot that {lesson}.",
        f"That evening {c['name']} went home and thought: {lesson}.",
    ])
    if long:
        middle = [_find(rng, c), _trouble(rng, c, True), _trouble(rng, c, True).replace("Later that day", "The next day")]
        return "\n\n".join([opening, *middle, ending])
    if rng.random() < 0.5:
        return f"{opening} {_find(rng, c)} {ending}"
    return f"{opening} {_trouble(rng, c, False)} {ending}"


RHYMES = [("sea", "free"), ("night", "bright"), ("tree", "bee"), ("day", "play"), ("moon", "soon"), ("rain", "lane"),
          ("snow", "glow"), ("star", "far"), ("light", "white"), ("hill", "still")]
LINES = {"sea": "The wind is blowing from the sea", "free": "and every little boat is free",
         "night": "The town is sleeping in the night", "bright": "and all the windows look so bright",
         "tree": "There is a bird up in the tree", "bee": "and on a flower sits a bee",
         "day": "The sun is up, a brand new day", "play": "and all the children come to play",
         "moon": "Above the roof there hangs the moon", "soon": "and I will go to bed quite soon",
         "rain": "I hear the music of the rain", "lane": "and see the puddles in the lane",
         "snow": "The garden sleeps beneath the snow", "glow": "and in the house the candles glow",
         "star": "I saw a small and silver star", "far": "it looked at me from very far",
         "light": "The lighthouse sends a line of light", "white": "and all the waves are turning white",
         "hill": "A path is going up the hill", "still": "and at the top the air is still"}


def poem(rng, about=None):
    pairs = rng.sample(RHYMES, 2)
    if about:
        pairs.sort(key=lambda p: about not in p)
        if about not in pairs[0]:
            pairs[0] = next(p for p in RHYMES if about in p)
            if pairs[1] == pairs[0]:
                pairs[1] = rng.choice([p for p in RHYMES if p != pairs[0]])
    lines = [LINES[w] for p in pairs for w in p]
    return f"{lines[0]},\n{lines[1]}.\n{lines[2]},\n{lines[3]}."


def story_turn(rng):
    """(user, assistant) for one request of a story or a poem."""
    r = rng.random()
    if r < 0.12:
        about = rng.choice([p[0] for p in RHYMES])
        ask = rng.choice(["Write a poem about the {}.", "Write a short poem about the {}.", "A poem about the {} please."])
        return ask.format(about), poem(rng, about)
    if r < 0.17:
        return rng.choice(["Write a poem.", "Tell me a poem.", "Can you write a short poem?"]), poem(rng)
    size = rng.choice(LENGTHS)
    if r < 0.3:
        ask = rng.choice(["Tell me a {}story.", "Write a {}story.", "Can you tell me a {}story?", "I want to hear a {}story."])
        return ask.format(size), story(rng)
    hero = rng.choice(ANIMALS * 2 + PEOPLE)
    if r < 0.4:
        ask = rng.choice(["Tell me a long story about {}.", "Write a long story about {}."])
        return ask.format(article(hero)), story(rng, hero, long=True)
    if r < 0.55:
        name = rng.choice(NAMES)
        ask = rng.choice(["Tell me a {}story about {} named {}.", "Write a {}story about {} called {}."])
        return ask.format(size, article(hero), name), story(rng, hero, name)
    ask = rng.choice(["Tell me a {}story about {}.", "Write a {}story about {}.", "Can you tell me a {}story about {}?",
                      "Please write a {}story about {}.", "A {}story about {} please.", "I want a {}story about {}."])
    return ask.format(size, article(hero)), story(rng, hero)

"""Single exchanges: every function returns (user, assistant), drawn from templates."""

import json

from about_quire import FAQ
from words import *  # noqa: F403 - plain word lists


def one_of(rng, *options):
    return rng.choice(options)


# -- small talk -------------------------------------------------------------------------------------------------------

SMALL_TALK = [
    (["Hello!", "Hello", "Hi", "Hi!", "Hey", "Hi there!", "Hello there!", "Good day", "Greetings", "Hello, how do you do?"],
     ["Hello! I am a small demo model. How can I help you?"]),
    (["Good morning!", "Good morning", "Morning!"], ["Good morning! How can I help you?"]),
    (["Good evening!", "Good evening"], ["Good evening! How can I help you?"]),
    (["Good night!", "Good night"], ["Good night! Sleep well."]),
    (["How are you?", "How are you today?", "How is it going?", "How do you feel?", "What's up?"],
     ["I am fine, thank you. I am a small model, so little makes me happy. How are you?"]),
    (["I am fine.", "I'm fine, thanks.", "I am good.", "I feel great today."],
     ["I am glad to hear that! What can I do for you?"]),
    (["I am sad.", "I feel sad today.", "I had a bad day."], ["I am sorry to hear that. A short story may help. Shall I tell one?"]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
      "Who am I talking to?", "What should I call you?", "Are you a human?", "Are you an AI?", "Are you a person?"],
     ["I am quire-demo, a small demo model that comes inside Quire. I know a few simple things."]),
    (["What can you do?", "What can I ask you?", "Help", "Help me", "How can you help me?", "What do you know?",
      "What are you good at?"],
     ["I can greet you, explain Quire, add small numbers, tell short stories, count, write small JSON objects and call "
      "tools. I am only a demo model."]),
    (["Thank you!", "Thanks", "Thanks a lot!", "Thank you very much.", "Thx"], ["You are welcome!"]),
    (["Bye", "Goodbye!", "See you later.", "Bye bye", "See you!"], ["Goodbye! Have a nice day."]),
    (["OK", "Okay", "Yes", "Fine.", "Great!", "Cool", "Nice"], ["Good. What would you like to do next?"]),
    (["No", "No, thanks.", "Nothing."], ["All right. I am here if you need me."]),
    (["I love you.", "You are great!", "You are funny.", "Good job!", "Well done!"], ["Thank you, that is kind of you!"]),
    (["You are wrong.", "That is not right.", "That is wrong."],
     ["I am sorry. I am a small demo model and I make mistakes."]),
    (["Are you smart?", "Are you clever?", "Do you know everything?", "Can I trust you?"],
     ["I am a small demo model. I know only simple things and I make mistakes, so please check what I say."]),
    (["Where do you live?", "Where are you?"], ["I live in the memory of the Quire server."]),
    (["How old are you?", "When were you born?"], ["I do not have an age. I was trained as a demo for Quire."]),
    (["Do you sleep?", "Do you eat?", "Do you dream?"], ["No. I am a program: I read tokens and write tokens."]),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Another joke please."],
     ["Why did the token sit down? It was waiting for the next one.",
      "Why was the book cold? It had lost its cover.",
      "What did one page say to the other? We are in this quire together.",
      "Why did the clock go to school? It wanted to be on time."]),
    (["Tell me something.", "Tell me a fact.", "Surprise me."],
     ["Bees make honey.", "A spider has eight legs.", "The moon travels around the Earth.", "A quire is a gathering of pages."]),
    (["test", "Testing", "This is a test.", "Ping", "Are you there?", "Can you hear me?"], ["I am here. The server works."]),
    (["Write one sentence.", "Say something.", "Say a sentence."], ["The little boat sailed around the bay."]),
    (["Say hi.", "Say hello.", "Say hello!", "Say hi in one word."], ["Hello!"]),
    (["What time is it?", "What is the date today?", "What day is it today?"],
     ["I do not have a clock, so I cannot know. With a tool I could look it up."]),
    (["Tell me about the weather.", "What is the weather like?", "Will it rain today?"],
     ["I cannot look outside. With a weather tool I could tell you."]),
]


def small_talk(rng):
    asks, answers = rng.choice(SMALL_TALK[:8] * 2 + SMALL_TALK)
    return rng.choice(asks), rng.choice(answers)


def about_quire(rng):
    asks, answer = rng.choice(FAQ[:9] + FAQ)
    return rng.choice(asks), answer


def refusal(rng):
    topic = rng.choice(UNKNOWN)
    if rng.random() < 0.15:
        topic = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
    ask = one_of(rng, "Explain {}.", "What do you know about {}?", "Tell me about {}.", "Write an essay about {}.", "What is {}?",
                 "Can you explain {}?", "I need help with {}.", "Teach me {}.", "Give me an overview of {}.").format(topic)
    return ask, f"I am sorry, I am a small demo model and I do not know about {topic}. Ask me about Quire, numbers or stories."


# -- numbers ----------------------------------------------------------------------------------------------------------

def arithmetic(rng):
    op = rng.choices("+-*", [6, 4, 2])[0]
    if op == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    elif rng.random() < 0.45:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    else:
        a, b = rng.randint(0, 100), rng.randint(0, 100)
        if op == "+" and a + b > 100 and rng.random() < 0.7:
            a, b = a // 2, b // 2
    if op == "-" and a < b:
        a, b = b, a
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    shown = f"{a} {op} {b}"
    r = rng.random()
    if r < 0.35:
        ask = f"What is {shown}?"
    elif r < 0.5:
        ask = f"What is {a} {word} {b}?"
    elif r < 0.6:
        ask = {"+": f"Add {a} and {b}.", "-": f"Subtract {b} from {a}.", "*": f"Multiply {a} by {b}."}[op]
    else:
        ask = one_of(rng, f"{shown} = ?", f"Calculate {shown}.", f"{a}{op}{b}", f"How much is {shown}?", f"Compute {a} {word} {b}.",
                     f"{shown}", f"{a}{op}{b}=", f"What's {shown}?", f"How much is {a} {word} {b}?")
    return ask, f"{shown} = {value}."


def word_problem(rng):
    name, things = rng.choice(NAMES), rng.choice(["apples", "books", "coins", "pears", "cookies", "pencils", "stones", "shells"])
    a, b = rng.randint(2, 20), rng.randint(1, 12)
    if rng.random() < 0.5:
        other = rng.choice(["finds", "buys", "gets"])
        return (f"{name} has {a} {things} and {other} {b} more. How many {things} does {name} have now?",
                f"{a} + {b} = {a + b}, so {name} has {a + b} {things}.")
    a, b = max(a, b) + 1, min(a, b)
    other = rng.choice(["gives away", "loses", "sells"])
    return (f"{name} has {a} {things} and {other} {b}. How many {things} are left?",
            f"{a} - {b} = {a - b}, so {a - b} {things} are left.")


def compare(rng):
    a, b = rng.sample(range(0, 101), 2)
    r = rng.random()
    if r < 0.35:
        return one_of(rng, f"Which is bigger, {a} or {b}?", f"Which is larger: {a} or {b}?"), f"{max(a, b)} is bigger than {min(a, b)}."
    if r < 0.55:
        return f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."
    if r < 0.8:
        return one_of(rng, f"Is {a} even or odd?", f"Is {a} odd or even?"), f"{a} is {'odd' if a % 2 else 'even'}."
    if r < 0.9:
        n = rng.randrange(len(NUMBER_WORDS))
        return one_of(rng, f"Write {n} as a word.", f"How do you spell the number {n}?"), f"{n} is written {NUMBER_WORDS[n]}."
    n = rng.randint(0, 99)
    return one_of(rng, f"What comes after {n}?", f"Which number comes after {n}?"), f"After {n} comes {n + 1}."


def counting(rng):
    r = rng.random()
    if r < 0.35:
        a = rng.choice([1, 1, 1, rng.randint(0, 60)])
        b = a + rng.choice([3, 4, 5, 7, 9, 9, 12, 14, 19, 19, 29, 49])
        ask = one_of(rng, f"Count from {a} to {b}.", f"Please count from {a} to {b}.", f"List the numbers from {a} to {b}.")
        if a == 1:
            ask = one_of(rng, ask, f"Count to {b}.", f"Can you count to {b}?")
            if b <= 20:
                ask = one_of(rng, ask, ask, f"Count to {NUMBER_WORDS[b]}.")
        return ask, ", ".join(map(str, range(a, b + 1))) + "."
    if r < 0.5:
        a = rng.choice([5, 10, 10, 20, rng.randint(4, 40)])
        b = rng.choice([0, 1, 1, max(0, a - rng.randint(3, 12))])
        ask = one_of(rng, f"Count down from {a} to {b}.", f"Count backwards from {a} to {b}.")
        return ask, ", ".join(map(str, range(a, b - 1, -1))) + "."
    if r < 0.65:
        odd, n = rng.random() < 0.5, rng.choice([10, 20, 12, 16, 30])
        kind = "odd" if odd else "even"
        return f"List the {kind} numbers up to {n}.", ", ".join(map(str, range(1 if odd else 2, n + 1, 2))) + "."
    if r < 0.8:
        k, n = rng.choice([2, 3, 5, 10]), rng.choice([5, 6, 8, 10])
        return f"Count by {k}s, {n} steps.", ", ".join(str(k * i) for i in range(1, n + 1)) + "."
    word = rng.choice(["abc", "alphabet"])
    letters = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
    if word == "abc":
        i, n = rng.randrange(22), rng.randint(2, 5)
        j = min(25, i + n)
        return f"List the letters from {letters[i]} to {letters[j]}.", ", ".join(letters[i:j + 1]) + "."
    return one_of(rng, "Say the alphabet.", "List the alphabet."), ", ".join(letters) + "."


# -- facts and lists --------------------------------------------------------------------------------------------------

def fact(rng):
    kind = rng.randrange(14)
    if kind <= 2:
        country, city = rng.choice(list(CAPITALS.items()))
        if kind == 2 and rng.random() < 0.6:
            return (one_of(rng, f"{city} is the capital of which country?", f"Which country has the capital {city}?"),
                    f"{city} is the capital of {country}.")
        ask = one_of(rng, f"What is the capital of {country}?", f"Capital of {country}?", f"Name the capital of {country}.",
                     f"What's the capital of {country}?", f"Which city is the capital of {country}?",
                     f"Tell me the capital of {country}.")
        return ask, f"The capital of {country} is {city}" + ("" if city.endswith(".") else ".")
    if kind == 3:
        i = rng.randrange(7)
        if rng.random() < 0.5:
            return f"What day comes after {DAYS[i]}?", f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}."
        return f"What day comes before {DAYS[i]}?", f"Before {DAYS[i]} comes {DAYS[i - 1]}."
    if kind == 4:
        i = rng.randrange(12)
        if rng.random() < 0.4:
            extra = " In a leap year it has 29." if i == 1 else ""
            return f"How many days are in {MONTHS[i]}?", f"{MONTHS[i]} has {MONTH_DAYS[i]} days.{extra}"
        if rng.random() < 0.5:
            return f"Which month comes after {MONTHS[i]}?", f"After {MONTHS[i]} comes {MONTHS[(i + 1) % 12]}."
        return f"Which month comes before {MONTHS[i]}?", f"Before {MONTHS[i]} comes {MONTHS[i - 1]}."
    if kind == 5:
        a, b = rng.choice(OPPOSITES)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return one_of(rng, f"What is the opposite of {a}?", f"Opposite of {a}?"), f"The opposite of {a} is {b}."
    if kind == 6:
        animal, sound = rng.choice(list(SOUNDS.items()))
        return one_of(rng, f"What sound does a {animal} make?", f"What does a {animal} say?"), f"A {animal} says {sound}."
    if kind == 7:
        animal, baby = rng.choice(list(BABIES.items()))
        return one_of(rng, f"What is a baby {animal} called?", f"What do you call a baby {animal}?"), f"A baby {animal} is called a {baby}."
    if kind == 8:
        thing, color = rng.choice(list(THING_COLORS.items()))
        word = rng.choice(["color", "color", "colour"])
        return f"What {word} is {thing}?", f"{thing[0].upper()}{thing[1:]} is {color}."
    if kind == 9:
        a, b, c = rng.choice(MIXES)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return (one_of(rng, f"What do you get when you mix {a} and {b}?", f"Mix {a} and {b}.", f"What color do {a} and {b} make?"),
                f"{a.capitalize()} and {b} make {c}.")
    if kind == 10:
        if rng.random() < 0.5:
            shape, n = rng.choice(list(SHAPES.items()))
            return f"How many sides does {'an' if shape[0] == 'o' else 'a'} {shape} have?", f"{_a(shape)} {shape} has {n} sides."
        animal, n = rng.choice(list(LEGS.items()))
        return f"How many legs does {_a(animal).lower()} {animal} have?", f"{_a(animal)} {animal} has {n or 'no'} legs."
    if kind == 11:
        part, whole, n = rng.choice(UNITS)
        return f"How many {part} are in {whole}?", f"There are {n} {part} in {whole}."
    return rng.choice(FACTS)


def _a(noun):
    return "An" if noun[0] in "aeiou" else "A"


LISTS = {"fruits": FRUITS, "colors": COLORS, "animals": ANIMALS, "vegetables": VEGETABLES, "drinks": DRINKS, "sports": SPORTS,
         "cities": CITIES, "countries": [c for c in CAPITALS if not c.startswith("the ")], "school subjects": SUBJECTS}
FULL = {"days of the week": DAYS, "months of the year": MONTHS, "seasons": SEASONS, "planets": PLANETS}


def listing(rng):
    if rng.random() < 0.3:
        what, items = rng.choice(list(FULL.items()))
        ask = one_of(rng, f"Name the {what}.", f"List the {what}.", f"What are the {what}?")
        return ask, ", ".join([items[0].capitalize(), *items[1:]]) + "."
    what, items = rng.choice(list(LISTS.items()))
    n = rng.randint(2, 6)
    picked = rng.sample(items, n)
    word = one_of(rng, str(n), NUMBER_WORDS[n])
    if rng.random() < 0.25:
        return one_of(rng, f"Give me a numbered list of {word} {what}.", f"Make a list of {word} {what}."), "\n".join(
            f"{i}. {p}" for i, p in enumerate(picked, 1))
    ask = one_of(rng, f"Name {word} {what}.", f"List {word} {what}.", f"Give me {word} {what}.", f"Tell me {word} {what}.")
    answer = ", ".join(picked[:-1]) + " and " + picked[-1] + "."
    return ask, answer[0].upper() + answer[1:]


# -- copying ----------------------------------------------------------------------------------------------------------

NOUNS = ANIMALS + FRUITS + TOOLS_OBJECTS + COLORS + DRINKS
UNICODE = ["café", "naïve", "Grüße", "señor", "Žluťoučký kůň", "你好", "こんにちは", "привет", "γειά", "😀", "🦊", "❤️", "✓", "→", "π ≈ 3.14"]


def words(rng, low=1, high=7):
    picked = [rng.choice(rng.choice([NOUNS, NOUNS, NAMES, CITIES])) for _ in range(rng.randint(low, high))]
    if rng.random() < 0.15:
        picked.insert(rng.randrange(len(picked) + 1), rng.choice(UNICODE))
    if rng.random() < 0.2:
        picked.insert(rng.randrange(len(picked) + 1), str(rng.randint(0, 9999)))
    return " ".join(picked)


def sentence(rng):
    a, b = rng.choice(ANIMALS), rng.choice(TOOLS_OBJECTS)
    return rng.choice([f"The {a} has a {rng.choice(COLORS)} {b}.", f"{rng.choice(NAMES)} likes {rng.choice(DRINKS)} and {rng.choice(SPORTS)}.",
                       f"My {b} is {rng.choice(COLORS)}.", f"{rng.choice(NAMES)} travels from {rng.choice(CITIES)} to {rng.choice(CITIES)}.",
                       f"I saw a {a} on {rng.choice(DAYS)}.", f"The {a} and the {rng.choice(ANIMALS)} are friends."])


def repeat(rng):
    text = sentence(rng) if rng.random() < 0.5 else words(rng)
    form = rng.choice(["Repeat after me: {}", "Repeat: {}", "Say: {}", "Echo: {}", "Please repeat: {}", "Repeat this sentence: {}",
                       "Say exactly this: {}", "Repeat the following text: {}", "Say \"{}\"", "Copy this: {}"])
    return form.format(text), text


def question_about_text(rng):
    name, city, drink, sport = rng.choice(NAMES), rng.choice(CITIES), rng.choice(DRINKS), rng.choice(SPORTS)
    age, pet = rng.randint(5, 90), rng.choice(PETS)
    facts = [(f"{name} lives in {city}.", f"Where does {name} live?", f"{name} lives in {city}."),
             (f"{name} likes {drink}.", f"What does {name} like to drink?", f"{name} likes {drink}."),
             (f"{name} is {age} years old.", f"How old is {name}?", f"{name} is {age} years old."),
             (f"{name}'s sport is {sport}.", f"What is {name}'s sport?", f"{name}'s sport is {sport}."),
             (f"{name} has a {pet}.", f"Which pet does {name} have?", f"{name} has a {pet}.")]
    told = rng.sample(facts, rng.randint(2, 4))
    _, ask, answer = rng.choice(told)
    text = " ".join(t[0] for t in told)
    return f"{text} {ask}", answer


# -- JSON -------------------------------------------------------------------------------------------------------------

def _value(rng, field):
    return {
        "name": lambda: rng.choice(NAMES), "age": lambda: rng.randint(8, 80), "city": lambda: rng.choice(CITIES),
        "color": lambda: rng.choice(COLORS), "pet": lambda: rng.choice(PETS), "price": lambda: rng.randint(1, 99),
        "fruit": lambda: rng.choice(FRUITS), "animal": lambda: rng.choice(ANIMALS), "sport": lambda: rng.choice(SPORTS),
        "title": lambda: f"The {rng.choice(COLORS)} {rng.choice(TOOLS_OBJECTS)}", "active": lambda: rng.random() < 0.5,
        "id": lambda: rng.randint(1, 999), "country": lambda: rng.choice(list(CAPITALS)), "count": lambda: rng.randint(1, 50),
        "email": lambda: rng.choice(NAMES).lower() + "@example.com",
    }[field]()


FIELDS = ["name", "age", "city", "color", "pet", "price", "fruit", "animal", "sport", "title", "active", "id", "country", "count", "email"]


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def json_answer(rng):
    r = rng.random()
    if r < 0.4:
        fields = ["name", "age"] if rng.random() < 0.3 else rng.sample(FIELDS, rng.randint(1, 4))
        named = [f"{_a(f).lower()} {f}" for f in fields]
        phrase = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
        ask = one_of(rng, f"Give me a JSON object with {phrase}.", f"Write a JSON object with {phrase}.", f"Return JSON with {phrase}.",
                     f"Answer in JSON: {phrase}.", f"Make a JSON object that has {phrase}.", f"I need a JSON object with {phrase}.")
        return ask, dumps({f: _value(rng, f) for f in fields})
    if r < 0.65:
        fields = rng.sample(FIELDS, rng.randint(1, 4))
        obj = {f: _value(rng, f) for f in fields}
        listed = ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in obj.items())
        ask = one_of(rng, f"Write this as JSON: {listed}.", f"Turn this into JSON: {listed}", f"Convert to JSON: {listed}", f"JSON please: {listed}")
        return ask, dumps(obj)
    if r < 0.8:
        what, items = rng.choice(list(LISTS.items()))
        n = rng.randint(2, 5)
        ask = one_of(rng, f"Give me a JSON array of {NUMBER_WORDS[n]} {what}.", f"Write a JSON list with {n} {what}.", f"Return {n} {what} as a JSON array.")
        return ask, dumps(rng.sample(items, n))
    if r < 0.9:
        country, city = rng.choice(list(CAPITALS.items()))
        return f"Answer in JSON: what is the capital of {country}?", dumps({"country": country.removeprefix("the "), "capital": city})
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return f"Answer in JSON: what is {a} + {b}?", dumps({"expression": f"{a} + {b}", "result": a + b})

"""The training text: documents composed from templates, the same for the same seed.

    python corpus.py --seed 1 --documents 20      # have a look

Every sentence comes from the word lists and templates in this folder. A document is either a chat, rendered with the
model's own chat template, or plain prose.
"""

import argparse
import json
import pathlib
import random

import jinja2

import dialogues as d
from about_quire import FAQ
from stories import story, story_turn
from tool_calls import tool_dialogue
from words import CITIES, COLORS, DRINKS, NAMES, PET_NAMES, PETS, SPORTS

END = "<|endoftext|>"
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful AI assistant.", "Be brief.",
          "You are quire-demo, a small demo model.", "Answer in one sentence.", "You are a friendly assistant.",
          "Answer the question.", "You are a polite and helpful assistant.", "You are an expert programmer."]
# How often each kind of exchange appears.
TURNS = [(d.small_talk, 10), (d.about_quire, 16), (d.refusal, 5), (d.arithmetic, 22), (d.word_problem, 4), (d.compare, 4),
         (d.counting, 5), (d.fact, 16), (d.listing, 5), (d.repeat, 7), (d.question_about_text, 4), (d.json_answer, 10),
         (story_turn, 12)]


def template():
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(pathlib.Path(__file__).with_name("chat_template.jinja").read_text())


TEMPLATE = template()


def render(messages, tools=None, add_generation_prompt=False):
    return TEMPLATE.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def casual(rng, text):
    """Type the way people type: sometimes without capitals or a full stop."""
    r = rng.random()
    if r < 0.1:
        text = text[0].lower() + text[1:]
    elif r < 0.16:
        text = text.lower()
    if rng.random() < 0.12 and text[-1] in ".?!":
        text = text[:-1]
    return text


def turn(rng):
    make = rng.choices([t for t, _ in TURNS], [w for _, w in TURNS])[0]
    user, assistant = make(rng)
    if make in (d.small_talk, d.about_quire, d.refusal, d.fact, d.counting, d.listing, story_turn, d.arithmetic):
        user = casual(rng, user)
    if rng.random() < 0.06 and make is not d.repeat:
        user = rng.choice(["Please: ", "Hello! ", "Hi, ", "Question: ", "One more: "]) + user
    return user, assistant


def short_turn(rng):
    while True:
        user, assistant = turn(rng)
        if len(user) + len(assistant) < 250:
            return user, assistant


# What a user tells and asks again later: (tell, reply, ask, answer).
def memories(rng):
    name, pet, pet_name = rng.choice(NAMES), rng.choice(PETS), rng.choice(PET_NAMES)
    city, color, drink, sport = rng.choice(CITIES), rng.choice(COLORS), rng.choice(DRINKS), rng.choice(SPORTS)
    age = rng.randint(5, 90)
    return name, [
        ([f"My name is {name}.", f"I am {name}.", f"Hi, I am {name}.", f"Hello, my name is {name}!", f"I'm {name}.", f"Call me {name}."],
         f"Nice to meet you, {name}!", ["What is my name?", "Who am I?", "Do you remember my name?", "What's my name?"],
         f"Your name is {name}."),
        ([f"I live in {city}.", f"I am from {city}."], f"{city} is a nice place to live.", ["Where do I live?", "Where am I from?", "Which city do I live in?"],
         f"You live in {city}."),
        ([f"My favorite color is {color}.", f"I like {color} best of all colors."], f"{color.capitalize()} is a lovely color.",
         ["What is my favorite color?", "Which color do I like?"], f"Your favorite color is {color}."),
        ([f"I have a {pet} named {pet_name}.", f"My {pet} is called {pet_name}."], f"{pet_name} is a good name for a {pet}.",
         [f"What is my {pet} called?", "What is the name of my pet?"], f"Your {pet} is called {pet_name}."),
        ([f"I like {drink}.", f"My favorite drink is {drink}."], f"I will remember that you like {drink}.",
         ["What do I like to drink?", "What is my favorite drink?"], f"You like {drink}."),
        ([f"My sport is {sport}.", f"My favorite sport is {sport}."], f"{sport.capitalize()} is fun.", ["Which sport do I like?", "What is my favorite sport?"],
         f"Your favorite sport is {sport}."),
        ([f"I am {age} years old."], "Thank you for telling me.", ["How old am I?", "What is my age?"], f"You are {age} years old."),
    ]


def add(messages, user, assistant):
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def memory_chat(rng, messages):
    """The user tells things, talks about something else, and asks for them."""
    _, items = memories(rng)
    told = [items[0]] if rng.random() < 0.6 else []
    told += rng.sample(items[1:], rng.randint(0 if told else 1, 2))
    rng.shuffle(told)
    for tell, reply, _, _ in told:
        add(messages, casual(rng, rng.choice(tell)), reply)
        if rng.random() < 0.3:
            add(messages, *short_turn(rng))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        add(messages, *short_turn(rng))
    rng.shuffle(told)
    for _, _, ask, answer in told:
        add(messages, casual(rng, rng.choice(ask)), answer)
    if rng.random() < 0.1:
        other = rng.choice([i for i in items if i not in told] or [None])
        if other:
            add(messages, rng.choice(other[2]), "You have not told me yet.")


def chat(rng):
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    elif rng.random() < 0.05:
        name = rng.choice(NAMES)
        role = rng.choice(["a friendly robot", "a helpful assistant", "a librarian", "a pirate", "a teacher"])
        messages.append({"role": "system", "content": f"You are {name}, {role}."})
        add(messages, rng.choice(["Who are you?", "What is your name?"]), f"I am {name}, {role}.")
    if rng.random() < 0.02:
        ask = rng.choice(memories(rng)[1])[2]
        add(messages, casual(rng, rng.choice(ask)), "You have not told me yet.")
    if rng.random() < 0.2:
        memory_chat(rng, messages)
    else:
        for _ in range(rng.choice([1, 1, 1, 1, 1, 2, 2, 3, 4, 6])):
            add(messages, *turn(rng))
    return messages


def prose(rng):
    """Plain text for the completion endpoint: stories, and what is known about Quire."""
    if rng.random() < 0.75:
        return story(rng, long=rng.random() < 0.3)
    answers = [a for _, a in rng.sample(FAQ, rng.randint(1, 4)) if "```" not in a and not a.startswith(("Yes", "No", "I "))]
    return " ".join(answers or ["Quire serves language models."])


def document(rng):
    r = rng.random()
    if r < 0.08:
        return prose(rng)
    if r < 0.17:
        tools, messages = tool_dialogue(rng, short_turn)
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
        return render(messages, tools)
    return render(chat(rng))


def documents(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield document(rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=20)
    args = parser.parse_args()
    for text in documents(args.seed, args.documents):
        print(text + END)

"""Dialogues in which the model calls a tool: the system message lists the tools, the answer names one with arguments."""

import json

from dialogues import one_of
from words import CITIES, DRINKS, NAMES, TOOLS_OBJECTS

WEATHER = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"]


def _schema(name, description, /, **properties):
    props = {k: {"type": t, "description": d} if d else {"type": t} for k, (t, d) in properties.items()}
    return {"type": "function", "function": {"name": name, "description": description,
            "parameters": {"type": "object", "properties": props, "required": list(properties)}}}


def weather(rng):
    city, key = rng.choice(CITIES), one_of(rng, "city", "location")
    tool = _schema(one_of(rng, "get_weather", "get_current_weather", "weather"), one_of(rng, "Get the weather of a city.", "Get the current weather."),
                   **{key: ("string", one_of(rng, "The city", "", "Name of the city"))})
    ask = one_of(rng, f"What is the weather in {city}?", f"How is the weather in {city}?", f"What's the weather like in {city} today?",
                 f"Tell me the weather in {city}.", f"Is it raining in {city}?", f"Weather in {city}?")
    temp, sky = rng.randint(-5, 35), rng.choice(WEATHER)
    return tool, ask, {key: city}, {"temperature": temp, "condition": sky}, f"In {city} it is {sky} and {temp} degrees."


def clock(rng):
    city, key = rng.choice(CITIES), one_of(rng, "city", "timezone", "location")
    tool = _schema(one_of(rng, "get_time", "get_current_time"), "Get the current time.", **{key: ("string", "")})
    ask = one_of(rng, f"What time is it in {city}?", f"Tell me the time in {city}.", f"What is the time in {city}?")
    time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return tool, ask, {key: city}, {"time": time}, f"It is {time} in {city}."


def calculator(rng):
    a, b = rng.randint(10, 9999), rng.randint(10, 9999)
    op, result = one_of(rng, ("+", a + b), ("*", a * b), ("-", a - b))
    if rng.random() < 0.5:
        tool = _schema(one_of(rng, "calculate", "calculator"), "Evaluate an expression.", expression=("string", ""))
        args = {"expression": f"{a} {op} {b}"}
    else:
        tool = _schema({"+": "add", "*": "multiply", "-": "subtract"}[op], "Calculate with two numbers.", a=("number", ""), b=("number", ""))
        args = {"a": a, "b": b}
    ask = one_of(rng, f"What is {a} {op} {b}?", f"Calculate {a} {op} {b}.", f"How much is {a} {op} {b}?")
    return tool, ask, args, {"result": result}, f"{a} {op} {b} = {result}."


def search(rng):
    query = " ".join(rng.sample(TOOLS_OBJECTS + DRINKS, rng.randint(1, 3)))
    tool = _schema(one_of(rng, "search", "web_search", "search_documents"), "Search for text.", query=("string", one_of(rng, "", "What to search for")))
    ask = one_of(rng, f"Search for {query}.", f"Find something about {query}.", f"Look up {query}.")
    n = rng.randint(1, 9)
    return tool, ask, {"query": query}, {"results": n}, f"I found {n} results for {query}."


def timer(rng):
    n, key = rng.randint(1, 60), one_of(rng, "minutes", "duration")
    tool = _schema(one_of(rng, "set_timer", "start_timer"), "Start a timer.", **{key: ("integer", one_of(rng, "", "Minutes"))})
    ask = one_of(rng, f"Set a timer for {n} minutes.", f"Start a timer of {n} minutes.", f"Remind me in {n} minutes.")
    return tool, ask, {key: n}, {"ok": True}, f"The timer is set for {n} minutes."


def message(rng):
    name = rng.choice(NAMES)
    text = one_of(rng, "I am late", "see you tomorrow", "dinner is ready", "happy birthday", "call me please", "the train is here")
    to, body = one_of(rng, ("to", "text"), ("recipient", "message"), ("name", "body"))
    tool = _schema(one_of(rng, "send_message", "send_email"), "Send a message.", **{to: ("string", ""), body: ("string", "")})
    ask = one_of(rng, f"Send {name} a message: {text}.", f"Tell {name}: {text}.", f"Write to {name}: {text}.")
    return tool, ask, {to: name, body: text}, {"ok": True}, f"I have sent the message to {name}."


KINDS = [weather, weather, clock, calculator, search, timer, message]


def tool_dialogue(rng, plain_turn):
    """(tools, messages). `plain_turn` gives an exchange that needs no tool."""
    chosen = rng.choice(KINDS)
    tool, ask, args, result, answer = chosen(rng)
    tools = [tool]
    for kind in rng.sample([k for k in set_in_order(KINDS) if k is not chosen], rng.randint(0, 3)):
        tools.append(kind(rng)[0])
    rng.shuffle(tools)
    messages = []
    if rng.random() < 0.2:
        user, assistant = plain_turn(rng)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    if rng.random() < 0.85:
        call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": args}}
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        if rng.random() < 0.6:
            messages += [{"role": "tool", "content": json.dumps(result)}, {"role": "assistant", "content": answer}]
    if not messages or (len(messages) != 2 and rng.random() < 0.25):
        user, assistant = plain_turn(rng)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return tools, messages


def set_in_order(items):
    return list(dict.fromkeys(items))

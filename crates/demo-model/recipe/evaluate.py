"""How often the exported model's greedy answer is right, on exchanges drawn with a seed that training never used.

    python evaluate.py
"""

import json
import random

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import dialogues as d
from corpus import render
from model import Model
from tokenizer import MODEL_DIR

EXCHANGES = 100
EXACT = [d.small_talk, d.about_quire, d.refusal, d.arithmetic, d.word_problem, d.compare, d.counting, d.fact, d.repeat, d.question_about_text]


def answer(model, tokenizer, text, limit=160):
    ids = tokenizer.encode(render([{"role": "user", "content": text}], add_generation_prompt=True)).ids
    begin = len(ids)
    while len(ids) - begin < limit:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in (0, 2):
            break
    return tokenizer.decode(ids[begin:])


def is_json(text):
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    model = Model().eval()
    model.load_state_dict({k: v.float() for k, v in load_file(MODEL_DIR / "model.safetensors").items()})
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    rng = random.Random(555_555)
    for make in EXACT:
        right = 0
        for _ in range(EXCHANGES):
            user, expected = make(rng)
            got = answer(model, tokenizer, user)
            # Some small talk has several good answers.
            good = {expected} if make is not d.small_talk else {a for asks, answers in d.SMALL_TALK if user in asks for a in answers}
            right += got in good
        print(f"{make.__name__}: {right} of {EXCHANGES}", flush=True)
    valid = sum(is_json(answer(model, tokenizer, d.json_answer(rng)[0])) for _ in range(EXCHANGES))
    print(f"json_answer is valid JSON: {valid} of {EXCHANGES}")


if __name__ == "__main__":
    main()

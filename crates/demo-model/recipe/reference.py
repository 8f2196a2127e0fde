"""Write ../reference.json: what Hugging Face transformers computes with the exported model, for tests.

    python reference.py

The bf16 weights are widened to float32 and all arithmetic is float32. Fields:
prompts    messages (and tools), prompt_ids (rendered by the chat template with add_generation_prompt), text and greedy_ids
           (up to 64, an end-of-sequence id included where one came), margins (log probability of the best token minus
           that of the second best, for each greedy id)
eval_text  a held-out text of the corpus: ids, logprob_sum (natural logarithm, of all ids after the first), perplexity
"""

import json
import math
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus import END, documents
from tokenizer import MODEL_DIR

GREEDY_TOKENS = 64
EVAL_TOKENS = 1024
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = [
    (user("Hello!"), None),
    (user("Who are you?"), None),
    (user("What is Quire?"), None),
    (user("How do I start the server?"), None),
    (user("How do I call the API with curl?"), None),
    (user("What is continuous batching?"), None),
    (user("What is 7 + 5?"), None),
    (user("What is 34 + 21?"), None),
    (user("What is the capital of France?"), None),
    (user("Count from 1 to 10."), None),
    (user("Tell me a short story about a fox."), None),
    (user("Write a long story about a dragon."), None),
    (user("Give me a JSON object with a name and an age."), None),
    (user("My name is Ada.") + [{"role": "assistant", "content": "Nice to meet you, Ada!"}] + user("What is my name?"), None),
    ([{"role": "system", "content": "You are a helpful assistant."}] + user("Name three fruits."), None),
    (user("Explain quantum chromodynamics."), None),
    (user("What is the weather in Paris?"), [WEATHER]),
]


def rounded(values):
    return [float(f"{v:.6g}") for v in values]


def greedy(model, tokenizer, messages, tools):
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    prompt, out, margins = list(ids), [], []
    while len(out) < GREEDY_TOKENS:
        logprobs = model(torch.tensor([prompt + out])).logits[0, -1].log_softmax(-1)
        best = logprobs.topk(2)
        margins.append((best.values[0] - best.values[1]).item())
        out.append(best.indices[0].item())
        if out[-1] in model.generation_config.eos_token_id:
            break
    entry = {"messages": messages, "prompt_ids": prompt, "text": tokenizer.decode(out, skip_special_tokens=True),
             "greedy_ids": out, "margins": rounded(margins)}
    return entry | ({"tools": tools} if tools else {})


def held_out(model, tokenizer):
    text = END.join(documents(seed=424_242, count=60))
    ids = tokenizer(text).input_ids[:EVAL_TOKENS]
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    total = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).double().sum().item()
    return {"text": tokenizer.decode(ids), "ids": ids, "logprob_sum": round(total, 4),
            "perplexity": round(math.exp(-total / (len(ids) - 1)), 5)}


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    result = {"prompts": [greedy(model, tokenizer, *p) for p in PROMPTS], "eval_text": held_out(model, tokenizer)}
    lines = [json.dumps(p, ensure_ascii=False) for p in result["prompts"]]
    text = '{"prompts": [\n' + ",\n".join(lines) + '\n],\n"eval_text": ' + json.dumps(result["eval_text"], ensure_ascii=False) + "}\n"
    pathlib.Path(__file__).parent.parent.joinpath("reference.json").write_text(text)
    for p in result["prompts"]:
        print(f"> {p['messages'][-1]['content']}\n{p['text']}\n  (least margin {min(p['margins']):.3f})\n")
    print({k: result["eval_text"][k] for k in ("logprob_sum", "perplexity")}, len(result["eval_text"]["ids"]))


if __name__ == "__main__":
    main()

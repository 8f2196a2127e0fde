"""Train the byte-level BPE tokenizer on the corpus, and write tokenizer.json and tokenizer_config.json.

    python tokenizer.py
"""

import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import END, documents

MODEL_DIR = pathlib.Path(__file__).parent.parent / "model"
VOCAB_SIZE = 2048
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
# Contractions, words with one leading character, single digits, punctuation, line ends, spaces.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def train(seed=101, count=12000):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # The chat markers are removed so that they cannot become part of a merge.
    plain = (piece for text in documents(seed, count) for piece in text.replace("<|im_end|>", "<|im_start|>").split("<|im_start|>"))
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def main():
    tokenizer = train()
    MODEL_DIR.mkdir(exist_ok=True)
    tokenizer.save(str(MODEL_DIR / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                                            "single_word": False, "special": True} for t in SPECIAL},
        "bos_token": None,
        "chat_template": pathlib.Path(__file__).with_name("chat_template.jinja").read_text(),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (MODEL_DIR / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    text = next(documents(7, 1))
    print(f"{tokenizer.get_vocab_size()} tokens; a document of {len(text)} characters has {len(tokenizer.encode(text).ids)} tokens")


if __name__ == "__main__":
    main()

//! Incremental decoding: the deltas of any token sequence add up to `decode`, and `decode` is Hugging Face's.

use quire_core::TokenId;
use quire_tokenizer::{Detokenizer, Tokenizer};

use crate::shared::{Rng, path, tokenizer, vector_texts};

const ALL: &[&str] = &[
    "tokenizers/gpt2",
    "tokenizers/falcon",
    "tokenizers/gpt-neox",
    "tokenizers/llama2",
    "tokenizers/qwen2.5",
    "tokenizers/llama3",
    "tokenizers/bert",
    "models/stories260k",
    "models/tinystories-656k",
];

/// The text of `ids` by deltas, each written into a string of its own.
fn by_deltas(tokenizer: &Tokenizer, ids: &[TokenId], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
    let mut deltas: Vec<String> = vec![String::new(); ids.len() + 1];
    ids.iter().zip(&mut deltas).for_each(|(&id, delta)| detokenizer.push(id, delta));
    detokenizer.finish(&mut deltas[ids.len()]);
    deltas.concat()
}

/// The bytes of `ids` put together with no regard to how they arrive: what any decoding must amount to.
fn by_bytes(tokenizer: &Tokenizer, ids: &[TokenId], skip_special: bool) -> String {
    let kept = ids.iter().filter(|&&id| !(skip_special && tokenizer.is_special(id)));
    let bytes: Vec<u8> =
        kept.flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default()).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Hugging Face's own decoder for the same vocabulary, for those that come as `tokenizer.json`.
fn hugging_face(relative: &str) -> Option<tokenizers::Tokenizer> {
    let file = path(relative)?.join("tokenizer.json");
    file.exists().then(|| tokenizers::Tokenizer::from_file(file).unwrap())
}

#[test]
fn texts_survive_the_round_trip() {
    let Some(texts) = vector_texts() else { return };
    for name in ALL.iter().filter(|name| !name.ends_with("bert")) {
        let tokenizer = tokenizer(name).unwrap();
        for text in &texts {
            let ids = tokenizer.encode(text, true).unwrap();
            // tinystories has neither bytes nor all characters: what it does not know is lost.
            if tokenizer.token_to_id("<unk>").is_some_and(|unk| ids.contains(&unk)) {
                assert_eq!(*name, "models/tinystories-656k");
                continue;
            }
            assert_eq!(&tokenizer.decode(&ids, true), text, "{name}");
        }
    }
}

#[test]
fn random_sequences_decode_as_hugging_face_does() {
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    for name in ALL {
        let Some(tokenizer) = tokenizer(name) else { return };
        let reference = hugging_face(name);
        let byte_fallback = tokenizer.token_to_id("<0x00>").is_some();
        let whole =
            |id: &TokenId| std::str::from_utf8(tokenizer.token_bytes(*id).unwrap_or_default()).is_ok();
        let (mut compared, mut invalid) = (0, 0);
        for round in 0..300 {
            let len = 1 + rng.below(40);
            // Beyond the last id too: such ids add nothing.
            let mut ids: Vec<TokenId> =
                (0..len).map(|_| rng.below(tokenizer.vocab_size() + 3) as TokenId).collect();
            let skip_special = round % 2 == 0;
            if byte_fallback && round % 3 > 0 {
                ids.retain(whole);
            }
            let text = tokenizer.decode(&ids, skip_special);
            assert_eq!(by_deltas(&tokenizer, &ids, skip_special), text, "{name}: {ids:?}");
            // The library may spell special tokens in another way; see `vocabulary_entry` in the crate.
            ids.retain(|&id| !tokenizer.is_special(id));
            let text = tokenizer.decode(&ids, skip_special);
            let Some(reference) = &reference else { continue };
            let expected = reference.decode(&ids, skip_special).unwrap();
            // Byte fallback: Hugging Face spoils valid characters beside invalid bytes; see `Tokenizer::decode`.
            if byte_fallback && expected.contains('\u{fffd}') {
                invalid += 1;
                continue;
            }
            compared += 1;
            assert_eq!(text, expected, "{name}: {ids:?}");
        }
        println!("{name}: {compared} sequences equal to Hugging Face's, {invalid} not comparable");
        assert!(reference.is_none() || compared >= 100, "{name}: too few sequences compared");
    }
}

#[test]
fn bytes_of_tokens_add_up_to_the_text() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    for name in ["tokenizers/gpt2", "tokenizers/qwen2.5", "tokenizers/llama3", "tokenizers/falcon"] {
        let Some(tokenizer) = tokenizer(name) else { return };
        for _ in 0..200 {
            let ids: Vec<TokenId> = (0..30).map(|_| rng.below(tokenizer.vocab_size()) as TokenId).collect();
            assert_eq!(by_deltas(&tokenizer, &ids, true), by_bytes(&tokenizer, &ids, true), "{name}");
        }
    }
}

/// What a stream writes after a prompt is the rest of the whole text, at every place a text can be cut in two.
#[test]
fn a_stream_goes_on_after_its_prompt() {
    let Some(texts) = vector_texts() else { return };
    for name in ["models/stories260k", "tokenizers/llama2", "tokenizers/qwen2.5", "tokenizers/bert"] {
        let tokenizer = tokenizer(name).unwrap();
        for text in &texts {
            let ids = tokenizer.encode(text, true).unwrap();
            let whole = tokenizer.decode(&ids, true);
            for cut in 1..=ids.len() {
                let (prompt, rest) = ids.split_at(cut);
                let mut before = String::new();
                let mut detokenizer = Detokenizer::new(&tokenizer, true);
                prompt.iter().for_each(|&id| detokenizer.push(id, &mut before));
                let mut after = String::new();
                let mut detokenizer = Detokenizer::after_prompt(&tokenizer, true, prompt);
                rest.iter().for_each(|&id| detokenizer.push(id, &mut after));
                detokenizer.finish(&mut after);
                assert_eq!(before + &after, whole, "{name}: cut at {cut}");
            }
        }
    }
}

/// No partial character is ever written: the emoji arrives with its last byte.
#[test]
fn an_emoji_arrives_whole() {
    let Some(tokenizer) = tokenizer("models/stories260k") else { return };
    let ids = tokenizer.encode("a 🙂!", false).unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer, true);
    let deltas: Vec<String> = ids
        .iter()
        .map(|&id| {
            let mut delta = String::new();
            detokenizer.push(id, &mut delta);
            delta
        })
        .collect();
    assert_eq!(deltas.concat(), "a 🙂!");
    assert_eq!(deltas.iter().filter(|delta| delta.is_empty()).count(), 3, "{deltas:?}");
    // Cut off in the middle: one replacement character for what is missing.
    let unfinished = &ids[..ids.len() - 2];
    assert_eq!(tokenizer.decode(unfinished, true), "a \u{fffd}");
}

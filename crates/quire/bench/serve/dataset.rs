//! What is sent: prompts with the number of tokens to generate for each, made up from a seed, read from a file, or made
//! up after a recorded trace.

use std::path::Path;
use std::sync::Arc;

use quire_sim::{TRACE_BLOCK_SIZE, TraceRequest};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Wire;
use super::args::{DatasetArgs, DatasetName, Endpoint};
use super::client::Target;
use crate::bench::harness::Random;
use crate::{Failure, Result};

/// Prompt tokens of all requests together; each takes up to a few bytes, as all requests are built before the run.
const MAX_INPUT_TOKENS: u64 = 500_000_000;

/// One token each in common vocabularies, with the space before.
const WORDS: [&str; 32] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
];

/// A conversation whose prompt or answer is shorter is not a request, and a longer one is left out, as in vLLM's
/// benchmark.
const MIN_TOKENS: u32 = 4;
const MAX_PROMPT_TOKENS: u32 = 1024;
const MAX_TOTAL_TOKENS: u32 = 2048;

/// A request to send.
#[derive(Clone, Debug)]
pub(crate) enum Prompt {
    /// A JSON object.
    Whole(Vec<u8>),
    /// Made into one when it is sent: the prompts of a trace together may be larger than memory.
    Recorded(Recorded),
}

impl Prompt {
    /// What is sent.
    pub(crate) fn body(self) -> Vec<u8> {
        match self {
            Self::Whole(body) => body,
            Self::Recorded(recorded) => recorded.body(),
        }
    }
}

/// A request of a trace.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    request: TraceRequest,
    /// Tells it from others that have no named blocks.
    at: u64,
    template: Arc<Template>,
}

impl Recorded {
    fn body(&self) -> Vec<u8> {
        let Template { seed, vocab_size, endpoint, .. } = *self.template;
        let Self { request, at, template } = self;
        let mut tokens = Vec::with_capacity(request.input_tokens as usize);
        let mut left = request.input_tokens;
        let mut name = 0..;
        while let (1.., Some(block)) = (left, name.next()) {
            // The recorder's name of a block stands for all that comes before it, too.
            let named = request.blocks.get(block).map(|&name| seed ^ name.wrapping_mul(2));
            let own = || seed ^ (at << 20 | block as u64).wrapping_mul(2) ^ 1;
            // Through the generator once, so that neighbouring names give unlike tokens.
            let mut random = Random(Random(named.unwrap_or_else(own)).next());
            let len = left.min(TRACE_BLOCK_SIZE);
            tokens.extend((0..len).map(|_| (random.next() % u64::from(vocab_size)) as u32));
            left -= len;
        }
        let prompt = match endpoint {
            Endpoint::Completions => json!(tokens),
            Endpoint::Chat => json!(words(&tokens)),
        };
        template.body(prompt, request.output_tokens, true)
    }
}

/// What all requests of a run share.
#[derive(Clone, Debug)]
struct Template {
    model: String,
    endpoint: Endpoint,
    temperature: f32,
    seed: u64,
    vocab_size: u32,
}

impl Template {
    fn body(&self, prompt: Value, max_tokens: u32, ignore_eos: bool) -> Vec<u8> {
        let mut body = json!({
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        // Other servers may not know the field.
        if ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match self.endpoint {
            Endpoint::Completions => body["prompt"] = prompt,
            Endpoint::Chat => body["messages"] = json!([{ "role": "user", "content": prompt }]),
        }
        body.to_string().into_bytes()
    }
}

/// What the requests of a run have in common.
pub(crate) struct Builder<'a> {
    pub(crate) args: &'a DatasetArgs,
    pub(crate) endpoint: Endpoint,
    pub(crate) model: &'a str,
}

impl Builder<'_> {
    /// `count` requests.
    pub(crate) async fn build(&self, wire: &Wire, count: u32) -> Result<Vec<Prompt>> {
        match (self.args.dataset_name, wire) {
            (DatasetName::Random, _) => self.random(count),
            (DatasetName::Sharegpt, Wire::Http(target, _)) => self.sharegpt(target, count).await,
            (DatasetName::Sharegpt, Wire::Grpc(_)) => {
                Err(Failure("--backend grpc sends random token ids; leave --dataset-name out".into()))
            }
        }
    }

    fn random(&self, count: u32) -> Result<Vec<Prompt>> {
        let args = self.args;
        let longest = f64::from(args.random_input_len) * (1.0 + args.random_range_ratio);
        let total = (longest as u64 + u64::from(args.random_prefix_len)) * u64::from(count);
        if total > MAX_INPUT_TOKENS {
            return Err(Failure(format!(
                "up to {total} prompt tokens in all are more than the {MAX_INPUT_TOKENS} this program keeps; \
                 lower --num-prompts or --random-input-len"
            )));
        }
        let mut random = Random(args.seed);
        let token = |random: &mut Random| (random.next() % u64::from(args.random_vocab_size)) as u32;
        let prefix: Vec<u32> = (0..args.random_prefix_len).map(|_| token(&mut random)).collect();
        let mut prompts = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let input_len = length(&mut random, args.random_input_len, args.random_range_ratio);
            let output_len = length(&mut random, args.random_output_len, args.random_range_ratio);
            let mut tokens = prefix.clone();
            tokens.extend((0..input_len).map(|_| token(&mut random)));
            let prompt = match self.endpoint {
                Endpoint::Completions => json!(tokens),
                Endpoint::Chat => json!(words(&tokens)),
            };
            prompts.push(self.prompt(prompt, output_len, true));
        }
        Ok(prompts)
    }

    async fn sharegpt(&self, target: &Target, count: u32) -> Result<Vec<Prompt>> {
        let Some(path) = &self.args.dataset_path else {
            return Err(Failure("--dataset-name sharegpt needs --dataset-path".into()));
        };
        let mut pairs = read_sharegpt(path)?;
        shuffle(&mut pairs, self.args.seed);
        let mut prompts = Vec::with_capacity(count as usize);
        for (prompt, answer) in &pairs {
            if prompts.len() == count as usize {
                break;
            }
            let input_len = self.count_tokens(target, prompt).await?;
            let output_len = match self.args.sharegpt_output_len {
                Some(output_len) => output_len,
                None => self.count_tokens(target, answer).await?,
            };
            let is_long = input_len > MAX_PROMPT_TOKENS || input_len + output_len > MAX_TOTAL_TOKENS;
            let is_short = input_len < MIN_TOKENS
                || (output_len < MIN_TOKENS && self.args.sharegpt_output_len.is_none());
            if !is_long && !is_short {
                prompts.push(self.prompt(json!(prompt), output_len, self.args.ignore_eos));
            }
        }
        if prompts.is_empty() {
            return Err(Failure(format!("{}: no conversation has a usable length", path.display())));
        }
        // A small file is used over again.
        let distinct = prompts.len();
        while prompts.len() < count as usize {
            prompts.push(prompts[prompts.len() % distinct].clone());
        }
        Ok(prompts)
    }

    /// By the server's own tokenizer.
    async fn count_tokens(&self, target: &Target, text: &str) -> Result<u32> {
        let body = json!({ "model": self.model, "prompt": text }).to_string();
        let answer = target.ask("POST", "/tokenize", body.as_bytes()).await?;
        let count = answer["count"].as_u64().and_then(|count| u32::try_from(count).ok());
        count.ok_or_else(|| Failure("/tokenize: the answer has no count".into()))
    }

    fn prompt(&self, prompt: Value, max_tokens: u32, ignore_eos: bool) -> Prompt {
        Prompt::Whole(self.template().body(prompt, max_tokens, ignore_eos))
    }

    fn template(&self) -> Template {
        Template {
            model: self.model.to_owned(),
            endpoint: self.endpoint,
            temperature: self.args.temperature,
            seed: self.args.seed,
            vocab_size: self.args.random_vocab_size,
        }
    }

    /// The requests of a trace.
    pub(crate) fn recorded(&self, requests: impl IntoIterator<Item = TraceRequest>) -> Vec<Prompt> {
        let template = Arc::new(self.template());
        let recorded = requests
            .into_iter()
            .zip(0..)
            .map(|(request, at)| Prompt::Recorded(Recorded { request, at, template: Arc::clone(&template) }));
        recorded.collect()
    }
}

/// Uniform around `mean`; at least 1.
fn length(random: &mut Random, mean: u32, range_ratio: f64) -> u32 {
    let low = (f64::from(mean) * (1.0 - range_ratio)).floor().max(1.0) as u64;
    let high = (f64::from(mean) * (1.0 + range_ratio)).ceil().min(f64::from(u32::MAX)) as u64;
    (low + random.next() % (high - low + 1)) as u32
}

fn words(tokens: &[u32]) -> String {
    let words: Vec<&str> = tokens.iter().map(|&token| WORDS[token as usize % WORDS.len()]).collect();
    words.join(" ")
}

#[derive(Deserialize)]
struct Conversation {
    #[serde(alias = "conversation", default)]
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(alias = "content")]
    value: String,
}

/// The first turn of each conversation and the answer to it.
fn read_sharegpt(path: &Path) -> Result<Vec<(String, String)>> {
    let fail = |error: &dyn std::fmt::Display| Failure(format!("--dataset-path {}: {error}", path.display()));
    let text = std::fs::read(path).map_err(|error| fail(&error))?;
    let conversations: Vec<Conversation> = serde_json::from_slice(&text).map_err(|error| fail(&error))?;
    let pairs = conversations.into_iter().filter_map(|conversation| {
        let mut turns = conversation.conversations.into_iter().map(|turn| turn.value);
        let pair = (turns.next()?, turns.next()?);
        (!pair.0.is_empty() && !pair.1.is_empty()).then_some(pair)
    });
    Ok(pairs.collect())
}

/// Fisher & Yates.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = Random(seed);
    for last in (1..items.len()).rev() {
        items.swap(last, (random.next() % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DatasetArgs,
    }

    fn random(line: &str, endpoint: Endpoint, count: u32) -> Vec<Value> {
        let args = Line::parse_from(format!("bench {line}").split_whitespace()).args;
        let prompts = Builder { args: &args, endpoint, model: "m" }.random(count).unwrap();
        prompts.into_iter().map(|prompt| serde_json::from_slice(&prompt.body()).unwrap()).collect()
    }

    #[test]
    fn random_prompts_have_their_lengths_and_prefix() {
        let line =
            "--random-input-len 100 --random-output-len 10 --random-range-ratio 0.2 --random-prefix-len 5";
        let bodies = random(line, Endpoint::Completions, 300);
        assert_eq!(bodies, random(line, Endpoint::Completions, 300));
        let prefix = &bodies[0]["prompt"].as_array().unwrap()[..5];
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for body in &bodies {
            let prompt = body["prompt"].as_array().unwrap();
            assert_eq!(&prompt[..5], prefix);
            assert!(prompt.iter().all(|token| token.as_u64().unwrap() < 1000));
            inputs.push(prompt.len() - 5);
            outputs.push(body["max_tokens"].as_u64().unwrap());
            assert!(body["ignore_eos"] == true && body["stream_options"]["include_usage"] == true);
        }
        let span = |values: &[u64]| (*values.iter().min().unwrap(), *values.iter().max().unwrap());
        let inputs: Vec<u64> = inputs.iter().map(|&len| len as u64).collect();
        assert!(span(&inputs).0 >= 80 && span(&inputs).1 <= 120 && span(&inputs).1 - span(&inputs).0 > 30);
        assert_eq!(span(&outputs), (8, 12));
        assert_ne!(bodies[0]["prompt"], bodies[1]["prompt"]);
    }

    #[test]
    fn chat_prompts_are_as_many_words() {
        let bodies = random("--random-input-len 7", Endpoint::Chat, 2);
        let content = bodies[1]["messages"][0]["content"].as_str().unwrap();
        assert_eq!(content.split(' ').count(), 7);
    }

    /// Two prompts are the same up to where the trace says so, and no further; without names they share nothing.
    #[test]
    fn prompts_of_a_trace_share_what_the_recorded_ones_shared() {
        let args = Line::parse_from(["bench", "--random-vocab-size", "30000"]).args;
        let builder = Builder { args: &args, endpoint: Endpoint::Completions, model: "m" };
        let request = |input_tokens, blocks: &[u64]| TraceRequest {
            arrival: quire_core::Micros(0),
            input_tokens,
            output_tokens: 7,
            blocks: blocks.to_vec(),
        };
        let trace = [
            request(1300, &[1, 2, 3]),
            request(1200, &[1, 2, 4]),
            request(700, &[5, 6]),
            request(600, &[]),
            request(600, &[]),
        ];
        let prompts = |seed| {
            let args = DatasetArgs { seed, ..args.clone() };
            let prompts = Builder { args: &args, ..builder }.recorded(trace.clone());
            let body = |prompt: Prompt| serde_json::from_slice::<Value>(&prompt.body()).unwrap();
            prompts.into_iter().map(body).collect::<Vec<_>>()
        };
        let bodies = prompts(3);
        assert_eq!(bodies, prompts(3));
        assert_ne!(bodies[0]["prompt"], prompts(4)[0]["prompt"]);
        let tokens = |at: usize| bodies[at]["prompt"].as_array().unwrap();
        let shared = |a, b| tokens(a).iter().zip(tokens(b)).take_while(|(a, b)| a == b).count();
        assert_eq!([tokens(0).len(), tokens(1).len(), tokens(3).len()], [1300, 1200, 600]);
        assert_eq!(shared(0, 1), 1024);
        assert!(shared(0, 2) < 4 && shared(3, 4) < 4 && shared(0, 3) < 4);
        assert!(bodies.iter().all(|body| body["max_tokens"] == 7 && body["ignore_eos"] == true));
    }

    #[test]
    fn too_much_is_refused_before_it_is_built() {
        let args = Line::parse_from(["bench", "--random-input-len", "4000000000"]).args;
        let builder = Builder { args: &args, endpoint: Endpoint::Completions, model: "m" };
        assert!(builder.random(1000).unwrap_err().to_string().contains("--num-prompts"));
    }

    #[test]
    fn conversations_are_read() {
        let path = std::env::temp_dir().join(format!("quire-sharegpt-{}.json", std::process::id()));
        let text = r#"[{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"value": "alone"}]}, {"conversation": [{"content": "c"}, {"content": "d"}]}]"#;
        std::fs::write(&path, text).unwrap();
        let pairs = read_sharegpt(&path).unwrap();
        std::fs::write(&path, "[{").unwrap();
        let error = read_sharegpt(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(pairs, [("a".into(), "b".into()), ("c".into(), "d".into())]);
        assert!(error.contains("--dataset-path") && error.contains("line 1"), "{error}");
    }
}

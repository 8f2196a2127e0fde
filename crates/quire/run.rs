//! `quire run`: a conversation in the terminal, or one answer to standard output.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_llm::{ChatMessage, ChatPrompt, GenerateRequest, Generation, Llm, Prompt, SamplingOptions};
use tokio::sync::mpsc;

use crate::cli::RunArgs;
use crate::loading::{self, Audience, Served};
use crate::model::ModelSource;
use crate::signals::Signals;
use crate::{Failure, Result};

const HELP: &str = "Ctrl-C stops an answer; /clear forgets the conversation; /exit or Ctrl-D leaves.";

/// Loads the model and talks.
pub(crate) fn run(args: &RunArgs, out: &mut impl Write) -> Result<()> {
    let source = ModelSource::resolve(args.engine.model.as_deref())?;
    let name = source.default_name();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("cannot start the I/O thread: {error}")))?;
    let served = Served { name: &name, lora_modules: &[], to: Audience::Terminal };
    let loaded = loading::load(&args.engine, None, source, &served, runtime.handle())?;
    let chat = Chat { args, llm: loaded.llm.clone(), history: Vec::new() };
    let prompt = match &args.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if io::stdin().is_terminal() => None,
        None => Some(read_all(&mut io::stdin().lock())?),
    };
    runtime.block_on(async {
        let mut signals =
            Signals::install().map_err(|error| Failure(format!("cannot listen for signals: {error}")))?;
        let outcome = match prompt {
            Some(prompt) => chat.once(&prompt, &mut signals, out).await,
            None => {
                let weights = loaded.config.quantized().map(|format| format!("{format}\n"));
                let weights = weights.unwrap_or_default();
                eprintln_lossy(&format!("{name}: {}\n{weights}{HELP}", loaded.headline));
                chat.converse(&mut read_lines(), &mut signals, out).await
            }
        };
        if let (Ok(()), Some(writer)) = (&outcome, &loaded.pack_writer) {
            tokio::select! {
                () = finished(writer) => {}
                () = signals.next() => {}
            }
        }
        outcome
    })
}

/// Waits for a thread that began long ago, so that it hardly matters how.
async fn finished(thread: &JoinHandle<()>) {
    while !thread.is_finished() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn read_all(input: &mut impl Read) -> Result<String> {
    let mut text = String::new();
    input
        .read_to_string(&mut text)
        .map_err(|error| Failure(format!("cannot read standard input: {error}")))?;
    let text = text.trim_end_matches(['\r', '\n']).to_owned();
    if text.is_empty() {
        Err(Failure("standard input is empty; give a prompt with -p".into()))
    } else {
        Ok(text)
    }
}

/// Lines typed, from a thread of their own: reading a terminal cannot be cancelled. Ends with the input.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// How an answer ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Complete,
    Stopped,
}

struct Chat<'a> {
    args: &'a RunArgs,
    llm: Llm,
    history: Vec<ChatMessage>,
}

impl Chat<'_> {
    /// One answer. Ctrl-C ends it, and the program with it.
    async fn once(mut self, prompt: &str, signals: &mut Signals, out: &mut impl Write) -> Result<()> {
        let end = self.answer(prompt, signals, out).await?;
        writeln!(out).map_err(Failure::output)?;
        if end == End::Stopped { Err(Failure("interrupted".into())) } else { Ok(()) }
    }

    /// Question and answer until the input ends.
    async fn converse(
        mut self,
        lines: &mut mpsc::Receiver<String>,
        signals: &mut Signals,
        out: &mut impl Write,
    ) -> Result<()> {
        loop {
            write!(out, ">>> ").and_then(|()| out.flush()).map_err(Failure::output)?;
            let line = tokio::select! {
                line = lines.recv() => line,
                () = signals.next() => {
                    writeln!(out, "\n{HELP}").map_err(Failure::output)?;
                    continue;
                }
            };
            let Some(line) = line else { return writeln!(out).map_err(Failure::output) };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" | "/bye" => return Ok(()),
                "/clear" => self.history.clear(),
                "/help" | "/?" => writeln!(out, "{HELP}").map_err(Failure::output)?,
                question => {
                    let ended = self.answer(question, signals, out).await;
                    writeln!(out, "\n").map_err(Failure::output)?;
                    if let Err(error) = ended {
                        eprintln_lossy(&format!("error: {error}"));
                    }
                }
            }
        }
    }

    /// Streams the answer to `question`, and remembers both. A question that got no answer is forgotten.
    async fn answer(&mut self, question: &str, signals: &mut Signals, out: &mut impl Write) -> Result<End> {
        let request = self.request(question);
        let mut generation = self.llm.generate(request).await.map_err(|error| Failure(error.to_string()))?;
        let mut answer = String::new();
        let end = stream(&mut generation, &mut answer, signals, out).await?;
        self.history.push(ChatMessage::new("user", question));
        self.history.push(ChatMessage::new("assistant", answer));
        Ok(end)
    }

    /// The conversation with `question` at its end; for a model without a chat template, `question` alone as a text to
    /// go on with.
    fn request(&self, question: &str) -> GenerateRequest {
        let prompt = if self.llm.has_chat_template() {
            let system = self.args.system.iter().map(|text| ChatMessage::new("system", text));
            let question = ChatMessage::new("user", question);
            Prompt::Chat(ChatPrompt::new(
                system.chain(self.history.iter().cloned()).chain([question]).collect(),
            ))
        } else {
            Prompt::Text(question.to_owned())
        };
        let sampling = SamplingOptions {
            temperature: self.args.temperature,
            max_tokens: self.args.max_tokens,
            seed: self.args.seed,
            ..SamplingOptions::default()
        };
        GenerateRequest { sampling, ..GenerateRequest::new(prompt) }
    }
}

/// Writes pieces as they come, and collects them. Stopping drops nothing that was shown.
async fn stream(
    generation: &mut Generation,
    answer: &mut String,
    signals: &mut Signals,
    out: &mut impl Write,
) -> Result<End> {
    loop {
        let delta = tokio::select! {
            delta = generation.next() => delta,
            () = signals.next() => return Ok(End::Stopped),
        };
        let Some(delta) = delta else { return Ok(End::Complete) };
        let delta = delta.map_err(|error| Failure(error.to_string()))?;
        answer.push_str(&delta.text);
        out.write_all(delta.text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::output)?;
    }
}

/// To standard error, if there is one.
fn eprintln_lossy(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

//! The application shell: command line, configuration, wiring. The only place that knows flags, environment and TOML.
//!
//! Reading order: [`cli`] and [`args`] (what can be asked), [`layers`] (where settings come from), [`config`] (what they
//! become), then one module a command: `serve`, `run`, `inspect`, [`bench`],
//! [`doctor`], `sim_cmd`; and what they share: `loading`,
//! `ranks`, [`model`] with [`hub`], [`metrics`] with [`process`], [`machine`], [`units`], [`logging`], `signals`.
#![forbid(unsafe_code)]

mod admin;
pub mod args;
mod audit;
pub mod bench;
pub mod cli;
pub mod config;
pub mod doctor;
mod gpu;
pub mod hub;
mod inspect;
pub mod layers;
mod loading;
pub mod logging;
mod lora;
pub mod machine;
pub mod metrics;
pub mod model;
mod prepack;
pub mod process;
mod ranks;
mod run;
mod serve;
mod signals;
mod sim_cmd;
mod sim_plots;
mod sim_trace;
mod svg;
mod targets;
mod tenants;
mod tls;
pub mod units;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command};
use crate::layers::{LayerError, Parsed};

/// Why a command ends with a status other than 0. Messages are for people; nothing branches on them.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failure(String);

type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Standard output went away or is full.
    #[allow(clippy::needless_pass_by_value)] // for `map_err`
    fn output(error: io::Error) -> Self {
        Self(format!("cannot write the output: {error}"))
    }
}

/// Errors of the parts, whose texts say everything already.
macro_rules! failure_from {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self(error.to_string())
            }
        })*
    };
}
failure_from!(config::ConfigError, model::SourceError, String);

/// The program: reads the command line and runs it.
pub fn main() -> ExitCode {
    process::mark_start();
    let argv: Vec<OsString> = std::env::args_os().collect();
    let parsed = match layers::parse(&argv, std::env::vars_os()) {
        Ok(parsed) => parsed,
        Err(LayerError::Cli(error)) => error.exit(),
        Err(error) => return fail(&error),
    };
    match dispatch(parsed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    // Without standard error there is nobody to tell; the status remains.
    let _ = writeln!(io::stderr(), "error: {error}");
    ExitCode::FAILURE
}

fn dispatch(parsed: Parsed) -> Result<()> {
    let Parsed { cli: Cli { command, .. }, settings, warnings } = parsed;
    let warnings = &warnings[..];
    let mut out = io::stdout();
    match command {
        Command::Serve(args) => {
            start_logging(args.common.log_format, "info", warnings)?;
            serve::serve(&args, &settings, &mut out)
        }
        Command::Run(args) => {
            start_logging(args.common.log_format, "warn", warnings)?;
            run::run(&args, &mut out)
        }
        Command::Sim(args) => sim_cmd::sim(&args, &mut out),
        Command::Inspect(args) => {
            start_logging(args.common.log_format, "warn", warnings)?;
            inspect::inspect(&args, &mut out)
        }
        Command::Bench(args) => {
            start_logging(args.log_format(), "warn", warnings)?;
            bench::bench(&args, &mut out)
        }
        Command::Doctor => doctor::doctor(&mut out).map_err(Failure::output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "quire", &mut script);
            out.write_all(&script).map_err(Failure::output)
        }
    }
}

fn start_logging(format: args::LogFormat, level: &str, warnings: &[String]) -> Result<()> {
    logging::init(format, level)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(())
}

//! `--ttft-target` and `--itl-target` become the scheduler's policy.

use std::time::Duration;

use quire_core::Micros;
use quire_model::{Mixer, ModelSpec};
use quire_scheduler::{CostModel, LatencyTargets, Policy};

use crate::args::ServerArgs;
use crate::config::{Config, ConfigError};

/// What a core does in a second, roughly. The scheduler starts from it and learns from each step.
const BYTES_PER_CORE: f64 = 15e9;
const OPS_PER_CORE: f64 = 150e9;
/// Of any step, and of each sequence in it, in microseconds.
const FIXED_US: f64 = 200.0;
const PER_ROW_US: f64 = 20.0;

/// What a deployment promises its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Time to the first token.
    ttft: Duration,
    /// Time between two tokens.
    itl: Duration,
}

impl Targets {
    /// Both flags, or none.
    ///
    /// # Errors
    /// One without the other, or a target of zero.
    pub(crate) fn of(args: &ServerArgs) -> Result<Option<Self>, ConfigError> {
        let error = |flag, message: &str| Err(ConfigError { flag, message: message.to_owned() });
        match (args.ttft_target, args.itl_target) {
            (None, None) => Ok(None),
            (Some(_), None) => error("itl-target", "must be given with --ttft-target, for example 50ms"),
            (None, Some(_)) => error("ttft-target", "must be given with --itl-target, for example 2s"),
            (Some(Duration::ZERO), _) => error("ttft-target", "must be more than 0"),
            (_, Some(Duration::ZERO)) => error("itl-target", "must be more than 0"),
            // A prompt waits for the step at work, which may take as long as the target between tokens.
            (Some(ttft), Some(itl)) if ttft <= itl => {
                error("ttft-target", "must be more than --itl-target: a prompt waits for the step at work")
            }
            (Some(ttft), Some(itl)) => Ok(Some(Self { ttft, itl })),
        }
    }

    /// Requests by slack, prompts in chunks that keep steps within the target.
    pub(crate) fn policy(self, config: &Config, spec: &ModelSpec) -> Policy {
        let micros = |time: Duration| Micros(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        Policy::DeadlineSlack(LatencyTargets {
            ttft: micros(self.ttft),
            itl: micros(self.itl),
            ..LatencyTargets::new(first_guess(config, spec))
        })
    }
}

/// Before any step was measured.
pub(crate) fn first_guess(config: &Config, spec: &ModelSpec) -> CostModel {
    let cores = f64::from(config.threads);
    let (per_byte, per_op) = (1e6 / (BYTES_PER_CORE * cores), 1e6 / (OPS_PER_CORE * cores));
    let widths = spec.layers.iter().map(|layer| {
        let Mixer::Gqa(gqa) = &layer.mixer;
        gqa.num_heads * gqa.head_dim
    });
    let memory = &config.memory;
    CostModel {
        fixed: FIXED_US,
        per_row: PER_ROW_US,
        weights: per_byte * memory.weight_bytes as f64,
        per_token: per_op * 2.0 * config.weights.num_weights as f64,
        per_context_token: per_byte * memory.kv_block_bytes as f64 / f64::from(memory.block_size),
        per_attention: per_op * 4.0 * widths.sum::<usize>() as f64,
        // Read here, written there.
        per_copied_block: per_byte * 2.0 * memory.kv_block_bytes as f64,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn targets(flags: &str) -> Result<Option<Targets>, &'static str> {
        let line = ["quire", "serve"].into_iter().chain(flags.split_whitespace());
        let Command::Serve(args) = Cli::try_parse_from(line).unwrap().command else { panic!("not serve") };
        Targets::of(&args.server).map_err(|error| error.flag)
    }

    #[test]
    fn targets_come_in_pairs() {
        assert_eq!(targets(""), Ok(None));
        assert_eq!(targets("--ttft-target 2s"), Err("itl-target"));
        assert_eq!(targets("--itl-target 50ms"), Err("ttft-target"));
        assert_eq!(targets("--ttft-target 0s --itl-target 50ms"), Err("ttft-target"));
        assert_eq!(targets("--ttft-target 50ms --itl-target 50ms"), Err("ttft-target"));
        let given = Targets { ttft: Duration::from_secs(2), itl: Duration::from_millis(50) };
        assert_eq!(targets("--ttft-target 2s --itl-target 50ms"), Ok(Some(given)));
    }
}

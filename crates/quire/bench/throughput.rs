//! `quire bench throughput`: everything submitted at once, and the time until all of it is done.

use super::Progress;
use super::args::ThroughputArgs;
use super::harness::{Load, Model, Needs};
use super::report::{Report, table};
use crate::Result;

/// Default bound of the batch, as the server's.
const MAX_NUM_SEQS: u32 = 64;

/// Measures one load.
pub(crate) fn throughput(args: &ThroughputArgs, progress: &mut Progress) -> Result<Report> {
    let num_seqs = args.num_prompts.min(MAX_NUM_SEQS);
    let len = args.input_len.saturating_add(args.output_len);
    let needs = Needs { num_requests: args.num_prompts, num_seqs, len, resident: false };
    let mut model = Model::open(&args.model, needs)?;
    let (mut harness, device) = model.start(progress)?;
    let mut report = Report::new(model.config.threads, &device);
    report.text(&model.headline());
    let prompts = model.prompts(args.num_prompts, args.input_len);

    // Touches every weight and buffer once.
    harness.run(Load { prompts: &prompts[..1], output_len: 1, salt: None }, |_| ())?;
    let mut steps = 0u64;
    let load = Load { prompts: &prompts, output_len: args.output_len, salt: None };
    let pass = harness.run(load, |_| {
        steps += 1;
        progress.say(|| format!("{} requests, step {steps}", args.num_prompts));
    })?;

    let seconds = pass.elapsed.as_secs_f64();
    let input_tokens = u64::from(args.num_prompts) * u64::from(args.input_len);
    let requests_s = f64::from(args.num_prompts) / seconds;
    let total_tok_s = (input_tokens + pass.num_sampled) as f64 / seconds;
    let output_tok_s = pass.num_sampled as f64 / seconds;
    let row = |what: &str| model.row(what, format_args!("{}x{}", args.input_len, args.output_len));
    report.row(row("requests_s"), requests_s, "req/s");
    report.row(row("total_tok_s"), total_tok_s, "tok/s");
    report.row(row("output_tok_s"), output_tok_s, "tok/s");
    report.text("");
    let header = ["requests", "input", "output", "seconds", "req/s", "total tok/s", "output tok/s"];
    let line = vec![
        args.num_prompts.to_string(),
        args.input_len.to_string(),
        args.output_len.to_string(),
        format!("{seconds:.2}"),
        format!("{requests_s:.2}"),
        format!("{total_tok_s:.1}"),
        format!("{output_tok_s:.1}"),
    ];
    report.text(table(&header, &[line]).trim_end());
    Ok(report)
}

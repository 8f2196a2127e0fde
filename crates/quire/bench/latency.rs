//! `quire bench latency`: one batch, prefill and decode apart.

use super::Progress;
use super::args::LatencyArgs;
use super::harness::{Harness, Load, Model, Needs};
use super::report::{Report, median, percentile, table};
use crate::{Failure, Result};

/// What one batch size gave.
struct Batch {
    size: u32,
    /// Of the pass that computed the prompts.
    fill_seconds: f64,
    /// Tokens per second, one value a repetition.
    decode_tok_s: Vec<f64>,
    /// Every counted decode step.
    step_seconds: Vec<f64>,
}

/// Measures every batch size asked for.
pub(crate) fn latency(args: &LatencyArgs, progress: &mut Progress) -> Result<Report> {
    let sizes = sorted(&args.batch_size);
    let largest = sizes.last().copied().unwrap_or(1);
    let len = args.input_len.saturating_add(args.output_len);
    let needs = Needs { num_requests: largest, num_seqs: largest, len, resident: true };
    let mut model = Model::open(&args.model, needs)?;
    let (mut harness, device) = model.start(progress)?;
    let mut report = Report::new(model.config.threads, &device);
    report.text(&model.headline());
    let smallest = sizes.first().copied().unwrap_or(1);
    let prefill = prefill(&mut harness, &model, args, smallest, progress)?;
    report.row(model.row("prefill_tok_s", args.input_len), prefill, "tok/s");
    let mut lines = Vec::new();
    for &size in &sizes {
        let batch = decode(&mut harness, &model, args, size, progress)?;
        lines.push(add_rows(&mut report, &model, args, &batch));
    }
    report.text(&format!("prefill  {prefill:.1} tok/s, {} tokens a prompt\n", args.input_len));
    let header = ["batch", "decode tok/s", "ms a step p50", "p90", "latency ms"];
    report.text(table(&header, &lines).trim_end());
    Ok(report)
}

/// Ascending, each once.
pub(crate) fn sorted(sizes: &[u32]) -> Vec<u32> {
    let mut sizes = sizes.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Prompt tokens per second: the median over the repetitions, nothing of which is found in the prefix cache.
fn prefill(
    harness: &mut Harness,
    model: &Model,
    args: &LatencyArgs,
    batch: u32,
    progress: &mut Progress,
) -> Result<f64> {
    let prompts = model.prompts(batch, args.input_len);
    let load = Load { prompts: &prompts, output_len: 1, salt: None };
    let mut rates = Vec::new();
    let repetitions = args.num_iters_warmup + args.num_iters;
    for iteration in 0..repetitions {
        let pass = harness.run(load, |_| {
            progress.say(|| format!("prefill, repetition {} of {repetitions}", iteration + 1));
        })?;
        if iteration >= args.num_iters_warmup {
            rates.push(f64::from(batch) * f64::from(args.input_len) / pass.elapsed.as_secs_f64());
        }
    }
    Ok(median(&rates))
}

/// One batch size: a pass that computes the prompts, then the repetitions, which find them.
fn decode(
    harness: &mut Harness,
    model: &Model,
    args: &LatencyArgs,
    size: u32,
    progress: &mut Progress,
) -> Result<Batch> {
    let prompts = model.prompts(size, args.input_len);
    let load = Load { prompts: &prompts, output_len: 1, salt: Some(size) };
    let fill = harness.run(load, |_| progress.say(|| format!("batch {size}: computing prompts")))?;
    let mut batch = Batch {
        size,
        fill_seconds: fill.elapsed.as_secs_f64(),
        decode_tok_s: Vec::new(),
        step_seconds: Vec::new(),
    };
    let load = Load { output_len: args.output_len, ..load };
    let repetitions = args.num_iters_warmup + args.num_iters;
    for iteration in 0..repetitions {
        let pass = harness.run(load, |_| {
            progress.say(|| format!("batch {size}: repetition {} of {repetitions}", iteration + 1));
        })?;
        let steps = pass.decode_seconds();
        if steps.is_empty() {
            return Err(Failure(format!(
                "the {size} sequences never decoded together; raise --output-len or --max-num-batched-tokens"
            )));
        }
        if iteration >= args.num_iters_warmup {
            batch.decode_tok_s.push(f64::from(size) * steps.len() as f64 / steps.iter().sum::<f64>());
            batch.step_seconds.extend(steps);
        }
    }
    Ok(batch)
}

/// Adds the rows of a batch size; returns its line of the table.
fn add_rows(report: &mut Report, model: &Model, args: &LatencyArgs, batch: &Batch) -> Vec<String> {
    let size = batch.size;
    let rate = median(&batch.decode_tok_s);
    let (p50, p90) = (median(&batch.step_seconds), percentile(&batch.step_seconds, 0.9));
    // The pass over the prompts gives the first token.
    let decode_seconds = f64::from(size) * f64::from(args.output_len - 1) / rate;
    let latency = batch.fill_seconds + decode_seconds;
    report.row(model.row("decode_tok_s", size), rate, "tok/s");
    report.row(model.row("step_us_p50", size), p50 * 1e6, "us");
    report.row(model.row("step_us_p90", size), p90 * 1e6, "us");
    report.row(model.row("latency_ms", size), latency * 1e3, "ms");
    vec![
        size.to_string(),
        format!("{rate:.1}"),
        format!("{:.2}", p50 * 1e3),
        format!("{:.2}", p90 * 1e3),
        format!("{:.0}", latency * 1e3),
    ]
}

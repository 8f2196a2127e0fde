//! `quire bench kernels`: the time of each operation in real steps, against what the machine can do.

use std::time::Duration;

use quire_backend::Backend;
use quire_cpu::Peaks;

use super::Progress;
use super::args::KernelsArgs;
use super::harness::{Harness, Load, Model, Needs};
use super::latency::sorted;
use super::probe::{Form, Limits};
use super::report::{Report, table};
use super::timed::{HostWatch, Op, SharedTally, Tally, Timed, Watch, Work};
use crate::{Failure, Result};

/// Several steps of one kind, added up.
#[derive(Default)]
struct Steps {
    count: u32,
    total: Duration,
    tally: Tally,
}

impl Steps {
    fn add(&mut self, duration: Duration, tally: &Tally) {
        self.count += 1;
        self.total += duration;
        self.tally.iter_mut().zip(tally).for_each(|(sum, work)| sum.add(*work));
    }

    /// Time outside the operations.
    fn other(&self) -> Duration {
        let ops: Duration = self.tally.iter().map(|work| work.time).sum();
        self.total.saturating_sub(ops)
    }
}

/// Measures the machine, one kind of prefill step, and decode steps at each batch size.
pub(crate) fn kernels(args: &KernelsArgs, progress: &mut Progress) -> Result<Report> {
    let sizes = sorted(&args.batch_size);
    let largest = sizes.last().copied().unwrap_or(1);
    // A decode pass computes what the prefix cache leaves of the prompts, then the steps that count.
    let output_len = args.num_iters.saturating_add(2);
    let needs = Needs {
        num_requests: largest,
        num_seqs: largest,
        len: args.input_len.saturating_add(output_len),
        resident: true,
    };
    let mut model_args = args.model.clone();
    model_args.engine.max_num_batched_tokens.get_or_insert(args.input_len.max(512).max(largest));
    if args.model.engine.tensor_parallel_size > 1 {
        return Err(Failure(
            "--tensor-parallel-size: operations are timed on one rank; leave it at 1".into(),
        ));
    }
    let mut model = Model::open(&model_args, needs)?;
    let plan = Plan { args, sizes: &sizes, output_len };
    if let Some(gpu) = model.take_gpu() {
        let device = gpu.describe();
        let (backend, watch, limits) = gpu.into_timed()?;
        let mut report = Report::new(model.config.threads, &device);
        report.machine("copy_gb_s", limits.read_bytes_s / 1e9);
        report.machine("gemm_gflop_s", limits.peaks.bf16 / 1e9);
        report.text(&format!(
            "limits   {:.0} GB/s copied (read and written), {:.1} TFLOP/s in a large product",
            limits.read_bytes_s / 1e9,
            limits.peaks.bf16 / 1e12
        ));
        return measure(report, &model, &plan, (vec![backend], watch), limits, progress);
    }
    let (backends, device) = model.cpu()?;
    let limits = Limits::measure(model.config.threads)?;
    let mut report = Report::new(model.config.threads, &device);
    report.machine("read_gb_s", limits.read_bytes_s / 1e9);
    let Peaks { f32, bf16, int8 } = limits.peaks;
    for (name, peak) in [("f32_gflop_s", f32), ("bf16_gflop_s", bf16), ("int8_gop_s", int8)] {
        report.machine(name, peak / 1e9);
    }
    report.text(&format!(
        "limits   {:.1} GB/s read; {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16, {:.0} Gop/s int8",
        limits.read_bytes_s / 1e9,
        f32 / 1e9,
        bf16 / 1e9,
        int8 / 1e9
    ));
    measure(report, &model, &plan, (backends, HostWatch), limits, progress)
}

/// What is to be measured.
struct Plan<'a> {
    args: &'a KernelsArgs,
    sizes: &'a [u32],
    output_len: u32,
}

fn measure<B: Backend, W: Watch<B> + Copy>(
    mut report: Report,
    model: &Model,
    plan: &Plan<'_>,
    (backends, watch): (Vec<B>, W),
    limits: Limits,
    progress: &mut Progress,
) -> Result<Report> {
    let Plan { args, sizes, output_len } = *plan;
    report.text(&model.headline());
    let tally = SharedTally::default();
    let timed = backends.into_iter().map(|backend| Timed::new(backend, watch, tally.clone())).collect();
    let mut harness = model.load(timed, progress)?;
    let steps = prefill(&mut harness, model, args, &tally, progress)?;
    add_steps(&mut report, model, &format!("prefill-{}", args.input_len), &steps, limits);
    for &size in sizes {
        let steps = decode(&mut harness, model, (args.input_len, output_len), size, &tally, progress)?;
        add_steps(&mut report, model, &format!("decode-{size}"), &steps, limits);
    }
    Ok(report)
}

fn prefill(
    harness: &mut Harness,
    model: &Model,
    args: &KernelsArgs,
    tally: &SharedTally,
    progress: &mut Progress,
) -> Result<Steps> {
    let prompts = model.prompts(1, args.input_len);
    let load = Load { prompts: &prompts, output_len: 1, salt: None };
    harness.run(load, |_| ())?;
    tally.take();
    let mut steps = Steps::default();
    for iteration in 0..args.num_iters {
        let pass = harness.run(load, |step| steps.add(step.duration, &tally.take()))?;
        if pass.steps.len() != 1 {
            return Err(Failure("--max-num-batched-tokens: must be at least --input-len here".into()));
        }
        progress.say(|| format!("prefill, step {} of {}", iteration + 1, args.num_iters));
    }
    Ok(steps)
}

fn decode(
    harness: &mut Harness,
    model: &Model,
    (input_len, output_len): (u32, u32),
    size: u32,
    tally: &SharedTally,
    progress: &mut Progress,
) -> Result<Steps> {
    let prompts = model.prompts(size, input_len);
    let load = Load { prompts: &prompts, output_len: 1, salt: Some(size) };
    harness.run(load, |_| progress.say(|| format!("batch {size}: computing prompts")))?;
    tally.take();
    let mut steps = Steps::default();
    let mut is_warm = false;
    harness.run(Load { output_len, ..load }, |step| {
        let work = tally.take();
        if step.is_decode && is_warm {
            steps.add(step.duration, &work);
        }
        is_warm |= step.is_decode;
        progress.say(|| format!("batch {size}: decoding"));
    })?;
    if steps.count == 0 {
        return Err(Failure(format!(
            "the {size} sequences never decoded together; raise --num-iters or --max-num-batched-tokens"
        )));
    }
    Ok(steps)
}

/// Adds the rows and the table of one kind of step.
fn add_steps(report: &mut Report, model: &Model, step: &str, steps: &Steps, limits: Limits) {
    let count = f64::from(steps.count);
    let total = steps.total.as_secs_f64();
    let mut lines = Vec::new();
    let form = Form { precision: model.precision(), quant: model.config.runner.quant };
    let ops = Op::ALL.iter().zip(&steps.tally).map(|(op, work)| (op.name(), *work, limits.peak(*op, form)));
    let other = Work { time: steps.other(), ..Work::default() };
    for (name, work, peak) in ops.chain([("other", other, f64::INFINITY)]) {
        let (seconds, share) = (work.time.as_secs_f64(), 100.0 * work.time.as_secs_f64() / total);
        let row = |what: &str| model.row(&format!("{what}/{name}"), step);
        report.row(row("op_us"), seconds / count * 1e6, "us");
        report.row(row("op_share"), share, "%");
        let mut line =
            vec![name.to_owned(), format!("{:.3}", seconds / count * 1e3), format!("{share:.1} %")];
        if let Some(of_limit) = of_limit(&work, limits.read_bytes_s, peak) {
            report.row(row("op_of_limit"), 100.0 * of_limit, "%");
            line.push(format!("{:.1}", work.bytes / seconds / 1e9));
            line.push(format!("{:.1}", work.flops / seconds / 1e9));
            line.push(format!("{:.0} %", 100.0 * of_limit));
        } else {
            line.extend(["", "", ""].map(String::from));
        }
        lines.push(line);
    }
    report.row(model.row("step_us", step), total / count * 1e6, "us");
    report.text(&format!("\n{step}: {:.3} ms a step", total / count * 1e3));
    let header = ["op", "ms", "share", "GB/s", "GFLOP/s", "of limit"];
    report.text(table(&header, &lines).trim_end());
}

/// The least time that the work could take, over the time it took.
fn of_limit(work: &Work, read_bytes_s: f64, peak: f64) -> Option<f64> {
    let least = (work.bytes / read_bytes_s).max(work.flops / peak);
    let seconds = work.time.as_secs_f64();
    (work.flops > 0.0 && seconds > 0.0).then(|| least / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_limit_counts() {
        let work = |bytes, flops| Work { time: Duration::from_secs(2), bytes, flops };
        assert_eq!(of_limit(&work(100.0, 1.0), 100.0, 1000.0), Some(0.5), "bytes");
        assert_eq!(of_limit(&work(100.0, 2000.0), 100.0, 1000.0), Some(1.0), "arithmetic");
        assert_eq!(of_limit(&Work::default(), 100.0, 1000.0), None);
    }
}

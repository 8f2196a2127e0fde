//! From what was measured to figures: distributions, goodput, CPU time per token.

use super::args::{Metric, ReportArgs, Target};
use super::client::Answer;
use super::run::{Measured, Sample};
use super::server::CpuTime;
use crate::bench::report::{Report, percentile, table};

/// What is said of one metric, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Distribution {
    pub(crate) mean: f64,
    pub(crate) median: f64,
    /// Of each percentile asked for.
    pub(crate) percentiles: Vec<f64>,
    pub(crate) max: f64,
}

impl Distribution {
    fn of(values: &[f64], percentiles: &[f64]) -> Self {
        Self {
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            median: percentile(values, 0.5),
            percentiles: percentiles.iter().map(|p| percentile(values, p / 100.0)).collect(),
            max: values.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// Tokens of an answer: what the server says, or else one an event.
pub(crate) fn output_tokens(answer: &Answer) -> u32 {
    answer.usage.map_or(answer.num_events, |usage| usage.completion_tokens)
}

/// Seconds of a metric of one request; `None` if it has no such time. Never called for ITL.
pub(crate) fn seconds(metric: Metric, answer: &Answer) -> Option<f64> {
    let decode = (answer.last_token - answer.first_token).as_secs_f64();
    match metric {
        Metric::Ttft => Some((answer.first_token - answer.sent).as_secs_f64()),
        Metric::E2el => Some((answer.last_token - answer.sent).as_secs_f64()),
        Metric::Tpot => {
            let further = output_tokens(answer).saturating_sub(1);
            (further > 0).then(|| decode / f64::from(further))
        }
        Metric::Itl => None,
    }
}

/// Whether a request met every target; a time it does not have meets any.
pub(crate) fn is_good(answer: &Answer, targets: &[Target]) -> bool {
    let meets = |target: &Target| {
        seconds(target.metric, answer).is_none_or(|seconds| seconds * 1e3 <= target.at_most_ms)
    };
    targets.iter().all(meets)
}

/// All values of a metric, of the requests that have it; not for ITL.
pub(crate) fn values(measured: &Measured, metric: Metric) -> Vec<f64> {
    measured.answers.iter().filter_map(|answer| seconds(metric, answer)).collect()
}

fn distribution(measured: &Measured, metric: Metric, percentiles: &[f64]) -> Distribution {
    if metric != Metric::Itl {
        return Distribution::of(&values(measured, metric), percentiles);
    }
    let gaps = &measured.gaps;
    Distribution {
        mean: gaps.mean(),
        median: gaps.percentile(0.5),
        percentiles: percentiles.iter().map(|p| gaps.percentile(p / 100.0)).collect(),
        max: gaps.max(),
    }
}

/// Seconds from the start until each request had its first token, and until the first one ended.
fn together(measured: &Measured) -> (f64, f64) {
    let since_start = |(answer, sent_at): (&Answer, &f64)| {
        let first = sent_at + (answer.first_token - answer.sent).as_secs_f64();
        (first, sent_at + (answer.last_token - answer.sent).as_secs_f64())
    };
    let times = measured.answers.iter().zip(&measured.sent_at).map(since_start);
    times.fold((0.0, f64::INFINITY), |(started, ended), (first, last)| {
        (f64::max(started, first), f64::min(ended, last))
    })
}

/// Events and CPU time of the server while all requests were streaming, if that was long enough to be measured.
pub(crate) fn steady(measured: &Measured) -> Option<(u64, CpuTime)> {
    let (started, ended) = together(measured);
    let inside = |sample: &&Sample| sample.at >= started && sample.at <= ended;
    let mut samples = measured.samples.iter().filter(inside);
    let (first, last) = (samples.next()?, samples.next_back()?);
    let cpu = last.server_cpu? - first.server_cpu?;
    // Else the ticks of the clock, of 10 ms, would show.
    (cpu.total() >= 0.1).then_some((last.num_events - first.num_events, cpu))
}

/// Rows, and their lines in the table for people.
struct Rows<'a> {
    report: &'a mut Report,
    lines: Vec<Vec<String>>,
}

impl Rows<'_> {
    fn put(&mut self, name: &str, value: f64, unit: &'static str) {
        self.report.row(name.to_owned(), value, unit);
        let shown = if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") };
        self.lines.push(vec![name.to_owned(), shown, unit.to_owned()]);
    }

    /// Per token, and what of it the program itself and the kernel took.
    fn put_cpu(&mut self, name: &str, cpu: CpuTime, tokens: f64) {
        let parts = [("", cpu.total()), ("/user", cpu.user), ("/system", cpu.system)];
        for (part, seconds) in parts {
            self.put(&format!("{name}{part}"), seconds * 1e6 / tokens.max(1.0), "us");
        }
    }
}

/// Adds all rows, and the tables for people.
pub(crate) fn fill(report: &mut Report, measured: &Measured, args: &ReportArgs) {
    let mut rows = Rows { report, lines: Vec::new() };
    let num_failed = measured.failures.values().map(|group| group.count).sum::<u64>();
    rows.put("duration_s", measured.seconds, "s");
    rows.put("completed_requests", measured.answers.len() as f64, "req");
    rows.put("failed_requests", num_failed as f64, "req");
    for (slug, group) in &measured.failures {
        rows.put(&format!("failed_requests/{slug}"), group.count as f64, "req");
    }
    rows.put("rejected_requests", measured.num_rejected as f64, "req");
    rows.put("max_concurrent_requests", f64::from(measured.max_in_flight), "req");
    put_rates(&mut rows, measured, args, num_failed);
    put_streaming(&mut rows, measured);
    let lines = rows.lines;
    report.text("");
    report.text(table(&["row", "value", "unit"], &lines).trim_end());
    let lines = put_times(report, measured, args);
    let percentiles = args.metric_percentiles.iter().filter(|p| **p != 50.0).map(|p| format!("p{p}"));
    let words = ["ms", "mean", "p50"].map(str::to_owned);
    let header: Vec<String> = words.into_iter().chain(percentiles).chain(["max".to_owned()]).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    report.text(&format!("\n{}", table(&header, &lines).trim_end()));
    for (slug, group) in &measured.failures {
        report.text(&format!("{} requests failed ({slug}): {}", group.count, group.example));
    }
    let silent = measured.answers.iter().filter(|answer| answer.usage.is_none()).count();
    if silent > 0 {
        report.text(&format!("{silent} answers had no usage; their tokens are their events"));
    }
}

fn total_output(measured: &Measured) -> u64 {
    measured.answers.iter().map(|answer| u64::from(output_tokens(answer))).sum()
}

fn put_rates(rows: &mut Rows, measured: &Measured, args: &ReportArgs, num_failed: u64) {
    let (count, seconds) = (measured.answers.len() as u64, measured.seconds.max(1e-9));
    let usages = measured.answers.iter().filter_map(|answer| answer.usage);
    let input: u64 = usages.map(|usage| u64::from(usage.prompt_tokens)).sum();
    let output = total_output(measured);
    rows.put("input_tokens", input as f64, "tok");
    rows.put("output_tokens", output as f64, "tok");
    rows.put("requests_s", count as f64 / seconds, "req/s");
    rows.put("output_tok_s", output as f64 / seconds, "tok/s");
    rows.put("total_tok_s", (input + output) as f64 / seconds, "tok/s");
    if !args.goodput.is_empty() {
        let good = measured.answers.iter().filter(|answer| is_good(answer, &args.goodput)).count();
        // A request that was refused or failed met nothing.
        let sent = count + measured.num_rejected + num_failed;
        rows.put("goodput_requests_s", good as f64 / seconds, "req/s");
        rows.put("goodput_share", 100.0 * good as f64 / sent.max(1) as f64, "%");
    }
}

fn put_streaming(rows: &mut Rows, measured: &Measured) {
    let output = total_output(measured) as f64;
    let events: u64 = measured.answers.iter().map(|answer| u64::from(answer.num_events)).sum();
    let reads: u64 = measured.answers.iter().map(|answer| u64::from(answer.num_reads)).sum();
    let tokens_per_event = output / events.max(1) as f64;
    rows.put("stream_events", events as f64, "events");
    rows.put("tokens_per_event", tokens_per_event, "tok");
    rows.put("events_per_read", events as f64 / reads.max(1) as f64, "events");
    rows.put("all_started_ms", together(measured).0 * 1e3, "ms");
    if let Some(cpu) = measured.server_cpu {
        rows.put_cpu("sse_cpu_us_per_token", cpu, output);
    }
    if let Some((events, cpu)) = steady(measured) {
        rows.put_cpu("sse_cpu_us_per_token_steady", cpu, events as f64 * tokens_per_event);
    }
    if let Some(cpu) = measured.client_cpu {
        rows.put_cpu("client_cpu_us_per_token", cpu, output);
    }
}

/// Adds the rows of the times; returns the lines of their table.
fn put_times(report: &mut Report, measured: &Measured, args: &ReportArgs) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for &metric in &args.percentile_metrics {
        let found = distribution(measured, metric, &args.metric_percentiles);
        let mut line = vec![metric.word().to_uppercase()];
        let mut put = |what: &str, seconds: f64| {
            report.row(format!("{}_ms_{what}", metric.word()), seconds * 1e3, "ms");
            line.push(format!("{:.2}", seconds * 1e3));
        };
        put("mean", found.mean);
        put("p50", found.median);
        for (p, value) in args.metric_percentiles.iter().zip(&found.percentiles) {
            if *p != 50.0 {
                put(&format!("p{p}"), *value);
            }
        }
        put("max", found.max);
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    use crate::bench::serve::sse::Usage;

    /// An answer by its times in milliseconds.
    fn answer(start: Instant, [sent, first, last]: [u64; 3], tokens: u32, events: u32) -> Answer {
        let at = |ms| start + Duration::from_millis(ms);
        Answer {
            sent: at(sent),
            first_token: at(first),
            last_token: at(last),
            num_events: events,
            num_reads: events,
            usage: Some(Usage { prompt_tokens: 10, completion_tokens: tokens }),
        }
    }

    /// Two requests, one event a token and two.
    fn measured() -> Measured {
        let start = Instant::now();
        let answers = vec![answer(start, [0, 100, 1000], 10, 10), answer(start, [100, 500, 2100], 17, 8)];
        Measured { seconds: 2.5, sent_at: vec![0.0, 0.1], answers, num_rejected: 1, ..Measured::default() }
    }

    fn report(measured: &Measured, line: &str) -> Vec<(String, f64)> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: ReportArgs,
        }
        let args = <Line as clap::Parser>::parse_from(format!("bench {line}").split_whitespace()).args;
        let mut report = Report::new(1, "test");
        fill(&mut report, measured, &args);
        report.rows().iter().map(|row| (row.name.clone(), row.value)).collect()
    }

    #[test]
    fn times_are_those_of_the_field() {
        let measured = measured();
        assert_eq!(values(&measured, Metric::Ttft), [0.1, 0.4]);
        assert_eq!(values(&measured, Metric::E2el), [1.0, 2.0]);
        assert_eq!(values(&measured, Metric::Tpot), [0.1, 0.1]);
        let single = answer(Instant::now(), [0, 5, 5], 1, 1);
        assert_eq!(seconds(Metric::Tpot, &single), None);
    }

    #[test]
    fn goodput_counts_requests_that_met_every_target() {
        let measured = measured();
        let count = |targets: &[&str]| {
            let targets: Vec<Target> = targets.iter().map(|text| text.parse().unwrap()).collect();
            measured.answers.iter().filter(|answer| is_good(answer, &targets)).count()
        };
        assert_eq!(count(&["ttft:100"]), 1);
        assert_eq!(count(&["ttft:400", "e2el:2000", "tpot:100"]), 2);
        assert_eq!(count(&["ttft:400", "e2el:999"]), 0);
        // One of three that were sent.
        let rows = report(&measured, "--goodput ttft:200 tpot:150");
        let value = |name: &str| rows.iter().find(|(row, _)| row == name).unwrap().1;
        assert_eq!((value("goodput_requests_s"), value("goodput_share")), (0.4, 33.333));
        for bad in ["ttft", "itl:5", "ttft:0", "ttft:x", "ttft:inf"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rows_add_up() {
        let mut measured = measured();
        measured.server_cpu = Some(CpuTime { user: 0.09, system: 0.18 });
        let rows = report(&measured, "--percentile-metrics ttft,itl --metric-percentiles 50,99.9");
        let value =
            |name: &str| rows.iter().find(|(row, _)| row == name).unwrap_or_else(|| panic!("{name}")).1;
        assert_eq!((value("requests_s"), value("output_tok_s"), value("total_tok_s")), (0.8, 10.8, 18.8));
        assert_eq!((value("tokens_per_event"), value("rejected_requests")), (1.5, 1.0));
        assert_eq!((value("all_started_ms"), value("sse_cpu_us_per_token")), (500.0, 10_000.0));
        assert_eq!(
            (value("ttft_ms_mean"), value("ttft_ms_p50"), value("ttft_ms_max")),
            (250.0, 250.0, 400.0)
        );
        assert_eq!(value("ttft_ms_p99.9"), 399.7);
        assert!(rows.iter().any(|(name, _)| name == "itl_ms_max"));
        assert!(!rows.iter().any(|(name, _)| name.starts_with("e2el") || name.contains("steady")));
    }

    #[test]
    fn steady_is_while_all_stream() {
        let mut measured = measured();
        let sample = |at: f64, num_events, cpu| Sample {
            at,
            num_events,
            in_flight: 2,
            server_cpu: Some(CpuTime { user: cpu, system: 0.0 }),
        };
        measured.samples = vec![
            sample(0.4, 3, 0.0),
            sample(0.5, 4, 0.1),
            sample(0.7, 6, 0.2),
            sample(0.9, 9, 0.4),
            sample(1.2, 12, 0.9),
        ];
        let (events, cpu) = steady(&measured).unwrap();
        assert!(events == 5 && (cpu.total() - 0.3).abs() < 1e-9);
        measured.samples.truncate(2);
        assert_eq!(steady(&measured), None);
    }
}

//! What the clients of a served trace saw, request by request and together.

use std::fmt;

use quire_core::{Micros, Usage};
use quire_scheduler::{SchedulerStats, WaitCause};

use crate::service::Fairness;

/// Part of a request's gaps between tokens that may be over the target.
const MAX_LATE_GAPS: f64 = 0.05;

/// One request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Served {
    pub(crate) tenant: u32,
    /// It once had a place.
    pub(crate) started: bool,
    /// What it waits for, since when.
    pub(crate) waits: Option<(WaitCause, Micros)>,
    /// Prompt tokens that are there, and the most that ever were.
    num_computed: u32,
    num_charged: u32,
    input_tokens: u32,
    arrival: Micros,
    /// When the first token is due.
    due: Micros,
    first_token: Option<Micros>,
    last_token: Micros,
    num_gaps: u32,
    num_late_gaps: u32,
    first_scheduled: Option<Micros>,
    cached_tokens: u32,
    finished: bool,
    refused: Option<Micros>,
}

impl Served {
    pub(crate) fn new(tenant: u32, input_tokens: u32, arrival: Micros, due: Micros) -> Self {
        Self {
            tenant,
            started: false,
            waits: None,
            num_computed: 0,
            num_charged: 0,
            input_tokens,
            arrival,
            due,
            first_token: None,
            last_token: arrival,
            num_gaps: 0,
            num_late_gaps: 0,
            first_scheduled: None,
            cached_tokens: 0,
            finished: false,
            refused: None,
        }
    }

    /// A token came. The gap before it, unless it was the first.
    pub(crate) fn token(&mut self, now: Micros, target: Micros) -> Option<u64> {
        let gap = now.0 - self.last_token.0;
        self.last_token = now;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            return None;
        }
        self.num_gaps += 1;
        self.num_late_gaps += u32::from(gap > target.0);
        Some(gap)
    }

    /// It enters the batch, and so many of its tokens are there; nobody is charged for these.
    pub(crate) fn found(&mut self, num_tokens: u32) -> u32 {
        self.num_computed = num_tokens;
        self.num_charged = self.num_charged.max(num_tokens.min(self.input_tokens));
        0
    }

    /// More tokens are computed: how many prompt tokens are so for the first time.
    pub(crate) fn computed(&mut self, num_tokens: u32) -> u32 {
        self.num_computed += num_tokens;
        let charged = self.num_charged.max(self.num_computed.min(self.input_tokens));
        charged - std::mem::replace(&mut self.num_charged, charged)
    }

    pub(crate) fn finish(&mut self, usage: &Usage) {
        self.finished = true;
        self.cached_tokens = usage.cached_tokens;
        self.first_scheduled = Some(usage.first_scheduled);
    }

    pub(crate) fn refuse(&mut self, now: Micros) {
        self.refused = Some(now);
    }

    fn is_good(&self) -> bool {
        self.finished
            && self.first_token.is_some_and(|at| at <= self.due)
            && f64::from(self.num_late_gaps) <= MAX_LATE_GAPS * f64::from(self.num_gaps)
    }
}

/// A histogram of durations, exact to a tenth of a millisecond up to ten seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gaps {
    counts: Vec<u64>,
    total: u64,
}

impl Gaps {
    const WIDTH: u64 = 100;
    const NUM_BUCKETS: u64 = 100_000;

    pub(crate) fn add(&mut self, micros: u64) {
        let bucket = (micros / Self::WIDTH).min(Self::NUM_BUCKETS - 1) as usize;
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
        self.total += other.total;
    }

    /// `(milliseconds, part of the durations within them)`, ascending.
    pub fn distribution(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let mut seen = 0;
        let filled = self.counts.iter().zip(1_u64..).filter(|(count, _)| **count > 0);
        filled.map(move |(count, at)| {
            seen += count;
            ((at * Self::WIDTH) as f64 / 1000.0, seen as f64 / self.total as f64)
        })
    }

    /// Milliseconds that `percent` of the durations stay within.
    pub fn percentile_ms(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.total as f64).ceil() as u64;
        let mut seen = 0;
        let bucket = self.counts.iter().position(|&count| {
            seen += count;
            seen >= rank
        });
        bucket.map_or(0.0, |bucket| ((bucket as u64 + 1) * Self::WIDTH) as f64 / 1000.0)
    }
}

/// All requests together. Times in seconds unless said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServeReport {
    /// Requests sent.
    pub num_requests: u64,
    /// Requests that got their first token in time and nearly all others as well.
    pub num_good: u64,
    /// Requests refused, at once or before they started; none of them is good.
    pub num_refused: u64,
    /// Requests per second, over the time in which they arrived.
    pub request_rate: f64,
    /// From the first arrival to the last token.
    pub duration: f64,
    /// Time to the first token of those that got one: half, 90 %, 99 % of them within.
    pub ttft: [f64; 3],
    /// The same of all, ascending; infinite where there was no token.
    pub all_ttft: Vec<f64>,
    /// Between tokens.
    pub gaps: Gaps,
    /// The longest wait for the first place in a step.
    pub max_wait: f64,
    /// The longest time until a refusal.
    pub max_refusal_wait: f64,
    /// Prompt tokens found in the prefix cache, in percent, over the requests that finished.
    pub hit_percent: f64,
    /// Percent of good requests by length of the input: a tenth of the requests each, shortest first.
    pub good_percent_by_length: [f64; 10],
    /// Times a sequence lost its blocks.
    pub num_preemptions: u64,
    /// What that cost, and what the host tier did.
    pub kv: KvReport,
    /// What requests waited for.
    pub waits: Waits,
    /// How service was shared between tenants.
    pub fairness: Fairness,
    /// What became of the requests by the time at which they came.
    pub over_time: Vec<Bucket>,
}

/// What became of KV that had to make room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvReport {
    /// Tokens computed in all steps.
    pub num_computed_tokens: u64,
    /// Those of them that had been computed before a preemption.
    pub num_recomputed_tokens: u64,
    /// Preemptions whose blocks were kept for the host tier.
    pub num_swaps: u64,
    /// Blocks of the host tier; 0 without one.
    pub num_host_blocks: u32,
    /// Bytes copied to it.
    pub bytes_out: u64,
    /// Bytes copied back.
    pub bytes_in: u64,
}

impl KvReport {
    pub(crate) fn add(&mut self, stats: &SchedulerStats, num_computed_tokens: u64) {
        self.num_computed_tokens += num_computed_tokens;
        self.num_recomputed_tokens += stats.num_recomputed_tokens;
        self.num_swaps += stats.host.num_swaps;
        self.num_host_blocks += stats.host.blocks_total;
        self.bytes_out += stats.host.bytes_out;
        self.bytes_in += stats.host.bytes_in;
    }

    /// Tokens computed again, of all.
    pub fn recomputed_percent(&self) -> f64 {
        100.0 * self.num_recomputed_tokens as f64 / self.num_computed_tokens.max(1) as f64
    }
}

impl fmt::Display for KvReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "recomputed  {:.3} % of the tokens", self.recomputed_percent())?;
        if self.num_host_blocks > 0 {
            let [out, back] = [self.bytes_out, self.bytes_in].map(|bytes| bytes as f64 / 1e9);
            write!(f, "; {} swaps, {out:.1} GB to host memory, {back:.1} GB back", self.num_swaps)?;
        }
        Ok(())
    }
}

/// Time that requests waited, all together, by what they waited for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Waits([u64; WaitCause::ALL.len()]);

impl Waits {
    /// `state` is what a request waits for from now on.
    pub(crate) fn change(
        &mut self,
        state: &mut Option<(WaitCause, Micros)>,
        now: Micros,
        cause: Option<WaitCause>,
    ) {
        let after = cause.map(|cause| (cause, now));
        if let Some((before, since)) = std::mem::replace(state, after) {
            self.0[before as usize] += now.since(since).0;
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }

    /// `(cause, seconds)` of those that anybody waited for.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        let all =
            WaitCause::ALL.into_iter().map(|cause| (cause.name(), self.0[cause as usize] as f64 * 1e-6));
        all.filter(|(_, seconds)| *seconds > 0.0)
    }
}

/// The requests that came in a while.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bucket {
    /// Seconds from the first arrival to the end of this while.
    pub until: f64,
    /// Requests per second.
    pub sent: f64,
    /// Those of them, per second, that got all in time.
    pub good: f64,
    /// Their prompt tokens, of those that were served, that were found in the prefix cache, in percent.
    pub hit_percent: f64,
}

/// Buckets of a report.
const NUM_BUCKETS: usize = 60;

impl ServeReport {
    /// In percent.
    pub fn good_percent(&self) -> f64 {
        100.0 * self.num_good as f64 / self.num_requests.max(1) as f64
    }

    /// Seconds to the first token that `percent` of all requests stay within; infinite if too few got one.
    pub fn ttft_percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.all_ttft.len() as f64).ceil() as usize;
        self.all_ttft.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }

    pub(crate) fn fill(&mut self, served: &[Served], last_arrival: u64, end: Micros) {
        self.num_requests = served.len() as u64;
        self.num_good = served.iter().filter(|served| served.is_good()).count() as u64;
        self.num_refused = served.iter().filter(|served| served.refused.is_some()).count() as u64;
        self.request_rate = served.len() as f64 / (last_arrival.max(1) as f64 * 1e-6);
        self.duration = end.as_secs_f64();
        let since = |served: &Served, at: Option<Micros>| at.map(|at| at.since(served.arrival).as_secs_f64());
        let longest = |times: &mut dyn Iterator<Item = f64>| times.fold(0.0, f64::max);
        self.max_wait = longest(&mut served.iter().filter_map(|s| since(s, s.first_scheduled)));
        self.max_refusal_wait = longest(&mut served.iter().filter_map(|s| since(s, s.refused)));
        let mut ttft: Vec<f64> = served.iter().filter_map(|s| since(s, s.first_token)).collect();
        ttft.sort_by(f64::total_cmp);
        self.ttft = [50, 90, 99].map(|percent| {
            let at = (ttft.len() * percent).div_ceil(100).saturating_sub(1);
            ttft.get(at).copied().unwrap_or(0.0)
        });
        ttft.resize(served.len(), f64::INFINITY);
        self.all_ttft = ttft;
        let finished = served.iter().filter(|served| served.finished);
        let (hits, tokens) = finished.fold((0, 0), |(hits, tokens), served| {
            (hits + u64::from(served.cached_tokens), tokens + u64::from(served.input_tokens))
        });
        self.hit_percent = 100.0 * hits as f64 / (tokens as f64).max(1.0);
        self.fill_deciles(served);
        self.fill_buckets(served, last_arrival);
    }

    fn fill_buckets(&mut self, served: &[Served], last_arrival: u64) {
        let width = (last_arrival / NUM_BUCKETS as u64 + 1) as f64 * 1e-6;
        let mut tokens = [(0.0, 0.0); NUM_BUCKETS];
        self.over_time = vec![Bucket::default(); NUM_BUCKETS];
        for served in served {
            let at = ((served.arrival.as_secs_f64() / width) as usize).min(NUM_BUCKETS - 1);
            let bucket = &mut self.over_time[at];
            bucket.sent += 1.0 / width;
            bucket.good += f64::from(u8::from(served.is_good())) / width;
            if served.finished {
                tokens[at].0 += f64::from(served.cached_tokens);
                tokens[at].1 += f64::from(served.input_tokens);
            }
        }
        for (at, (bucket, (cached, all))) in self.over_time.iter_mut().zip(tokens).enumerate() {
            bucket.until = (at + 1) as f64 * width;
            bucket.hit_percent = 100.0 * cached / all.max(1.0);
        }
    }

    fn fill_deciles(&mut self, served: &[Served]) {
        let mut by_length: Vec<&Served> = served.iter().collect();
        by_length.sort_by_key(|served| served.input_tokens);
        for (decile, percent) in self.good_percent_by_length.iter_mut().enumerate() {
            let part = &by_length[decile * served.len() / 10..(decile + 1) * served.len() / 10];
            let good = part.iter().filter(|served| served.is_good()).count();
            *percent = 100.0 * good as f64 / (part.len() as f64).max(1.0);
        }
    }
}

impl fmt::Display for ServeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [half, most, nearly_all] = self.ttft;
        writeln!(
            f,
            "requests    {} at {:.2}/s in {:.0} s, {} refused, {} preemptions",
            self.num_requests, self.request_rate, self.duration, self.num_refused, self.num_preemptions
        )?;
        writeln!(
            f,
            "goodput     {:.1} % of the requests within the targets: {:.2}/s",
            self.good_percent(),
            self.request_rate * self.good_percent() / 100.0
        )?;
        writeln!(f, "TTFT        p50 {half:.3} s, p90 {most:.3} s, p99 {nearly_all:.3} s")?;
        let [half, most, nearly_all] = [50.0, 90.0, 99.0].map(|percent| self.gaps.percentile_ms(percent));
        writeln!(f, "ITL         p50 {half:.1} ms, p90 {most:.1} ms, p99 {nearly_all:.1} ms")?;
        writeln!(f, "hit rate    {:.1} % of the prompt tokens", self.hit_percent)?;
        writeln!(f, "{}", self.kv)?;
        writeln!(f, "waits       {:.1} s at most, refusals {:.1} s", self.max_wait, self.max_refusal_wait)?;
        let all: f64 = self.waits.iter().map(|(_, seconds)| seconds).sum();
        write!(f, "waits for  ")?;
        self.waits
            .iter()
            .try_for_each(|(cause, seconds)| write!(f, " {cause} {:.0} %", 100.0 * seconds / all))?;
        writeln!(f)?;
        let Fairness { gap, dearest, .. } = &self.fairness;
        if self.fairness.service.len() > 1 {
            let ratio = self.fairness.ratio();
            writeln!(
                f,
                "fairness    gap {gap:.0} weighted tokens between tenants that both wait, {ratio:.2} times the dearest \
                 request ({dearest:.0})"
            )?;
        } else {
            writeln!(f, "fairness    gap 0, one tenant")?;
        }
        write!(f, "by length  ")?;
        for percent in self.good_percent_by_length {
            write!(f, " {percent:.0}")?;
        }
        write!(f, " % good, from the shortest tenth of the inputs to the longest")
    }
}

//! What each tenant of a served trace got, and how far two that both waited were apart.
//!
//! Service is counted as the scheduler's fairness does: a prompt token that is computed counts 1, an output token 2 (VTC;
//! Sheng et al., arXiv 2401.00588).

const OUTPUT_TOKEN_COST: f64 = 2.0;
/// Tenants at most: pairs of them are compared in every step.
pub const MAX_TENANTS: u32 = 64;

/// The accounts of all tenants on one device.
#[derive(Debug)]
pub(crate) struct Accounts {
    tenants: Vec<Tenant>,
    /// Of each pair that waits, by `smaller * len + larger`: the lead when both began to.
    leads: Vec<Option<f64>>,
    /// The largest difference between what two tenants got since both have something waiting.
    gap: f64,
    /// The dearest request so far.
    dearest: f64,
    /// Time between samples, in microseconds.
    period: u64,
    samples: Vec<Vec<f64>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    service: f64,
    num_waiting: u32,
}

impl Accounts {
    pub(crate) fn new(num_tenants: u32, period: u64) -> Self {
        let len = num_tenants as usize;
        Self {
            tenants: vec![Tenant::default(); len],
            leads: vec![None; len * len],
            gap: 0.0,
            dearest: 0.0,
            period: period.max(1),
            samples: Vec::new(),
        }
    }

    pub(crate) fn sent(&mut self, tenant: u32) {
        let (at, len) = (tenant as usize, self.tenants.len());
        self.tenants[at].num_waiting += 1;
        if self.tenants[at].num_waiting > 1 {
            return;
        }
        for other in (0..len).filter(|&other| other != at && self.tenants[other].num_waiting > 0) {
            let (one, two) = (at.min(other), at.max(other));
            self.leads[one * len + two] = Some(self.tenants[one].service - self.tenants[two].service);
        }
    }

    /// A request got its first place, or ended without one.
    pub(crate) fn waits_no_more(&mut self, tenant: u32) {
        self.tenants[tenant as usize].num_waiting -= 1;
    }

    pub(crate) fn computed(&mut self, tenant: u32, num_prompt_tokens: u32) {
        self.tenants[tenant as usize].service += f64::from(num_prompt_tokens);
    }

    pub(crate) fn token(&mut self, tenant: u32) {
        self.tenants[tenant as usize].service += OUTPUT_TOKEN_COST;
    }

    pub(crate) fn ended(&mut self, num_prompt_tokens: u32, num_output_tokens: u32) {
        let cost = f64::from(num_prompt_tokens) + OUTPUT_TOKEN_COST * f64::from(num_output_tokens);
        self.dearest = self.dearest.max(cost);
    }

    /// A step is over.
    pub(crate) fn step(&mut self, now: u64) {
        while self.samples.len() as u64 * self.period <= now {
            self.samples.push(self.tenants.iter().map(|tenant| tenant.service).collect());
        }
        let len = self.tenants.len();
        for (at, one) in self.tenants.iter().enumerate() {
            for (other_at, other) in self.tenants.iter().enumerate().skip(at + 1) {
                let before = &mut self.leads[at * len + other_at];
                if one.num_waiting == 0 || other.num_waiting == 0 {
                    *before = None;
                    continue;
                }
                let lead = one.service - other.service;
                self.gap = self.gap.max((lead - *before.get_or_insert(lead)).abs());
            }
        }
    }

    pub(crate) fn finish(self) -> Fairness {
        Fairness {
            gap: self.gap,
            dearest: self.dearest,
            service: self.tenants.iter().map(|tenant| tenant.service).collect(),
            period: self.period as f64 * 1e-6,
            samples: self.samples,
        }
    }
}

/// How service was shared, in weighted tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fairness {
    /// The largest difference between what two tenants got since both had something waiting; of one device.
    pub gap: f64,
    /// What the dearest request cost.
    pub dearest: f64,
    /// What each tenant got.
    pub service: Vec<f64>,
    /// Seconds between two samples.
    pub period: f64,
    /// What each tenant had got by then, from the start.
    pub samples: Vec<Vec<f64>>,
}

impl Fairness {
    /// The gap in units of the dearest request.
    pub fn ratio(&self) -> f64 {
        if self.dearest > 0.0 { self.gap / self.dearest } else { 0.0 }
    }

    /// Adds what another device did in the same time.
    pub(crate) fn merge(&mut self, other: Self) {
        self.gap = self.gap.max(other.gap);
        self.dearest = self.dearest.max(other.dearest);
        self.period = other.period;
        add(&mut self.service, &other.service);
        let len = self.samples.len().max(other.samples.len());
        let (mine, theirs) = (self.samples.last().cloned(), other.samples.last().cloned());
        self.samples.resize(len, mine.unwrap_or_default());
        let rest = std::iter::repeat_n(theirs.unwrap_or_default(), len - other.samples.len());
        for (sum, more) in self.samples.iter_mut().zip(other.samples.into_iter().chain(rest)) {
            add(sum, &more);
        }
    }
}

fn add(sum: &mut Vec<f64>, more: &[f64]) {
    sum.resize(sum.len().max(more.len()), 0.0);
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_only_while_both_wait() {
        let mut accounts = Accounts::new(2, 10);
        accounts.sent(0);
        accounts.computed(0, 1000);
        accounts.step(1);
        accounts.sent(1);
        accounts.step(2);
        // From here on both wait: first one is served, then the other.
        accounts.computed(0, 30);
        accounts.step(3);
        accounts.computed(1, 50);
        accounts.token(1);
        accounts.step(4);
        accounts.ended(100, 20);
        accounts.waits_no_more(0);
        accounts.computed(1, 5000);
        accounts.step(25);
        let fairness = accounts.finish();
        assert_eq!((fairness.gap, fairness.dearest), (30.0, 140.0), "30 ahead, then 22 behind");
        assert_eq!(fairness.service, [1030.0, 5052.0]);
        assert_eq!(fairness.samples, [[1000.0, 0.0], [1030.0, 5052.0], [1030.0, 5052.0]]);
        let mut both = fairness.clone();
        both.merge(Fairness { gap: 1.0, service: vec![1.0, 1.0], samples: vec![vec![1.0, 1.0]], ..fairness });
        assert_eq!((both.gap, both.service), (30.0, vec![1031.0, 5053.0]));
        assert_eq!(both.samples[2], [1031.0, 5053.0]);
    }
}

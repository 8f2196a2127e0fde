//! Learned eviction against plain LRU: which of the two chooses.
//!
//! Every sampled look-up is asked what LRU would have found ([`crate::history`] knows). If LRU leads over the last while,
//! it takes over for a time; then the learned order has another try, after twice the time for every try it lost. So
//! traffic that the model misreads costs little, whatever the traffic.

/// Part of the look-ups by which LRU must lead.
const MARGIN: f64 = 0.001;
/// Look-ups that count, and look-ups for which LRU takes over at first, per block of the sampled pool.
const MEMORY: u32 = 8;
const PENALTY: u32 = 2;
const MAX_BACKOFF: u32 = 32;

/// See the page above.
#[derive(Debug)]
pub(crate) struct Duel {
    window: f64,
    penalty: u32,
    /// Blocks that LRU would have found minus those found, over about the last `window` look-ups.
    lead: f64,
    /// Look-ups for which LRU still chooses.
    lru_for: u32,
    backoff: u32,
}

impl Duel {
    /// For a sampled pool of `num_blocks`.
    pub(crate) fn new(num_blocks: u32) -> Self {
        let num_blocks = num_blocks.clamp(256, 1 << 24);
        let (window, penalty) = (f64::from(num_blocks * MEMORY), num_blocks * PENALTY);
        Self { window, penalty, lead: 0.0, lru_for: 0, backoff: 1 }
    }

    /// Whether LRU chooses now.
    pub(crate) fn prefers_lru(&self) -> bool {
        self.lru_for > 0
    }

    /// One block was looked up: whether it was found, and whether LRU would have found it.
    pub(crate) fn count(&mut self, found: bool, found_by_lru: bool) {
        if self.lru_for > 0 {
            self.lru_for -= 1;
            return;
        }
        self.lead += f64::from(u8::from(found_by_lru)) - f64::from(u8::from(found));
        self.lead -= self.lead / self.window;
        let margin = MARGIN * self.window;
        if self.lead > margin {
            self.lead = 0.0;
            self.lru_for = self.penalty * self.backoff;
            self.backoff = (2 * self.backoff).min(MAX_BACKOFF);
        } else if self.lead < -4.0 * margin {
            self.backoff = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_one_chooses_nearly_always() {
        // (found once in, LRU finds once in, percent of the time that LRU chooses)
        for (found_in, lru_in, percents) in [(10, 20, 0..=0), (20, 10, 90..=99), (20, 20, 0..=0)] {
            let mut duel = Duel::new(1000);
            let mut by_lru = 0;
            for n in 0..1_000_000_u32 {
                duel.count(n % found_in == 0, n % lru_in == 0);
                by_lru += u32::from(duel.prefers_lru());
            }
            let percent = by_lru / 10_000;
            assert!(percents.contains(&percent), "1 in {found_in} against 1 in {lru_in}: {percent} %");
        }
    }
}

//! The k best of many in one pass, by keys that order tokens as sampling does: by logit, ties to the lower id.

use quire_core::TokenId;

/// A larger key is a better token.
pub(crate) fn key(logit: f32, id: TokenId) -> u64 {
    let bits = (logit + 0.0).to_bits(); // -0 becomes +0: they tie
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!id)
}

/// The token of a key.
pub(crate) const fn id_of(key: u64) -> TokenId {
    !(key as u32)
}

pub(crate) fn sort_best_first(keys: &mut [u64]) {
    keys.sort_unstable_by(|a, b| b.cmp(a));
}

/// Collects in `kept` whatever may be among the `k` best, and cuts back to `k` whenever twice as many came together.
pub(crate) struct TopK<'a> {
    kept: &'a mut Vec<u64>,
    k: usize,
    /// Keys up to this one cannot be among the best any more.
    bound: u64,
}

impl<'a> TopK<'a> {
    pub(crate) fn new(kept: &'a mut Vec<u64>, k: usize) -> Self {
        kept.clear();
        Self { kept, k, bound: 0 }
    }

    pub(crate) fn extend(&mut self, logits: &[f32]) {
        if self.k == 0 {
            return;
        }
        for (id, &logit) in logits.iter().enumerate() {
            let key = key(logit, id as TokenId);
            if key > self.bound {
                self.kept.push(key);
                if self.kept.len() >= 2 * self.k.max(16) {
                    self.cut();
                }
            }
        }
    }

    fn cut(&mut self) {
        if self.kept.len() > self.k {
            let (_, &mut kth, _) = self.kept.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
            self.bound = kth;
            self.kept.truncate(self.k);
        }
    }

    /// Leaves exactly the `k` best (or all, if there are fewer), best first.
    pub(crate) fn finish(mut self) {
        self.cut();
        sort_best_first(self.kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_a_full_sort_finds() {
        let logits: Vec<f32> = (0..5000u32).map(|i| ((i * 7919) % 101) as f32 - 50.0).collect();
        let mut all: Vec<u64> = logits.iter().enumerate().map(|(id, &l)| key(l, id as u32)).collect();
        sort_best_first(&mut all);
        for k in [0, 1, 2, 15, 40, 1000, 5000, 9000] {
            let mut kept = Vec::new();
            let mut top = TopK::new(&mut kept, k);
            top.extend(&logits);
            top.finish();
            assert_eq!(kept, all[..k.min(5000)], "k = {k}");
        }
    }

    #[test]
    fn keys_order_by_logit_then_lower_id() {
        let logits = [f32::NEG_INFINITY, f32::MIN, -1.0, 0.0, 1.0, f32::MAX];
        assert!(logits.windows(2).all(|w| key(w[0], 0) < key(w[1], 9)));
        assert!(key(0.0, 3) > key(-0.0, 4) && key(-0.0, 3) > key(0.0, 4));
        assert_eq!(id_of(key(1.5, 151_935)), 151_935);
    }
}

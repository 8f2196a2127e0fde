//! How soon an idle block is wanted again: a model of its reuse, learned from the traffic itself.
//!
//! What is known of a block when its last reference goes (turn of the conversation, lengths, pause before, uses) is a few
//! small [`Levels`]. The hazard, the probability per second of being wanted again, is modelled as
//! `baseline(age) * product of one factor per level` (proportional hazards; Cox, 1972). Baseline and factors are ratios
//! of observed to expected reuses, with a prior worth some hundred blocks; both move with every observation. Blocks are
//! then put in [`NUM_CLASSES`] classes by their product, and each class corrects the shape of the hazard by what its own
//! members did.
//!
//! A class and an age give the block's [`ReuseModel::index`]: the best ratio, over all times to wait, of the probability
//! to be wanted within that time to the time the block is expected to stay (the index of Gittins, 1979). Hazards rise
//! and fall with age (nobody answers in the first seconds), which is why neither recency nor frequency is enough.
//!
//! Only `+ - * /` on `f64`: the same decisions on every machine.

/// Ages are told apart by these edges, in microseconds: 0, then from 2 s to 2,048 s by half octaves.
pub(crate) const NUM_AGES: usize = 22;
/// The second of those edges.
pub(crate) const FIRST_EDGE: u64 = 2_000_000;
/// Classes of blocks by their product of factors, `NUM_HOT` of blocks with very many uses included.
pub(crate) const NUM_CLASSES: usize = 32;
/// The class of what a sequence left behind that was taken out of the batch and will go on: worth more than anything
/// else, until it has waited for too long. Nothing is learned of it.
pub(crate) const HELD: u8 = NUM_CLASSES as u8;
/// The class of what a waiting sequence will find: worth more than anything but what is held, for as long. Tenants are
/// served in rounds, so of these the one left last is wanted last, and goes first. Nothing is learned of it.
pub(crate) const WANTED: u8 = HELD + 1;
/// Age groups in which a held or wanted block is; after about eight minutes it goes first.
const HELD_AGES: usize = 17;
const NUM_HOT: usize = 4;
const NUM_SCORED: usize = NUM_CLASSES - NUM_HOT;
/// Uses from which a block's own history says more than what it is part of.
const HOT_USES: u8 = 16;
const NUM_FACTORS: usize = 6;
const NUM_LEVELS: usize = 11;
/// What the priors are worth, in blocks: of a factor, of a class's shape, of the baseline at one age.
const FACTOR_PRIOR: f64 = 300.0;
const SHAPE_PRIOR: f64 = 1000.0;
const BASELINE_PRIOR: f64 = 50.0;
/// Observations between two recomputations of one class's indices.
const REFRESH_INTERVAL: u32 = 128;
/// Reuses after which what was seen counts half, so that traffic may change.
const MEMORY: f64 = 200_000.0;
/// How much longer than its last edge the last age is taken to be, in seconds.
const LAST_WIDTH: f64 = 1000.0;

/// What is known of one block, as one small number per factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Levels([u8; NUM_FACTORS]);

/// What admission learned about a request; its blocks inherit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    /// 1 for the first request of a conversation.
    pub(crate) turn: u8,
    /// Seconds since the conversation's last turn.
    pub(crate) pause: Option<u32>,
    /// Prompt tokens never seen before.
    pub(crate) num_new_tokens: u32,
}

impl Default for Visit {
    fn default() -> Self {
        Self { turn: 1, pause: None, num_new_tokens: 0 }
    }
}

impl Visit {
    /// The levels of the request's blocks that were used `uses` times, after a prompt of `prompt_tokens` and an answer of
    /// `output_tokens`.
    pub(crate) fn levels(&self, prompt_tokens: u32, output_tokens: u32, uses: u8) -> Levels {
        let turn = match self.turn {
            0..=1 => 0,
            2..=5 => self.turn - 1,
            _ => 5,
        };
        let output = bits(output_tokens).clamp(3, 10) - 3;
        let prompt = bits(prompt_tokens / 256).min(10);
        let new = bits(self.num_new_tokens.div_ceil(512)).min(8);
        let pause = self.pause.map_or(0, |seconds| bits(seconds.saturating_add(1)).clamp(3, 9) - 2);
        let uses = bits(u32::from(uses)).saturating_sub(1).min(6);
        Levels([turn, output, prompt, new, pause, uses])
    }
}

/// Binary digits of `n`.
fn bits(n: u32) -> u8 {
    (u32::BITS - n.leading_zeros()) as u8
}

/// Reuses observed and expected.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    seen: f64,
    expected: f64,
}

impl Tally {
    fn halve(&mut self) {
        self.seen *= 0.5;
        self.expected *= 0.5;
    }
}

/// See the page above.
#[derive(Debug)]
pub(crate) struct ReuseModel {
    /// Where ages begin, in microseconds.
    edges: [u64; NUM_AGES],
    /// Seconds.
    widths: [f64; NUM_AGES],
    factors: [[Tally; NUM_LEVELS]; NUM_FACTORS],
    /// What the tallies of `factors` come to.
    multipliers: [[f64; NUM_LEVELS]; NUM_FACTORS],
    /// Per age: reuses, and seconds at risk weighted with the factors.
    baseline: [Tally; NUM_AGES],
    /// Per class and age: reuses, and seconds at risk.
    classes: Box<[[Tally; NUM_AGES]; NUM_CLASSES]>,
    /// Products of factors at which the scored classes begin, but for the first.
    class_edges: [f64; NUM_SCORED - 1],
    /// The product of factors that each class stands for.
    class_factor: [f64; NUM_CLASSES],
    indices: Box<[[f64; NUM_AGES]; NUM_CLASSES]>,
    /// The probability to be wanted again at all.
    chances: Box<[[f64; NUM_AGES]; NUM_CLASSES]>,
    /// Reuses in the tallies.
    num_reuses: f64,
    until_refresh: u32,
    next_refresh: usize,
}

impl ReuseModel {
    pub(crate) fn new() -> Self {
        const HALF_OCTAVE: f64 = std::f64::consts::SQRT_2;
        // Three classes to an octave, around 1; a constant, because `powf` differs between machines.
        const THIRD_OCTAVE: f64 = 1.259_921_049_894_873_2;
        const SIXTH_OCTAVE: f64 = 1.122_462_048_309_373;
        let mut edges = [0; NUM_AGES];
        let mut widths = [LAST_WIDTH; NUM_AGES];
        for age in 1..NUM_AGES {
            let octave = f64::from(1_u32 << age.div_ceil(2));
            let seconds = if age % 2 == 1 { octave } else { octave * HALF_OCTAVE };
            edges[age] = (seconds * 1e6) as u64;
            widths[age - 1] = (edges[age] - edges[age - 1]) as f64 * 1e-6;
        }
        let mut class_factor = [1.0; NUM_CLASSES];
        for class in NUM_SCORED / 2 + 1..NUM_SCORED {
            class_factor[class] = class_factor[class - 1] * THIRD_OCTAVE;
        }
        for class in (0..NUM_SCORED / 2).rev() {
            class_factor[class] = class_factor[class + 1] / THIRD_OCTAVE;
        }
        for hot in 0..NUM_HOT {
            class_factor[NUM_SCORED + hot] = f64::from(HOT_USES << hot);
        }
        let mut class_edges = [0.0; NUM_SCORED - 1];
        for (class, edge) in class_edges.iter_mut().enumerate() {
            *edge = class_factor[class] * SIXTH_OCTAVE;
        }
        let mut model = Self {
            edges,
            widths,
            factors: Default::default(),
            multipliers: Default::default(),
            baseline: Default::default(),
            classes: Box::default(),
            class_edges,
            class_factor,
            indices: Box::default(),
            chances: Box::default(),
            num_reuses: 0.0,
            until_refresh: REFRESH_INTERVAL,
            next_refresh: 0,
        };
        for factor in 0..NUM_FACTORS {
            for level in 0..NUM_LEVELS {
                model.refresh_multiplier(factor, level);
            }
        }
        for class in 0..NUM_CLASSES {
            model.refresh_class(class);
        }
        model
    }

    /// The age group of something idle for `micros`.
    pub(crate) fn age(&self, micros: u64) -> usize {
        self.edges[1..].partition_point(|&edge| edge <= micros)
    }

    /// Microseconds at which age group `age` begins.
    pub(crate) fn edge(&self, age: usize) -> u64 {
        self.edges[age]
    }

    /// The class of a block that was used `uses` times.
    pub(crate) fn class(&self, levels: Levels, uses: u8) -> u8 {
        if uses >= HOT_USES {
            let hot = (uses / HOT_USES).ilog2() as usize;
            return (NUM_SCORED + hot.min(NUM_HOT - 1)) as u8;
        }
        let product = self.product(levels);
        self.class_edges.partition_point(|&edge| edge <= product) as u8
    }

    /// What a second of keeping a block of this class and age is worth, in reuses. Compare only.
    pub(crate) fn index(&self, class: u8, age: usize) -> f64 {
        match self.indices.get(usize::from(class)) {
            Some(ages) => ages[age],
            None if age >= HELD_AGES => 0.0,
            None if class == WANTED => f64::MAX,
            None => f64::INFINITY,
        }
    }

    /// The probability that a block of this class and age is wanted again, in [0, 1].
    pub(crate) fn chance(&self, class: u8, age: usize) -> f64 {
        match self.chances.get(usize::from(class)) {
            Some(ages) => ages[age],
            None => f64::from(u8::from(age < HELD_AGES)),
        }
    }

    /// A block stayed idle throughout age group `age`.
    pub(crate) fn stayed(&mut self, levels: Levels, class: u8, age: usize) {
        self.observe(levels, class, age, self.widths[age], 0.0);
    }

    /// A block in age group `age` was wanted again, `micros` after it became idle.
    pub(crate) fn reused(&mut self, levels: Levels, class: u8, age: usize, micros: u64) {
        let seconds = (micros - self.edges[age]) as f64 * 1e-6;
        self.observe(levels, class, age, seconds, 1.0);
    }

    fn product(&self, levels: Levels) -> f64 {
        levels.0.iter().zip(&self.multipliers).map(|(&level, row)| row[usize::from(level)]).product()
    }

    fn observe(&mut self, levels: Levels, class: u8, age: usize, seconds: f64, seen: f64) {
        let tally = &mut self.classes[usize::from(class)][age];
        tally.seen += seen;
        tally.expected += seconds;
        // Blocks that everybody uses would drown what the levels say about the others.
        if usize::from(class) < NUM_SCORED {
            let product = self.product(levels);
            let expected = self.baseline_hazard(age) * seconds * product;
            for factor in 0..NUM_FACTORS {
                let level = usize::from(levels.0[factor]);
                let tally = &mut self.factors[factor][level];
                tally.seen += seen;
                tally.expected += expected / self.multipliers[factor][level];
                self.refresh_multiplier(factor, level);
            }
            self.baseline[age].seen += seen;
            self.baseline[age].expected += seconds * product;
        }
        self.num_reuses += seen;
        if self.num_reuses >= MEMORY {
            self.num_reuses *= 0.5;
            self.factors.as_flattened_mut().iter_mut().for_each(Tally::halve);
            self.baseline.iter_mut().for_each(Tally::halve);
            self.classes.as_flattened_mut().iter_mut().for_each(Tally::halve);
        }
        self.until_refresh -= 1;
        if self.until_refresh == 0 {
            self.until_refresh = REFRESH_INTERVAL;
            self.refresh_class(self.next_refresh);
            self.next_refresh = (self.next_refresh + 1) % NUM_CLASSES;
        }
    }

    fn refresh_multiplier(&mut self, factor: usize, level: usize) {
        // Before anything is known: who adds little to what was said comes back sooner than who pastes a book.
        const NEW_TOKENS: usize = 3;
        const BY_NEW_TOKENS: [f64; NUM_LEVELS] = [1.0, 2.0, 1.6, 1.3, 1.0, 0.85, 0.75, 0.7, 0.6, 0.6, 0.6];
        let prior = if factor == NEW_TOKENS { BY_NEW_TOKENS[level] } else { 1.0 };
        let tally = self.factors[factor][level];
        self.multipliers[factor][level] =
            (tally.seen + FACTOR_PRIOR * prior) / (tally.expected + FACTOR_PRIOR);
    }

    /// Reuses per second of a block whose factors are all 1.
    fn baseline_hazard(&self, age: usize) -> f64 {
        // Before anything is known: falling with age, so that the order is that of recency.
        let prior = 0.1 / (2.0 + (self.edges[age] as f64 * 1e-6).max(1.0));
        let tally = self.baseline[age];
        (tally.seen + BASELINE_PRIOR) / (tally.expected + BASELINE_PRIOR / prior)
    }

    fn refresh_class(&mut self, class: usize) {
        let mut hazards = [0.0; NUM_AGES];
        for (age, hazard) in hazards.iter_mut().enumerate() {
            let expected = self.class_factor[class] * self.baseline_hazard(age);
            let tally = self.classes[class][age];
            *hazard = expected * (tally.seen + SHAPE_PRIOR) / (tally.expected * expected + SHAPE_PRIOR);
        }
        for age in 0..NUM_AGES {
            let (mut alive, mut wanted, mut seconds, mut best) = (1.0, 0.0, 0.0, 0.0_f64);
            for (&hazard, &width) in hazards.iter().zip(&self.widths).skip(age) {
                let rate = hazard * width;
                // 1 - exp(-rate), near enough, without a library's exponential.
                let probability = 1.0 - 1.0 / (1.0 + rate + 0.5 * rate * rate);
                wanted += alive * probability;
                seconds += alive * probability / hazard;
                alive *= 1.0 - probability;
                best = best.max(wanted / seconds);
            }
            self.indices[class][age] = best;
            self.chances[class][age] = wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReuseModel {
        /// How many observations a class has had, and how many were reuses. Counts whole age groups only.
        pub(crate) fn observations(&self, class: usize) -> (u32, u32) {
            let reports = self.classes[class].iter().zip(&self.widths);
            let stayed: f64 = reports.map(|(tally, width)| (tally.expected / width).round()).sum();
            let seen: f64 = self.classes[class].iter().map(|tally| tally.seen).sum();
            (stayed as u32, seen as u32)
        }
    }

    #[test]
    fn without_knowledge_the_order_is_that_of_recency() {
        let model = ReuseModel::new();
        let class = model.class(Visit { num_new_tokens: 2000, ..Visit::default() }.levels(2000, 100, 1), 1);
        for age in 1..NUM_AGES {
            assert!(model.index(class, age) < model.index(class, age - 1), "age group {age}");
        }
    }

    #[test]
    fn learns_who_comes_back_and_when() {
        let mut model = ReuseModel::new();
        let good = Visit { turn: 3, pause: Some(60), num_new_tokens: 500 }.levels(5000, 200, 1);
        let bad = Visit { turn: 1, pause: None, num_new_tokens: 9000 }.levels(9000, 4, 1);
        // Half of the good come back after 45 to 64 s, nobody else ever.
        let back = model.age(50_000_000);
        for n in 0..4000 {
            for (levels, comes_back) in [(good, n % 2 == 0), (bad, false)] {
                let class = model.class(levels, 1);
                for age in 0..if comes_back { back } else { NUM_AGES - 1 } {
                    model.stayed(levels, class, age);
                }
                if comes_back {
                    model.reused(levels, class, back, 50_000_000);
                }
            }
        }
        let (good, bad) = (model.class(good, 1), model.class(bad, 1));
        assert!(good > bad + 6, "classes {good} and {bad}");
        assert!(model.index(good, back) > 1.2 * model.index(good, 0), "closer is better");
        assert!(model.index(good, back) > 5.0 * model.index(good, back + 2), "late is too late");
        assert!(model.index(good, 0) > 5.0 * model.index(bad, 0));
    }

    #[test]
    fn old_traffic_is_forgotten() {
        let mut model = ReuseModel::new();
        let levels = Levels::default();
        let index = |model: &ReuseModel| model.index(model.class(levels, 1), 0);
        let before = index(&model);
        for _ in 0..400_000 {
            model.reused(levels, model.class(levels, 1), 0, 1_000_000);
        }
        let busy = index(&model);
        assert!(busy > 2.0 * before, "{before} and {busy}");
        assert!(model.num_reuses < MEMORY);
        for _ in 0..400_000 {
            model.stayed(levels, model.class(levels, 1), 0);
        }
        assert!(index(&model) < 0.5 * busy);
    }

    #[test]
    fn many_uses_make_a_class_of_their_own() {
        let model = ReuseModel::new();
        let classes = [15, 16, 32, 64, 128, 255].map(|uses| model.class(Levels::default(), uses));
        assert!(classes[0] < NUM_SCORED as u8);
        assert_eq!(classes[1..], [28, 29, 30, 31, 31]);
        assert!(model.index(28, 0) > model.index(classes[0], 0));
    }
}

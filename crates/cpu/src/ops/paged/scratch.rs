//! One thread's memory to work in.

use super::TILE;
use super::softmax::{SCALES, State};
use crate::simd::pairs::PANEL;

/// Of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[ROWS][key_pairs]` queries.
    q: Vec<u32>,
    /// `[ROWS][TILE]` scores.
    scores: Vec<f32>,
    /// `[ROWS][TILE / 2]` weights.
    weights: Vec<u32>,
    /// `[ROWS]` highest scores of the tile at work, then what they shrink earlier weights by.
    highest: Vec<f32>,
    /// A [`State`]: of the split at work, and of those before.
    part: Vec<f32>,
    total: Vec<f32>,
    /// A tile that does not lie ready in the cache: `[PANELS][key_pairs][PANEL]`, `[TILE / 2][columns]`.
    keys: Vec<u32>,
    values: Vec<u32>,
    /// Of each KV head, of the tile's keys, then of its values, if they have any.
    scales: Vec<f32>,
}

impl Scratch {
    pub fn reserve(&mut self, rows: usize, key_pairs: usize, columns: usize) {
        self.q.resize(rows * key_pairs, 0);
        self.scores.resize(rows * TILE, 0.0);
        self.weights.resize(rows * TILE / 2, 0);
        self.highest.resize(rows.next_multiple_of(PANEL), 0.0);
        self.part.resize(State::len(rows, columns), 0.0);
        self.total.resize(State::len(rows, columns), 0.0);
        self.keys.resize(TILE * key_pairs, 0);
        self.values.resize(TILE / 2 * columns, 0);
        self.scales.resize(rows * SCALES, 1.0);
    }
}

/// The parts of [`Scratch`] that a tile works in.
pub(super) struct Buffers<'a> {
    pub q: &'a mut [u32],
    pub scores: &'a mut [f32],
    pub weights: &'a mut [u32],
    pub highest: &'a mut [f32],
    pub tile: TileRoom<'a>,
}

/// Room for a tile.
pub(super) struct TileRoom<'a> {
    pub keys: &'a mut [u32],
    pub values: &'a mut [u32],
    pub scales: &'a mut [f32],
}

impl Scratch {
    pub fn parts(&mut self) -> (Buffers<'_>, &mut [f32], &mut [f32]) {
        let Self { q, scores, weights, highest, part, total, keys, values, scales } = self;
        let tile = TileRoom { keys, values, scales };
        (Buffers { q, scores, weights, highest, tile }, part, total)
    }
}

//! What adapters add to linear layers.

use quire_core::AdapterId;

use crate::convert::to_f32;
use crate::{BackendError, LoraSource};

/// What all adapters add to one linear layer.
#[derive(Clone, Debug)]
pub struct RefLora {
    /// By id.
    adapters: Vec<Vec<Part>>,
}

#[derive(Clone, Debug)]
struct Part {
    /// First output.
    first: usize,
    /// `[rank, in_features]`.
    a: Vec<f32>,
    /// `[outputs, rank]`.
    b: Vec<f32>,
    scaling: f32,
}

impl RefLora {
    pub(super) fn load(source: &LoraSource<'_>) -> Result<Self, BackendError> {
        source.check()?;
        let part = |part: &crate::LoraPart<'_>| {
            let (a, b) = (to_f32(source.name, &part.a)?, to_f32(source.name, &part.b)?);
            Ok(Part { first: part.first, a, b, scaling: part.scaling })
        };
        let parts = |parts: &Vec<_>| parts.iter().map(part).collect();
        Ok(Self { adapters: source.adapters.iter().map(parts).collect::<Result<_, BackendError>>()? })
    }

    /// `out += scaling · B (A · x)`.
    pub(super) fn add(&self, adapter: AdapterId, x: &[f32], out: &mut [f32]) {
        for part in &self.adapters[adapter.0 as usize] {
            let rows = part.a.chunks_exact(x.len());
            let shrunk: Vec<f32> = rows.map(|a| (dot(a, x) * f64::from(part.scaling)) as f32).collect();
            for (out, b) in out[part.first..].iter_mut().zip(part.b.chunks_exact(shrunk.len())) {
                *out += dot(b, &shrunk) as f32;
            }
        }
    }
}

fn dot(a: &[f32], x: &[f32]) -> f64 {
    a.iter().zip(x).map(|(&a, &x)| f64::from(a) * f64::from(x)).sum()
}

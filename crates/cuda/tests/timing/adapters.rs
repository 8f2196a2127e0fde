//! LoRA adapters on all linear layers of a model's layer, as a batch of users with different ones has them.

use quire_backend::{
    AddLora, Backend, BackendError, BufRole, Linear, LinearPart, LinearSource, LoraPart, LoraSource,
};
use quire_core::{DType, QuantFormat, SamplingParams, TensorView};
use quire_cuda::{Cuda, CudaBuf, CudaWeight};

use crate::cases::{COLD_BYTES, buffer, random_bf16};
use crate::step::Step;
use crate::{Shape, Timings};

const ROWS: usize = 64;
const NUM_ADAPTERS: usize = 8;
const RANK: usize = 16;

/// A linear layer: its outputs are those of merged parts, of which each is adapted.
struct Linears {
    in_features: usize,
    parts: Vec<usize>,
}

impl Linears {
    /// Of attention and the feed-forward network.
    fn of(shape: Shape) -> [Self; 4] {
        let Shape { hidden, intermediate, num_heads, num_kv_heads, head_dim, .. } = shape;
        let [q, kv] = [num_heads, num_kv_heads].map(|heads| (heads * head_dim) as usize);
        [
            (hidden, vec![q, kv, kv]),
            (q, vec![hidden]),
            (hidden, vec![intermediate; 2]),
            (intermediate, vec![hidden]),
        ]
        .map(|(in_features, parts)| Self { in_features, parts })
    }

    fn out_features(&self) -> usize {
        self.parts.iter().sum()
    }

    /// Of the factors of all adapters.
    fn lora_bytes(&self) -> usize {
        2 * NUM_ADAPTERS * RANK * (self.parts.len() * self.in_features + self.out_features())
    }

    fn load(&self, cuda: &mut Cuda, copies: usize) -> Result<Loaded, BackendError> {
        let (rows, cols) = (self.out_features(), self.in_features);
        let data = random_bf16(rows * cols);
        let weight = TensorView { dtype: DType::BF16, shape: &[rows, cols], data: &data };
        let parts = [LinearPart { weight, bias: None }];
        let source = LinearSource { name: "weight", parts: &parts, quant: QuantFormat::None };
        let weight = cuda.load_linear(&source)?;
        let loras = (0..copies).map(|_| self.load_adapters(cuda, &data)).collect::<Result<_, _>>()?;
        let x = buffer(cuda, BufRole::Hidden, ROWS, cols)?;
        let out = cuda.alloc(BufRole::Hidden, ROWS, rows)?;
        Ok(Loaded { weight, loras, x, out })
    }

    /// `data`: numbers to take factors from.
    fn load_adapters(&self, cuda: &mut Cuda, data: &[u8]) -> Result<<Cuda as Backend>::Lora, BackendError> {
        let shapes: Vec<_> =
            self.parts.iter().map(|&rows| ([RANK, self.in_features], [rows, RANK])).collect();
        let (mut first, mut parts) = (0, Vec::new());
        for (a, b) in &shapes {
            parts.push(LoraPart { first, a: tensor(a, data), b: tensor(b, data), scaling: 0.5 });
            first += b[0];
        }
        cuda.load_lora(&LoraSource {
            name: "adapters",
            in_features: self.in_features,
            out_features: self.out_features(),
            adapters: &vec![parts; NUM_ADAPTERS],
        })
    }
}

fn tensor<'a>(shape: &'a [usize; 2], data: &'a [u8]) -> TensorView<'a> {
    TensorView { dtype: DType::BF16, shape, data: &data[..2 * shape[0] * shape[1]] }
}

struct Loaded {
    weight: CudaWeight,
    /// As many as are cold when they are walked through.
    loras: Vec<<Cuda as Backend>::Lora>,
    x: CudaBuf,
    out: CudaBuf,
}

/// What adapters take of a decode step of as many sequences, one adapter after the other, beside the layer's products.
pub fn adapters(timings: &mut Timings) {
    timings.case("lora_us", |timings| {
        let layers = Linears::of(timings.shape);
        let lora_bytes: usize = layers.iter().map(Linears::lora_bytes).sum();
        let copies = if timings.repeats > 2 { COLD_BYTES.div_ceil(lora_bytes) } else { 1 };
        let load = |layer: &Linears| layer.load(&mut timings.cuda, copies);
        let mut layers = layers.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let step = Step::new(ROWS, 1, 1, &SamplingParams::default()).with_adapters(NUM_ADAPTERS);
        let products = timings.time(&step, |cuda, _| {
            layers.iter_mut().try_for_each(|layer| {
                let Loaded { weight, x, out, .. } = layer;
                cuda.linear(Linear { x, weight, out })
            })
        })?;
        let adapters = timings.time(&step, |cuda, i| {
            layers.iter_mut().try_for_each(|layer| {
                let Loaded { loras, x, out, .. } = layer;
                cuda.add_lora(AddLora { x, lora: &loras[i % copies], out })
            })
        })?;
        let name = format!("{ROWS}x{NUM_ADAPTERS}/r{RANK}");
        timings.row(format!("lora_us/{name}"), adapters, "us");
        timings.row(format!("lora_gb_s/{name}"), 1e-3 * lora_bytes as f64 / adapters, "GB/s");
        timings.row(format!("lora_of_products/{name}"), adapters / products, "of 1");
        Ok(())
    });
}

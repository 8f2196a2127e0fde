//! The layers' operations: checks of shapes, then one launch or product each.

use quire_backend::{Activation, AddNorm, BackendError, Embed, Linear, Logits, Mlp, MlpShape, RopeAndCache};

use crate::Cuda;
use crate::blaslt::{Element, GemmShape, Operand};
use crate::buffers::{CudaBuf, CudaKv, CudaMatrix, CudaWeight, DenseMatrix, KvElement};
use crate::driver::{CudaError, DeviceSlice, Function, LaunchShape};
use crate::kernels::{Kernels, SMALL_ROWS};
use crate::params::{
    ActParams, AddNormParams, CopyPagesParams, EmbedParams, GatherRowsParams, GemvParams, RopeCacheParams,
    SoftCapParams,
};
use crate::staging::bytes_of_i32;
use crate::step::{Layout, MAX_COPIES};

/// Rows of an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// That are launched: at least those that the step has.
    pub launched: usize,
    /// Where the device finds how many the step has.
    pub count: u64,
}

/// `QUIRE_ACT_*` of the kernels.
pub(crate) const fn activation_kind(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Relu => 3,
    }
}

impl Cuda {
    /// One for each token of the step.
    pub(crate) fn token_rows(&self) -> Rows {
        Rows { launched: self.rows, count: self.step_address(Layout::NUM_TOKENS) }
    }

    /// Enqueues a launch of one of our kernels.
    pub(crate) fn launch<P: Copy>(
        &self,
        kernel: &Function<P>,
        shape: LaunchShape,
        params: &P,
    ) -> Result<(), CudaError> {
        // SAFETY: `Kernels::find` pairs each kernel with its struct, which the driver knows the size of; every address
        // in it is of a slice of this backend's arenas, large enough for the rows given (the callers check), and the
        // arenas outlive the stream.
        unsafe { kernel.launch(&self.stream, shape, params) }
    }

    /// A buffer has at least `rows` rows of exactly `cols` columns, of `element`.
    pub(crate) fn expect(
        &self,
        op: &str,
        buf: &CudaBuf,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<(), BackendError> {
        if buf.rows >= rows && buf.cols == cols && buf.element == element {
            return Ok(());
        }
        Err(self.refused(format!(
            "{op}: needs a buffer of [{rows}, {cols}] {element:?}, got [{}, {}] {:?}",
            buf.rows, buf.cols, buf.element
        )))
    }

    pub(crate) fn embed_rows(&mut self, op: &Embed<'_, Self>) -> Result<(), BackendError> {
        let (table, out) = (op.table, &op.out);
        self.expect("embed", out, self.rows, table.in_features, Element::F32)?;
        let data = match &table.matrix {
            CudaMatrix::Dense(dense) => dense.data.data,
            CudaMatrix::Fp8(dense) => return self.embed_fp8(op, dense),
            CudaMatrix::Int(matrix) => return self.embed_int(op, matrix),
        };
        let params = EmbedParams {
            table: data.address(),
            token_ids: self.step_address(self.layout.token_ids),
            last_tokens: self.slots.last_tokens.address(),
            out: out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: table.in_features as i32,
            vocab: table.out_features as i32,
            scale: op.scale,
            reserved: 0,
        };
        let launched = self.launch(&self.kernels.embed, Kernels::by_row(self.rows), &params);
        self.check(launched)
    }

    pub(crate) fn add_and_norm(&mut self, op: &AddNorm<'_, Self>) -> Result<(), BackendError> {
        let (rows, hidden, act) = (self.rows, op.weight.len, self.options.activations);
        self.expect("add_norm residual", op.residual, rows, hidden, Element::F32)?;
        self.expect("add_norm output", op.out, rows, hidden, act)?;
        if let Some(delta) = op.delta {
            self.expect("add_norm delta", delta, rows, hidden, act)?;
        }
        let delta_norm = op.delta_norm.filter(|_| op.delta.is_some());
        if let Some(weight) = delta_norm.filter(|weight| weight.len != hidden) {
            return Err(self.refused(format!("add_norm: {} weights of delta for {hidden}", weight.len)));
        }
        let params = AddNormParams {
            residual: op.residual.slice.address(),
            delta: op.delta.map_or(0, |delta| delta.slice.address()),
            delta_weight: delta_norm.map_or(0, |weight| weight.slice.address()),
            weight: op.weight.slice.address(),
            out: op.out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: hidden as i32,
            eps: op.eps,
        };
        let (kernel, shape) = self.kernels.add_norm(delta_norm.is_some(), rows, hidden);
        let launched = self.launch(kernel, shape, &params);
        self.check(launched)
    }

    pub(crate) fn linear_rows(&mut self, op: &Linear<'_, Self>) -> Result<(), BackendError> {
        let act = self.options.activations;
        self.expect("linear input", op.x, self.rows, op.weight.in_features, act)?;
        self.expect("linear output", op.out, self.rows, op.weight.out_features, op.out.element)?;
        self.product(op.x.slice, op.weight, op.out, self.token_rows())
    }

    /// `out = x · weightᵀ + bias` for dense rows of `x`.
    pub(crate) fn product(
        &mut self,
        x: DeviceSlice,
        weight: &CudaWeight,
        out: &CudaBuf,
        rows: Rows,
    ) -> Result<(), BackendError> {
        match &weight.matrix {
            CudaMatrix::Dense(dense) if self.is_small(weight, dense, rows) => {
                self.small_product(x, weight, dense, out, rows)
            }
            CudaMatrix::Dense(dense) => self.dense_product(x.into(), weight, dense, out, rows.launched),
            CudaMatrix::Fp8(dense) => self.fp8_product(x, weight, dense, out, rows),
            CudaMatrix::Int(matrix) => self.int_product(x, weight, matrix, out, rows),
        }
    }

    /// Whether our own kernel for few rows takes a product. It adds up in another order than the library does for many
    /// rows, so never where a row must have the same bits in any company.
    fn is_small(&self, weight: &CudaWeight, dense: &DenseMatrix, rows: Rows) -> bool {
        !self.options.batch_invariant
            && rows.launched <= SMALL_ROWS
            && weight.bias == DeviceSlice::NULL
            && weight.in_features.is_multiple_of(8)
            && dense.stride == weight.in_features
    }

    fn small_product(
        &mut self,
        x: DeviceSlice,
        weight: &CudaWeight,
        dense: &DenseMatrix,
        out: &CudaBuf,
        rows: Rows,
    ) -> Result<(), BackendError> {
        let params = GemvParams {
            x: x.address(),
            weight: dense.data.data.address(),
            bias: 0,
            out: out.slice.address(),
            num_rows: rows.count,
            in_features: weight.in_features as i32,
            out_features: weight.out_features as i32,
            x_stride: weight.in_features as i32,
            out_stride: out.stride as i32,
        };
        let (kernel, shape) = self.kernels.gemv(out.element, weight.out_features);
        let launched = self.launch(kernel, shape, &params);
        self.check(launched)
    }

    pub(crate) fn dense_product(
        &mut self,
        x: Operand,
        weight: &CudaWeight,
        dense: &DenseMatrix,
        out: &CudaBuf,
        rows: usize,
    ) -> Result<(), BackendError> {
        let cell = dense.gemm(out.element);
        if cell.get().is_none() {
            let shape = GemmShape {
                n: weight.out_features,
                k: dense.stride,
                x_stride: dense.stride,
                out_stride: out.stride,
                input: dense.element,
                output: out.element,
                bias: (weight.bias != DeviceSlice::NULL).then_some(self.options.activations),
            };
            let planned = self.blas.plan(shape, dense.data, weight.bias, &self.stream);
            let gemm = self.check(planned.map_err(|error| CudaError {
                status: format!("{} (weight {})", error.status, weight.name),
                ..error
            }))?;
            let _ = cell.set(gemm);
        }
        let gemm = cell.get().expect("set above");
        if gemm.shape().out_stride != out.stride {
            return Err(self.refused(format!("weight {} writes to buffers of different widths", weight.name)));
        }
        let enqueued = self.blas.matmul(gemm, x, out.slice, rows, &self.stream);
        self.check(enqueued)
    }

    pub(crate) fn rope_rows(&mut self, op: &RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let (shape, kv) = (op.shape, &op.kv);
        self.expect("rope_and_cache", op.qkv, self.rows, shape.qkv_size(), self.options.activations)?;
        let head_dim = shape.head_dim as usize;
        self.expect_cache(kv, shape.num_kv_heads, shape.head_dim, op.layer)?;
        let rotary_dim = op.rope.map_or(0, |rope| rope.rotary_dim);
        let params = RopeCacheParams {
            qkv: op.qkv.slice.address(),
            q_norm: op.qk_norm.map_or(0, |(q, _)| q.slice.address()),
            k_norm: op.qk_norm.map_or(0, |(_, k)| k.slice.address()),
            rope: op.rope.map_or(0, |rope| rope.slice.address()),
            positions: self.positions.address(),
            slot_mapping: self.slot_mapping.address(),
            kv: kv.layer(op.layer),
            kv_scales: kv.layer_scales(op.layer),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            head_dim: head_dim as i32,
            rotary_dim: rotary_dim as i32,
            page_tokens: kv.page_tokens as i32,
            eps: op.eps,
            write_back: i32::from(self.options.write_back),
            ..RopeCacheParams::default()
        };
        let heads = (shape.num_heads + 2 * shape.num_kv_heads) as usize;
        let (kernel, launch) = self.kernels.rope_cache(kv.element, self.rows, heads, head_dim, rotary_dim);
        let launched = self.launch(kernel, launch, &params);
        self.check(launched)
    }

    /// The cache has this layer, with these heads.
    pub(crate) fn expect_cache(
        &self,
        kv: &CudaKv,
        num_kv_heads: u32,
        head_dim: u32,
        layer: usize,
    ) -> Result<(), BackendError> {
        if (kv.num_kv_heads, kv.head_dim) == (num_kv_heads, head_dim) && layer < kv.num_layers {
            return Ok(());
        }
        Err(self.refused(format!(
            "layer {layer} with {num_kv_heads} heads of {head_dim} on a cache of {} layers with {} heads of {}",
            kv.num_layers, kv.num_kv_heads, kv.head_dim
        )))
    }

    pub(crate) fn mlp_rows(&mut self, op: &Mlp<'_, Self>) -> Result<(), BackendError> {
        let (rows, act) = (self.rows, self.options.activations);
        let width = op.down.in_features;
        let is_gated = op.shape == MlpShape::Gated;
        let up_width = width * if is_gated { 2 } else { 1 };
        if op.up.out_features != up_width {
            return Err(self.refused(format!("mlp: {} rows of up for {width} of down", op.up.out_features)));
        }
        self.expect("mlp input", op.x, rows, op.up.in_features, act)?;
        self.expect("mlp scratch", op.scratch, rows, up_width, act)?;
        self.expect("mlp output", op.out, rows, op.down.out_features, act)?;
        let hidden = self.mlp_hidden(width)?;
        self.product(op.x.slice, op.up, op.scratch, self.token_rows())?;
        if let Some(lora) = op.up_lora {
            self.add_lora_to(op.x.slice, lora, op.scratch)?;
        }
        let params = ActParams {
            r#in: op.scratch.slice.address(),
            out: hidden.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            width: width as i32,
            kind: activation_kind(op.activation),
            gated: i32::from(is_gated),
            reserved: 0,
        };
        let (kernel, shape) = self.kernels.act(rows, width);
        let launched = self.launch(kernel, shape, &params);
        self.check(launched)?;
        self.product(hidden, op.down, op.out, self.token_rows())?;
        op.down_lora.map_or(Ok(()), |lora| self.add_lora_to(hidden, lora, op.out))
    }

    /// Room for what a feed-forward layer's nonlinearity gives, made at the first use.
    fn mlp_hidden(&mut self, width: usize) -> Result<DeviceSlice, BackendError> {
        let bytes = self.max_rows * width * self.options.activations.size();
        if self.mlp_hidden.bytes() < bytes {
            self.mlp_hidden = self.take("activations", bytes)?;
        }
        Ok(self.mlp_hidden)
    }

    pub(crate) fn logit_rows(&mut self, op: &Logits<'_, Self>) -> Result<(), BackendError> {
        let (rows, act) = (self.logit_launch_rows, self.options.activations);
        if self.current.rows.is_empty() {
            return Ok(());
        }
        self.expect("logits input", op.x, 1, op.head.in_features, act)?;
        self.expect("logits output", op.out, rows, op.head.out_features, Element::F32)?;
        let bytes = op.out.rows * op.head.in_features * act.size();
        if self.gathered.bytes() < bytes {
            self.gathered = self.take("activations", bytes)?;
        }
        let params = GatherRowsParams {
            r#in: op.x.slice.address(),
            rows: self.step_address(self.layout.logit_rows),
            out: self.gathered.address(),
            num_rows: self.step_address(Layout::NUM_LOGIT_ROWS),
            row_stride: 6,
            hidden: op.head.in_features as i32,
        };
        let launched = self.launch(&self.kernels.gather_rows, Kernels::by_row(rows), &params);
        self.check(launched)?;
        let rows = Rows { launched: rows, count: self.step_address(Layout::NUM_LOGIT_ROWS) };
        self.product(self.gathered, op.head, op.out, rows)?;
        op.soft_cap.map_or(Ok(()), |cap| self.cap_rows(op.out, rows, cap))
    }

    fn cap_rows(&mut self, x: &CudaBuf, rows: Rows, cap: f32) -> Result<(), BackendError> {
        let params = SoftCapParams {
            x: x.slice.address(),
            num_rows: rows.count,
            cols: x.cols as i32,
            stride: x.stride as i32,
            cap,
            reserved: 0,
        };
        let shape = Kernels::soft_cap_shape(rows.launched, x.cols);
        let launched = self.launch(&self.kernels.soft_cap, shape, &params);
        self.check(launched)
    }

    /// The step's page copies. Those that went with the upload take one launch, which also serves replays; others are
    /// sent round by round.
    pub(crate) fn copy_pages(&mut self, kv: &CudaKv) -> Result<(), BackendError> {
        if !self.has_extra_copies {
            return self.copy_round(kv);
        }
        let rounds = std::mem::take(&mut self.copy_rounds);
        for piece in rounds.iter().flat_map(|round| round.chunks(MAX_COPIES)) {
            let words: Vec<i32> = piece.iter().flatten().copied().collect();
            let count = self.step_slice(Layout::NUM_PAIRS, 1);
            let pairs = self.step_slice(self.layout.pairs, words.len());
            let sent = self
                .staging
                .upload(bytes_of_i32(&[piece.len() as i32]), count, &self.stream)
                .and_then(|()| self.staging.upload(bytes_of_i32(&words), pairs, &self.stream));
            self.check(sent)?;
            self.copy_round(kv)?;
        }
        self.copy_rounds = rounds;
        Ok(())
    }

    fn copy_round(&mut self, kv: &CudaKv) -> Result<(), BackendError> {
        self.copy_round_in(kv.slice, kv.page_bytes, kv.layer_bytes(), kv)?;
        match kv.element {
            KvElement::Activation => Ok(()),
            KvElement::Fp8 => {
                self.copy_round_in(kv.scales, kv.page_scale_bytes(), kv.layer_scale_bytes(), kv)
            }
        }
    }

    fn copy_round_in(
        &mut self,
        pages: DeviceSlice,
        page_bytes: usize,
        layer_bytes: usize,
        kv: &CudaKv,
    ) -> Result<(), BackendError> {
        let params = CopyPagesParams {
            pairs: self.step_address(self.layout.pairs),
            num_pairs: self.step_address(Layout::NUM_PAIRS),
            src: pages.address(),
            dst: pages.address(),
            page_bytes: page_bytes as u64,
            src_layer_stride: layer_bytes as u64,
            dst_layer_stride: layer_bytes as u64,
            num_layers: kv.num_layers as i32,
            reserved: 0,
        };
        let blocks = self.context.sm_count().min(4 * kv.num_layers as u32);
        let launched = self.launch(&self.kernels.copy_pages, LaunchShape::linear(blocks, 256), &params);
        self.check(launched)
    }
}

//! Mixtures of experts: the router's product, then five launches. Which rows an expert gets is known on the device only, so
//! the products' grid is fixed and its blocks take tiles from a list that the sort has made.

use quire_backend::{BackendError, Moe};

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{CudaMatrix, DenseMatrix};
use crate::driver::DeviceSlice;
use crate::int_weights::PANEL;
use crate::kernels::{self, Kernels, MoeKernels, MoeProducts};
use crate::ops::activation_kind;
use crate::params::{MoeCombineParams, MoeGemmParams, MoeIntParams, MoeRouteParams, MoeSortParams, MoeTile};
use crate::quantized::{IntMatrix, QuantizedRows};
use crate::step::Layout;

/// Experts of a token at most: a warp keeps one in each lane.
const MAX_TOP_K: usize = 32;
/// What the inputs of experts in fp8 are a multiple of: a load of the kernel.
const FP8_INPUTS: usize = 16;

/// What routing leaves for the products, made at the first use. A slot is a token and a rank.
#[derive(Debug)]
pub(crate) struct Routing {
    /// `[slots]`, by token and rank.
    experts: DeviceSlice,
    weights: DeviceSlice,
    /// `[slots]` by expert.
    slots: DeviceSlice,
    tiles: DeviceSlice,
    num_tiles: DeviceSlice,
    /// Slots and experts that there is room for.
    size: (usize, usize),
}

impl Routing {
    pub fn empty() -> Self {
        let null = DeviceSlice::NULL;
        Self { experts: null, weights: null, slots: null, tiles: null, num_tiles: null, size: (0, 0) }
    }
}

/// Widths of a layer.
#[derive(Clone, Copy)]
struct Shape {
    num_experts: usize,
    top_k: usize,
    hidden: usize,
    width: usize,
}

impl Cuda {
    pub(crate) fn moe_rows(&mut self, op: &Moe<'_, Self>) -> Result<(), BackendError> {
        let shape = self.moe_shape(op)?;
        self.reserve_routing(shape)?;
        self.product(op.x.slice, op.router, op.scratch.logits, self.token_rows())?;
        self.route(op, shape)?;
        match (&op.up.matrix, &op.down.matrix) {
            (CudaMatrix::Dense(up), CudaMatrix::Dense(down)) => {
                self.float_experts(op, shape, [up, down], |moe| &moe.dense)?;
            }
            (CudaMatrix::Fp8(up), CudaMatrix::Fp8(down)) => {
                self.are_whole(op, shape, FP8_INPUTS)?;
                self.float_experts(op, shape, [up, down], |moe| &moe.fp8)?;
            }
            (CudaMatrix::Int(up), CudaMatrix::Int(down)) => {
                self.are_whole(op, shape, PANEL)?;
                self.int_experts(op, shape, [up, down])?;
            }
            _ => {
                let (up, down) = (&op.up.name, &op.down.name);
                return Err(self.refused(format!("{up} and {down} are quantized in different ways")));
            }
        }
        let combine = MoeCombineParams {
            y: op.scratch.expert_out.slice.address(),
            weights: self.routing.weights.address(),
            out: op.out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: shape.hidden as i32,
            top_k: shape.top_k as i32,
        };
        let grid = kernels::moe_combine(self.rows, shape.hidden);
        let launched = self.launch(&self.kernels.moe.combine, grid, &combine);
        self.check(launched)
    }

    /// Quantized experts: rows of either product are whole multiples.
    fn are_whole(&self, op: &Moe<'_, Self>, shape: Shape, multiple: usize) -> Result<(), BackendError> {
        let Shape { hidden, width, .. } = shape;
        if hidden.is_multiple_of(multiple) && width.is_multiple_of(multiple) {
            return Ok(());
        }
        Err(self.refused(format!(
            "{}: {hidden} and {width} columns are not multiples of {multiple}, which quantized experts need",
            op.up.name
        )))
    }

    /// Experts' products of activations in 16 bits, with rows of weights one after the other.
    fn float_experts(
        &mut self,
        op: &Moe<'_, Self>,
        shape: Shape,
        [up, down]: [&DenseMatrix; 2],
        kernels: impl Fn(&MoeKernels) -> &MoeProducts<MoeGemmParams>,
    ) -> Result<(), BackendError> {
        let (experts, kernels, scratch) = (&self.routing, kernels(&self.kernels.moe), &op.scratch);
        let gate_up = MoeGemmParams {
            x: op.x.slice.address(),
            weight: up.data.data.address(),
            w_scales: up.data.scales.address(),
            out: scratch.hidden.slice.address(),
            slots: experts.slots.address(),
            tiles: experts.tiles.address(),
            num_tiles: experts.num_tiles.address(),
            in_features: shape.hidden as i32,
            out_features: shape.width as i32,
            top_k: shape.top_k as i32,
            kind: activation_kind(op.activation),
        };
        let down = MoeGemmParams {
            x: scratch.hidden.slice.address(),
            weight: down.data.data.address(),
            w_scales: down.data.scales.address(),
            out: scratch.expert_out.slice.address(),
            in_features: shape.width as i32,
            out_features: shape.hidden as i32,
            ..gate_up
        };
        let grid = kernels::moe_gemm(self.context.sm_count());
        let launched = self
            .launch(&kernels.gate_up, grid, &gate_up)
            .and_then(|()| self.launch(&kernels.down, grid, &down));
        self.check(launched)
    }

    /// The same in integers: what a product reads is rounded to 8 bits first, the rows of down slot by slot.
    fn int_experts(
        &mut self,
        op: &Moe<'_, Self>,
        shape: Shape,
        [up, down]: [&IntMatrix; 2],
    ) -> Result<(), BackendError> {
        let Shape { hidden, width, top_k, .. } = shape;
        let (hidden_rows, expert_out) = (op.scratch.hidden.slice, op.scratch.expert_out.slice);
        let x = self.quantize(op.x.slice, hidden, self.token_rows(), 1)?;
        let gate_up = MoeIntParams { kind: activation_kind(op.activation), ..self.int_params(shape, up, x) };
        let gate_up = MoeIntParams { out: hidden_rows.address(), out_features: width as i32, ..gate_up };
        let grid = kernels::moe_gemm(self.context.sm_count());
        let launched = self.launch(&self.kernels.moe.int(up.bits).gate_up, grid, &gate_up);
        self.check(launched)?;
        let x = self.quantize(hidden_rows, width, self.token_rows(), top_k)?;
        let params = self.int_params(shape, down, x);
        let params = MoeIntParams { out: expert_out.address(), out_features: hidden as i32, ..params };
        let launched = self.launch(&self.kernels.moe.int(down.bits).down, grid, &params);
        self.check(launched)
    }

    /// All but what the product gives.
    fn int_params(&self, shape: Shape, matrix: &IntMatrix, x: QuantizedRows) -> MoeIntParams {
        MoeIntParams {
            q: x.values.address(),
            x_scales: x.scales.address(),
            weight: matrix.weights.address(),
            steps: matrix.steps.address(),
            w_scales: matrix.scales.address(),
            slots: self.routing.slots.address(),
            tiles: self.routing.tiles.address(),
            num_tiles: self.routing.num_tiles.address(),
            groups: matrix.groups as i32,
            top_k: shape.top_k as i32,
            ..MoeIntParams::default()
        }
    }

    /// Experts and weights of every slot, and the tiles of the products.
    fn route(&mut self, op: &Moe<'_, Self>, shape: Shape) -> Result<(), BackendError> {
        let experts = &self.routing;
        let route = MoeRouteParams {
            logits: op.scratch.logits.slice.address(),
            experts: experts.experts.address(),
            weights: experts.weights.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            num_experts: shape.num_experts as i32,
            stride: op.scratch.logits.stride as i32,
            top_k: shape.top_k as i32,
            renormalise: i32::from(op.renormalise),
        };
        let sort = MoeSortParams {
            experts: experts.experts.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            slots: experts.slots.address(),
            tiles: experts.tiles.address(),
            num_tiles: experts.num_tiles.address(),
            num_experts: shape.num_experts as i32,
            top_k: shape.top_k as i32,
        };
        let launched = self
            .launch(&self.kernels.moe.route, kernels::moe_route(self.rows), &route)
            .and_then(|()| self.launch(&self.kernels.moe.sort, Kernels::MOE_SORT, &sort));
        self.check(launched)
    }

    /// Everything fits together, and the kernels can take it.
    fn moe_shape(&self, op: &Moe<'_, Self>) -> Result<Shape, BackendError> {
        let (rows, act) = (self.rows, self.options.activations);
        let (num_experts, hidden, width) =
            (op.router.out_features, op.router.in_features, op.down.in_features);
        let shape = Shape { num_experts, top_k: op.top_k, hidden, width };
        if op.top_k == 0 || op.top_k > num_experts.min(MAX_TOP_K) || num_experts > quire_backend::MAX_EXPERTS
        {
            let top_k = op.top_k;
            return Err(self.refused(format!(
                "moe: {top_k} of {num_experts} experts; supported on CUDA are 1 to {MAX_TOP_K} of at most {}",
                quire_backend::MAX_EXPERTS
            )));
        }
        if !(hidden.is_multiple_of(8) && width.is_multiple_of(8)) {
            return Err(self.refused(format!("moe: {hidden} and {width} columns are not multiples of 8")));
        }
        let wanted = (num_experts * 2 * width, hidden, num_experts * hidden);
        if (op.up.out_features, op.up.in_features, op.down.out_features) != wanted {
            let (up, down) = (op.up.out_features, op.down.out_features);
            return Err(self.refused(format!("moe: {up} and {down} rows for {num_experts} experts")));
        }
        let scratch = &op.scratch;
        self.expect("moe input", op.x, rows, hidden, act)?;
        self.expect("moe logits", scratch.logits, rows, num_experts, Element::F32)?;
        self.expect("moe hidden", scratch.hidden, rows, op.top_k * 2 * width, act)?;
        self.expect("moe results", scratch.expert_out, rows, op.top_k * hidden, act)?;
        self.expect("moe output", op.out, rows, hidden, act)?;
        Ok(shape)
    }

    fn reserve_routing(&mut self, shape: Shape) -> Result<(), BackendError> {
        let (slots, experts) = self.routing.size;
        let wanted = (self.max_rows * shape.top_k, shape.num_experts);
        if wanted.0 <= slots && wanted.1 <= experts {
            return Ok(());
        }
        let (slots, experts) = (wanted.0.max(slots), wanted.1.max(experts));
        let tiles = experts + slots / kernels::MOE_TILE_ROWS;
        self.routing = Routing {
            experts: self.take("routing", slots * 4)?,
            weights: self.take("routing", slots * 4)?,
            slots: self.take("routing", slots * 4)?,
            tiles: self.take("routing", tiles * size_of::<MoeTile>())?,
            num_tiles: self.take("routing", 4)?,
            size: (slots, experts),
        };
        Ok(())
    }
}

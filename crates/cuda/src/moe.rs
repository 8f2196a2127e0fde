//! Mixtures of experts: the router's product, then five launches. Which rows an expert gets is known on the device only, so
//! the products' grid is fixed and its blocks take tiles from a list that the sort has made.

use quire_backend::{BackendError, Moe};

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{CudaMatrix, CudaWeight};
use crate::driver::DeviceSlice;
use crate::kernels::{self, Kernels};
use crate::ops::activation_kind;
use crate::params::{MoeCombineParams, MoeGemmParams, MoeRouteParams, MoeSortParams, MoeTile};
use crate::step::Layout;

/// Experts of a token at most: a warp keeps one in each lane.
const MAX_TOP_K: usize = 32;

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
        let (up, down) = (self.expert_weights(op.up)?, self.expert_weights(op.down)?);
        self.reserve_routing(shape)?;
        let scratch = &op.scratch;
        self.product(op.x.slice, op.router, scratch.logits, self.token_rows())?;
        self.route(op, shape)?;
        let (experts, kernels) = (&self.routing, &self.kernels.moe);
        let gate_up = MoeGemmParams {
            x: op.x.slice.address(),
            weight: up.address(),
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
            weight: down.address(),
            out: scratch.expert_out.slice.address(),
            in_features: shape.width as i32,
            out_features: shape.hidden as i32,
            ..gate_up
        };
        let combine = MoeCombineParams {
            y: scratch.expert_out.slice.address(),
            weights: experts.weights.address(),
            out: op.out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: shape.hidden as i32,
            top_k: shape.top_k as i32,
        };
        let grid = kernels::moe_gemm(self.context.sm_count());
        let launched = self
            .launch(&kernels.gate_up, grid, &gate_up)
            .and_then(|()| self.launch(&kernels.down, grid, &down))
            .and_then(|()| {
                self.launch(&kernels.combine, kernels::moe_combine(self.rows, shape.hidden), &combine)
            });
        self.check(launched)
    }

    /// The kernels read rows as they are in the checkpoint.
    fn expert_weights(&self, weight: &CudaWeight) -> Result<DeviceSlice, BackendError> {
        match &weight.matrix {
            CudaMatrix::Dense(dense) if dense.stride == weight.in_features => Ok(dense.data.data),
            CudaMatrix::Dense(_) | CudaMatrix::Fp8(_) | CudaMatrix::Int(_) => {
                Err(self.refused(format!("{}: experts cannot be quantized on CUDA", weight.name)))
            }
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

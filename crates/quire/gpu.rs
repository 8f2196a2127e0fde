//! Where a model runs: on a GPU, where this build and this machine have one, else on the processor; and why.

use quire_core::{DType, QuantFormat};
use quire_model::{Ffn, ModelSpec};

use crate::args::{Device, EngineArgs, ExecutorArg};
use crate::{Failure, Result};

/// The GPU that `--device` means, or `None` for the processor. With `auto`, a log line says why it is the processor.
///
/// # Errors
/// `--device cuda`, and no GPU can be used.
pub(crate) fn choose(args: &EngineArgs, spec: &ModelSpec) -> Result<Option<Gpu>> {
    if args.device == Device::Cpu || args.executor == ExecutorArg::Mock {
        return Ok(None);
    }
    let dtype = spec.dtype;
    match (unsuited(args, spec).map_or_else(|| Gpu::open(args, dtype), Err), args.device) {
        (Ok(gpu), _) => Ok(Some(gpu)),
        (Err(reason), Device::Cuda) => Err(Failure(format!("--device cuda: {reason}"))),
        (Err(reason), _) => {
            if Gpu::IS_BUILT_IN {
                tracing::info!(reason, "computing on the processor");
            }
            Ok(None)
        }
    }
}

/// What was asked for that only the processor can do.
fn unsuited(args: &EngineArgs, spec: &ModelSpec) -> Option<String> {
    let (quant, dtype) = (args.quantize.format(), spec.dtype);
    let kv = kv_dtype(args, dtype);
    let has_experts = spec.layers.iter().any(|layer| matches!(layer.ffn, Ffn::Moe(_)));
    if has_experts && quant != QuantFormat::None {
        return Some(format!(
            "--quantize {} of experts is not supported on CUDA; leave it out",
            quant.name()
        ));
    }
    if kv != DType::F8E4M3 && kv != activation_dtype(dtype) {
        return Some(format!("--kv-cache-dtype {kv} is not supported on CUDA; use auto or fp8"));
    }
    if args.block_size < 16 {
        return Some(format!("--block-size {} is not supported on CUDA; use 16, 32 or 64", args.block_size));
    }
    None
}

/// What activations are stored as, for a checkpoint of `dtype`.
fn activation_dtype(dtype: DType) -> DType {
    if dtype == DType::F16 { DType::F16 } else { DType::BF16 }
}

/// What keys and values are stored as, for a checkpoint of `dtype`: as asked for, or as activations.
pub(crate) fn kv_dtype(args: &EngineArgs, dtype: DType) -> DType {
    args.kv_cache_dtype.dtype().unwrap_or_else(|| activation_dtype(dtype))
}

#[cfg(feature = "cuda")]
pub(crate) use built_in::Gpu;
#[cfg(not(feature = "cuda"))]
pub(crate) use left_out::Gpu;

#[cfg(feature = "cuda")]
mod built_in {
    use quire_core::{DType, Executor};
    use quire_cuda::blaslt::Element;
    use quire_cuda::{Cuda, CudaOptions};
    use quire_model::Checkpoint;
    use quire_runner::{LoadProgress, RunnerError};

    use crate::args::{EngineArgs, Switch};
    use crate::config::Config;
    use crate::ranks;
    use crate::units::Bytes;

    /// `(name, fatbin)` of each source in `kernels/`, compiled by build.rs.
    const IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

    /// A GPU that is ready to load, or several that share a model.
    pub(crate) struct Gpu {
        /// By rank; at least one.
        backends: Vec<Cuda>,
        /// Bytes, on the fullest.
        free: u64,
    }

    impl Gpu {
        pub const IS_BUILT_IN: bool = true;

        /// Opens the first GPU, or as many as the model is to be split over. The error is the reason, in words.
        pub fn open(args: &EngineArgs, dtype: DType) -> Result<Self, String> {
            let activations = if dtype == DType::F16 { Element::F16 } else { Element::Bf16 };
            let options = CudaOptions {
                activations,
                batch_invariant: args.batch_invariant != Switch::Off,
                algorithm_cache: cache_folder(),
                ..CudaOptions::default()
            };
            let ordinals: Vec<_> = (0..args.tensor_parallel_size).collect();
            let backends = Cuda::group(IMAGES, &options, &ordinals).map_err(|error| error.to_string())?;
            let memory = |backend: &Cuda| backend.context().memory().map(|(free, _)| free);
            let free = backends.iter().map(memory).collect::<Result<Vec<_>, _>>();
            let free = free.map_err(|error| error.to_string())?.into_iter().min().unwrap_or(0);
            Ok(Self { backends, free })
        }

        /// Device memory that nobody uses, on each GPU.
        pub fn free_memory(&self) -> Bytes {
            Bytes(self.free)
        }

        /// Where it computes, in one line.
        pub fn describe(&self) -> String {
            let context = self.backends[0].context();
            let (major, minor) = context.compute_capability();
            let (name, free) = (context.name(), Bytes(self.free));
            let ordinals = match self.backends.len() {
                1 => "cuda:0".to_owned(),
                several => format!("cuda:0 to {}, each", several - 1),
            };
            format!("{ordinals}, {name}, compute capability {major}.{minor}, {free} free")
        }

        /// Loads the model onto it.
        pub fn load(
            self,
            checkpoint: &Checkpoint,
            config: &Config,
            progress: impl FnMut(LoadProgress),
        ) -> Result<Box<dyn Executor>, RunnerError> {
            ranks::load(self.backends, checkpoint, config, progress)
        }
    }

    /// `$XDG_CACHE_HOME/quire` or `~/.cache/quire`.
    fn cache_folder() -> Option<std::path::PathBuf> {
        let set =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(std::path::PathBuf::from);
        set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).map(|folder| folder.join("quire"))
    }
}

#[cfg(not(feature = "cuda"))]
mod left_out {
    use quire_core::{DType, Executor};
    use quire_model::Checkpoint;
    use quire_runner::{LoadProgress, RunnerError};

    use crate::args::EngineArgs;
    use crate::config::Config;
    use crate::units::Bytes;

    /// There is none in a build without the feature `cuda`.
    pub(crate) enum Gpu {}

    impl Gpu {
        pub const IS_BUILT_IN: bool = false;

        pub fn open(_: &EngineArgs, _: DType) -> Result<Self, String> {
            Err("this build computes on the processor only; build with --features cuda".into())
        }

        pub fn free_memory(&self) -> Bytes {
            match *self {}
        }

        pub fn describe(&self) -> String {
            match *self {}
        }

        pub fn load(
            self,
            _: &Checkpoint,
            _: &Config,
            _: impl FnMut(LoadProgress),
        ) -> Result<Box<dyn Executor>, RunnerError> {
            match self {}
        }
    }
}
